"""SentencePiece BPE (Llama 2, Mistral, Phi-3, Gemma): llama.cpp's ``llama``.

llama.cpp knows no list of merges. It joins any two neighbours whose union is a token, the highest
score first, the leftmost of equals. Scores that fall with the rank of a merge give the order of
the list, if every such union is in the list: that is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf

from qft.gguf.token_table import SPACE, Vocabulary, refuse, token_table

_ADDED = int(gguf.TokenType.USER_DEFINED)
_LEADING = (
    "llama.cpp puts a blank before every text, also before one that begins with a blank or that "
    "follows a special token; the tokenizer puts it at the very start alone."
)


def sentencepiece(values: Mapping[str, Any], size: int) -> Vocabulary:
    """Translates a BPE with byte fallback.

    Args:
        values: what tokenizer.json holds.
        size: rows of the embedding.

    Raises:
        ModelError: llama.cpp cannot express it.
    """
    model = values["model"]
    if model.get("ignore_merges"):
        raise refuse("whole words bypass its merges", "ignore_merges: true")
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in model["vocab"]]
    if missing:
        raise refuse("it has no token for every byte", f"no <0x{missing[0]:02X}>")
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair)
             for pair in model["merges"]]  # fmt: skip
    added = {entry["content"] for entry in values.get("added_tokens", [])}
    _require_closed(model["vocab"], set(pairs), added)
    prefix, notes = _space_prefix(values)
    tokens, types = token_table(values, size)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    last = float(len(pairs))  # single characters are never merged into; any score does
    found = Vocabulary("llama", "default", tokens, types, [-float(ranks.get(t, last))
                       for t in tokens], settings={"add_space_prefix": prefix},
                       notes=notes)  # fmt: skip
    _set_types(found, model, ranks)
    return found


def _set_types(found: Vocabulary, model: Mapping[str, Any], ranks: Mapping[str, int]) -> None:
    for number, token in enumerate(found.tokens):
        if token == model.get("unk_token"):
            found.retype(gguf.TokenType.UNKNOWN, number)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            found.retype(gguf.TokenType.BYTE, number)
        elif SPACE in token and token in ranks and found.types[number] == _ADDED:
            # Gemma's runs of blanks: the merges give them anyway, and as an added token llama.cpp
            # would print the sign instead of the blanks
            found.retype(gguf.TokenType.NORMAL, number)


def _require_closed(vocab: Mapping[str, int], pairs: set[tuple[str, ...]], added: set[str]) -> None:
    """llama.cpp merges any two tokens whose union is one; the merge list must allow the same."""
    for token in vocab:
        if token in added or (token.startswith("<") and token.endswith(">")):
            continue  # found before any merge; a byte or control token, which text never becomes
        for cut in range(1, len(token)):
            halves = (token[:cut], token[cut:])
            if halves not in pairs and halves[0] in vocab and halves[1] in vocab:
                raise refuse("its merges are not those of a SentencePiece vocabulary", halves)


def _space_prefix(values: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether text gets a blank in front, and notes; refuses what does more than that."""
    top = values.get("normalizer") or {}
    steps = top.get("normalizers", []) if top.get("type") == "Sequence" else [top] if top else []
    prefix = escaped = False
    for step in steps:
        if step.get("type") == "Prepend" and step.get("prepend") == SPACE and not escaped:
            prefix = True
        elif (step.get("type"), step.get("content")) == ("Replace", SPACE) and (
            step.get("pattern") == {"String": " "}
        ):
            escaped = True
        else:
            raise refuse("its normaliser is unknown to llama.cpp", step)
    before = values.get("pre_tokenizer") or {}
    kind = before.get("type")
    if kind == "Metaspace" and before.get("replacement", SPACE) == SPACE:
        if before.get("split", True):
            _require_words(values["model"]["vocab"])
        if before.get("prepend_scheme", "always") != "never" and not prefix:
            return True, [_LEADING]
        return prefix, []
    if before and not (kind == "Split" and escaped and before.get("pattern") == {"String": " "}):
        raise refuse("its pre-tokenizer is unknown to llama.cpp", before)
    if not escaped:
        raise refuse("it does not write blanks as SentencePiece does", top or before)
    return prefix, []


def _require_words(vocab: Mapping[str, int]) -> None:
    """Cut at every blank, no token may go over one: llama.cpp does not cut."""
    for token in vocab:
        if SPACE in token[1:]:
            raise refuse("it cuts words at blanks, yet has tokens over them", token)
