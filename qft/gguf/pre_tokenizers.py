r"""How byte-level text is cut before any merge: tokenizer.json's steps → llama.cpp's name for them.

llama.cpp knows a fixed list of regular expressions by name. A tokenizer is recognised by the
expressions it cuts with, in their order, never by the name of a model. A test runs
every row of the table in llama.cpp beside the tokenizer it is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qft.gguf.token_table import refuse

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPELLED = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"  # the same
_BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _SIGNS + _BLANKS
QWEN2 = _CONTRACTIONS + _WORDS + r"\p{N}" + _SIGNS + _BLANKS
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _BLANKS
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str, numbers: str) -> str:
    """Words cut where a capital follows a small letter."""
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{before}{_UPPER}*{_LOWER}+{ending}|{before}{_UPPER}+{_LOWER}*{ending}|{numbers}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _BLANKS
    )


_TEKKEN = _cased("", r"\p{N}")
_GPT4O = _cased(_CONTRACTIONS + "?", r"\p{N}{1,3}")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+"
    "|\\s+(?!\\S)|\\s+",
)
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+", r"\p{N}")
_CASE = "words with capitals beyond A to Z inside"


@dataclass(frozen=True)
class PreTokenizer:
    """One of llama.cpp's ways to cut.

    Attributes:
        name: llama.cpp's.
        cuts: the tokenizer's regular expressions, in their order.
        whole_words: whether a word that is a token is taken as it is, without merging
            (``ignore_merges``); llama.cpp knows that by the name alone.
        apart: the texts that llama.cpp cuts otherwise; empty where there are none.
    """

    name: str
    cuts: tuple[str, ...]
    whole_words: bool = False
    apart: str = ""


KNOWN = (
    PreTokenizer("gpt-2", (GPT2,)),
    PreTokenizer("smollm", (r"\p{N}", GPT2)),
    PreTokenizer("llama-bpe", (LLAMA3,), whole_words=True),
    PreTokenizer("dbrx", (LLAMA3,)),
    PreTokenizer("qwen2", (QWEN2,)),
    PreTokenizer("qwen35", (_QWEN35,)),
    PreTokenizer("deepseek-v3", _DEEPSEEK3),
    PreTokenizer("deepseek-coder", _DEEPSEEK_CODER),
    PreTokenizer("tekken", (_TEKKEN,), whole_words=True, apart=_CASE),
    PreTokenizer("gpt-4o", (_GPT4O,), apart=_CASE),
    PreTokenizer("ufakzeka", (QWEN2.removeprefix(_CONTRACTIONS + "|"),)),
    PreTokenizer("seed-coder", (
        _CONTRACTIONS + _WORDS + r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + _BLANKS,
    )),
    PreTokenizer("minicpm5", (
        r"\p{N}{1,3}", _CONTRACTIONS + _WORDS + r"\p{N}+" + _SIGNS + _BLANKS,
    ), whole_words=True),
)  # fmt: skip


def candidates(values: Mapping[str, Any]) -> list[PreTokenizer]:
    """llama.cpp's ways to cut that are the tokenizer's, at least one.

    Args:
        values: what tokenizer.json holds.

    Raises:
        ModelError: llama.cpp has none.
    """
    cuts = cuts_of(values)
    found = [known for known in KNOWN if known.cuts == cuts]
    if not found:
        raise refuse("its pre-tokenizer is unknown to llama.cpp", cuts)
    return found


def cuts_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The regular expressions that tokenizer.json cuts with, in one spelling.

    Raises:
        ModelError: it does something else than to cut by expressions.
    """
    top = values.get("pre_tokenizer") or {}
    steps = top.get("pretokenizers", []) if top.get("type") == "Sequence" else [top]
    if not steps or steps[-1].get("type") != "ByteLevel":
        raise refuse("its pre-tokenizer is unknown to llama.cpp", top)
    if any(step.get("add_prefix_space") for step in steps if step.get("type") == "ByteLevel"):
        raise refuse("it puts a space before byte-level text", "add_prefix_space: true")
    return tuple(cut for step in steps for cut in _cuts(step))


def _cuts(step: Mapping[str, Any]) -> list[str]:
    kind = step.get("type")
    if kind == "ByteLevel":
        return [GPT2] if step.get("use_regex", True) else []
    if kind == "Digits":
        return [r"\p{N}" if step.get("individual_digits") else r"\p{N}+"]
    pattern = step.get("pattern", {}).get("Regex")
    isolated = (step.get("behavior"), bool(step.get("invert"))) == ("Isolated", False)
    # "Removed" and inverted keeps the matches alone: the same where every text matches throughout
    kept = (step.get("behavior"), bool(step.get("invert"))) == ("Removed", True)
    if kind == "Split" and pattern and (isolated or (kept and pattern.endswith(r"|\s+"))):
        return [pattern.replace(_SPELLED, _CONTRACTIONS)]
    raise refuse("its pre-tokenizer is unknown to llama.cpp", step)
