"""A Hugging Face tokenizer as GGUF metadata, for llama.cpp's two kinds of BPE.

llama.cpp does not run ``tokenizer.json``. It has one byte-level BPE, told by name which regular
expression cuts the text first, and one SentencePiece BPE, told by a score a token which merge comes
first. Whatever neither can express is refused: a file that babbles is worse than none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf

from qft.errors import ModelError
from qft.gguf.file import Value

_SPACE = "▁"
_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # GGUF's names
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
# The regular expression of a `Split` in front of a ByteLevel → llama.cpp's name for it.
_SPLITS = {
    _CONTRACTIONS + _WORDS + r"\p{N}" + _REST: "qwen2",
    _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF stores it.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece BPE).
        pre: llama.cpp's name for the way text is cut first.
        tokens: by id.
        scores: by id; empty for ``gpt2``.
        types: by id, of :class:`gguf.TokenType`.
        merges: ``left right``, the first merged first; empty for ``llama``.
        space_prefix: whether a space is put before the text; None where it is not said.
    """

    model: str
    pre: str
    tokens: list[str]
    scores: list[float]
    types: list[int]
    merges: list[str]
    space_prefix: bool | None


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Translates a transformers tokenizer.

    Args:
        tokenizer: from ``AutoTokenizer``; it must have a fast backend.
        size: rows of the embedding; ids the tokenizer does not use become unused tokens.

    Raises:
        ModelError: llama.cpp cannot express this tokenizer; says what stands in the way.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refuse("it has no fast tokenizer", type(tokenizer).__name__)
    values = json.loads(backend.to_str())
    model = values["model"]
    if model.get("type") != "BPE":
        raise _refuse("only BPE vocabularies can be written", model.get("type"))
    if model.get("byte_fallback"):
        return _sentencepiece(values, size)
    return _byte_level(values, size)


def _refuse(reason: str, found: object) -> ModelError:
    return ModelError(
        f"This tokenizer cannot be expressed in GGUF: {reason}.",
        where="tokenizer.json",
        found=str(found)[:200],
        fix="export to safetensors:bf16 or bnb:nf4, which keep the tokenizer as it is",
    )


def _byte_level(values: Mapping[str, Any], size: int) -> Vocabulary:
    model = values["model"]
    pre = _pre_tokenizer_name(values)
    if model.get("ignore_merges") and pre != "llama-bpe":
        raise _refuse("whole words bypass its merges", "ignore_merges: true")
    tokens, types = _tokens(values, size)
    return Vocabulary("gpt2", pre, tokens, [], types, _merges(model), None)


def _pre_tokenizer_name(values: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer, from what it does, not from the model's name."""
    normalizer = values.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise _refuse("llama.cpp does not normalise byte-level text", normalizer.get("type"))
    top = values.get("pre_tokenizer") or {}
    steps = top.get("pretokenizers", []) if top.get("type") == "Sequence" else [top]
    kinds = [step.get("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel":
        raise _refuse("its pre-tokenizer is unknown to llama.cpp", top)
    if steps[-1].get("add_prefix_space"):
        raise _refuse("it puts a space before byte-level text", "add_prefix_space: true")
    uses_regex = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and uses_regex:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and uses_regex and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not uses_regex:
        name = _SPLITS.get(_canonical(steps[0].get("pattern", {}).get("Regex", "")))
        if name and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
            return name
    raise _refuse("its pre-tokenizer is unknown to llama.cpp", steps)


def _canonical(pattern: str) -> str:
    """One spelling for the two in use of case-insensitive contractions."""
    spelled = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    return pattern.replace(spelled, _CONTRACTIONS)


def _merges(model: Mapping[str, Any]) -> list[str]:
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]


def _sentencepiece(values: Mapping[str, Any], size: int) -> Vocabulary:
    """Scores that make llama.cpp merge in the order of the merge list."""
    model = values["model"]
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair)
             for pair in model["merges"]]  # fmt: skip
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    _require_closed(model["vocab"], set(pairs))
    tokens, types = _tokens(values, size)
    for number, token in enumerate(tokens):
        if token == model.get("unk_token"):
            types[number] = int(gguf.TokenType.UNKNOWN)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[number] = int(gguf.TokenType.BYTE)
    last = float(len(pairs))  # single characters are never merged into; any score does
    scores = [-float(ranks.get(token, last)) for token in tokens]
    return Vocabulary("llama", "default", tokens, scores, types, [], _space_prefix(values))


