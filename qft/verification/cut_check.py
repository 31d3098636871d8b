r"""Whether the way a GGUF file says text is cut is the way the reference's tokenizer cuts it.

llama.cpp is told a name. Here each name stands for the regular expressions that llama.cpp runs
under it, in llama.cpp's own spelling, and texts are cut by them and by the tokenizer itself: what
the writer thought of the tokenizer plays no part.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qft.gguf.byte_level_vocabulary import first_word_merged_otherwise

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_LLAMA3 = (_SHORT + _WORD + r"\p{N}{1,3}" + _REST,)
_QWEN2 = (_SHORT + _WORD + r"\p{N}" + _REST,)
_MARKED = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+%s"
    r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*%s"
)
_AFTER = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BY_NAME: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "modern-bert", "roberta-bpe",
                     "exaone4", "trillion"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone",
                     "minerva-7b"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "dbrx",
                     "smaug-bpe", "chatglm-bpe", "glm4"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "grok-2"),
                    _QWEN2),
    "qwen35": (
        _SHORT + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "ufakzeka": (_WORD.removeprefix("|") + r"\p{N}" + _REST,),
    "seed-coder": (
        _SHORT + _WORD + r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "minicpm5": (r"\p{N}{1,3}", _SHORT + _WORD + r"\p{N}+" + _REST),
    "deepseek-coder": (
        "[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}",
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "tekken": (_MARKED % ("", "") + r"|\p{N}" + _AFTER,),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"),
                    (_MARKED % (_SHORT + "?", _SHORT + "?") + r"|\p{N}{1,3}" + _AFTER,)),
}  # fmt: skip
_WHOLE_WORDS = frozenset((
    "llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "glm4", "tekken", "minicpm5",
))  # fmt: skip

# names under which llama.cpp tells capitals only within A to Z
_BY_ASCII = frozenset(("tekken", "gpt-4o", "llama4", "kanana2"))
_PROBES = (
    "it'sok WE'REall o'clock camelCase HTTPServer", "12345678 1234 5", "!abc ?x .y #include <z>",
    "a\n\n  b \r\n\r\nc \n d", "e\u0301lan क्षि", "ёлкаЁлка École", "漢字abcかな한국", "a/b//c\\d",
)  # fmt: skip


def check_cuts(reference: Any, name: str, texts: Sequence[str]) -> tuple[str, str]:
    """Cuts texts by a name of llama.cpp's and by the reference.

    Args:
        reference: a tokenizer with byte-level BPE.
        name: the file's ``tokenizer.ggml.pre``.

    Returns:
        What is wrong, or ""; and a note, or "": texts beyond ASCII that llama.cpp cuts otherwise
        by design, or a name that is not known here.
    """
    if name not in _BY_NAME:
        return "", f"how llama.cpp cuts text under the name {name!r} is not known here"
    every = [*_PROBES, *texts]
    differing = [text for text in every if _by(reference, text) != _by_name(name, text)]
    wrong = [text for text in differing if text.isascii() or name not in _BY_ASCII]
    said = f"the GGUF file's pre-tokenizer {name!r} cuts {len(differing)} of {len(every)} texts"
    if wrong:
        return f"{said} otherwise than the reference, first {wrong[0][:40]!r}", ""
    values = json.loads(reference.backend_tokenizer.to_str())
    whole = bool(values["model"].get("ignore_merges"))
    if whole != (name in _WHOLE_WORDS):
        word = first_word_merged_otherwise(values)
        if word is not None:
            how = "past" if name in _WHOLE_WORDS else "through"
            return f"under {name!r} whole words go {how} the merges, first {word!r}", ""
    if differing:
        return "", f"{said} beyond ASCII otherwise than the reference, first {differing[0][:40]!r}"
    return "", ""


def _by(reference: Any, text: str) -> list[tuple[int, int]]:
    backend = reference.backend_tokenizer
    return [place for _, place in backend.pre_tokenizer.pre_tokenize_str(text)]


def _by_name(name: str, text: str) -> list[tuple[int, int]]:
    from tokenizers import Regex, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in _BY_NAME[name]]
    return [place for _, place in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]