def _require_closed(vocab: Mapping[str, int], pairs: set[tuple[str, ...]]) -> None:
    """llama.cpp merges any two tokens whose union is one; the merge list must allow the same."""
    for token in vocab:
        for cut in range(1, len(token)):
            halves = (token[:cut], token[cut:])
            if halves[0] in vocab and halves[1] in vocab and halves not in pairs:
                if token.startswith("<") and token.endswith(">"):
                    break  # a byte or control token is never merged into
                raise _refuse("its merges are not those of a SentencePiece vocabulary", halves)


def _space_prefix(values: Mapping[str, Any]) -> bool:
    """Whether text gets a space in front; refuses normalisers that do more than spaces."""
    top = values.get("normalizer") or {}
    steps = top.get("normalizers", []) if top.get("type") == "Sequence" else [top] if top else []
    prefix = False
    for step in steps:
        if step.get("type") == "Prepend" and step.get("prepend") == _SPACE:
            prefix = True
        elif not (step.get("type") == "Replace" and step.get("content") == _SPACE):
            raise _refuse("its normaliser is unknown to llama.cpp", step)
    before = values.get("pre_tokenizer") or {}
    if before and before.get("type") != "Metaspace":
        raise _refuse("its pre-tokenizer is unknown to llama.cpp", before)
    return prefix or before.get("prepend_scheme") in ("first", "always")


def _tokens(values: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by id, up to the embedding's rows."""
    by_id = {number: token for token, number in values["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in values.get("added_tokens", [])}
    by_id |= {number: entry["content"] for number, entry in added.items()}
    if by_id and max(by_id) >= size:
        raise ModelError(
            "The tokenizer has ids that the model has no embedding for.",
            where="tokenizer.json",
            found=f"id {max(by_id)} ({by_id[max(by_id)]!r}), {size} rows",
            fix="use the tokenizer that belongs to this model",
        )
    tokens: list[str] = []
    types: list[int] = []
    for number in range(size):
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        kind = gguf.TokenType.NORMAL if number in by_id else gguf.TokenType.UNUSED
        if number in added:
            special = added[number].get("special")
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        types.append(int(kind))
    return tokens, types


def vocabulary_metadata(tokenizer: Any, config: Mapping[str, Any]) -> dict[str, Value]:
    """Everything a GGUF file says of a tokenizer.

    Args:
        tokenizer: from ``AutoTokenizer``; says which ids are special, what it puts around a text,
            and how a chat is rendered.
        config: the model's config; its ids stand in where the tokenizer names none.

    Raises:
        ModelError: llama.cpp cannot express this tokenizer; says what stands in the way.
    """
    vocabulary = read_vocabulary(tokenizer, int(config["vocab_size"]))
    values: dict[str, Value] = {
        "model": vocabulary.model, "pre": vocabulary.pre, "tokens": vocabulary.tokens,
        "token_type": vocabulary.types,
    }  # fmt: skip
    if vocabulary.scores:
        values["scores"] = vocabulary.scores
    if vocabulary.merges:
        values["merges"] = vocabulary.merges
    if vocabulary.space_prefix is not None:
        values["add_space_prefix"] = vocabulary.space_prefix
    ids = {kind: _special_id(kind, tokenizer, config) for kind in _IDS}
    for kind, number in ids.items():
        if number is not None and 0 <= number < len(vocabulary.tokens):
            values[f"{_IDS[kind]}_token_id"] = number
    probe = list(tokenizer("a")["input_ids"])
    values["add_bos_token"] = ids["bos"] is not None and probe[:1] == [ids["bos"]]
    values["add_eos_token"] = ids["eos"] is not None and probe[-1:] == [ids["eos"]]
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        metadata["tokenizer.chat_template"] = template
    return metadata


def _special_id(kind: str, tokenizer: Any, config: Mapping[str, Any]) -> int | None:
    number = getattr(tokenizer, f"{kind}_token_id", None)
    if number is None:
        number = config.get(f"{kind}_token_id")
    if isinstance(number, list):
        number = number[0] if number else None
    return number if type(number) is int else None
