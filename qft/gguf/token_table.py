"""What every kind of vocabulary has: a text and a type by id, and a reason to refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf

from qft.errors import ModelError

SPACE = "▁"  # how SentencePiece, and llama.cpp with it, writes a blank


@dataclass
class Vocabulary:
    """A tokenizer as GGUF stores it.

    Attributes:
        model: ``gpt2`` (byte-level BPE), ``llama`` (SentencePiece BPE) or ``bert`` (WordPiece).
        pre: llama.cpp's name for the way text is cut first.
        tokens: by id, each one once.
        types: by id, of :class:`gguf.TokenType`.
        scores: by id; empty for ``gpt2``.
        merges: ``left right``, the first merged first; empty but for ``gpt2``.
        settings: what else ``tokenizer.ggml`` says, by key.
        notes: where llama.cpp does otherwise than the tokenizer, a sentence each.
        name: what ``general.name`` must be for llama.cpp to do as the tokenizer; mostly empty.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    name: str = ""

    def retype(self, kind: gguf.TokenType, number: int) -> None:
        """Gives one id another type."""
        self.types[number] = int(kind)


def refuse(reason: str, found: object) -> ModelError:
    """The error for a tokenizer that llama.cpp cannot run."""
    return ModelError(
        f"This tokenizer cannot be expressed in GGUF: {reason}.",
        where="tokenizer.json",
        found=str(found)[:200],
        fix="export to safetensors:bf16 or bnb:nf4, which keep the tokenizer as it is",
    )


def token_table(values: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by id, up to the embedding's rows.

    Args:
        values: what tokenizer.json holds.
        size: rows of the embedding; ids the tokenizer does not use become unused tokens.

    Raises:
        ModelError: an id has no row, or two ids the same text: llama.cpp stops at such a file.
    """
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
    taken = set(by_id.values())
    tokens: list[str] = []
    types: list[int] = []
    for number in range(size):
        tokens.append(by_id.get(number) or _filler(number, taken))
        kind = gguf.TokenType.NORMAL if number in by_id else gguf.TokenType.UNUSED
        if number in added:
            special = added[number].get("special")
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        types.append(int(kind))
    require_distinct(tokens)
    return tokens, types


def require_distinct(tokens: list[str]) -> None:
    """Raises ModelError where two ids have the same text."""
    if len(set(tokens)) == len(tokens):
        return
    seen: set[str] = set()
    for number, token in enumerate(tokens):
        if token in seen:
            raise refuse("two of its ids are the same text", f"{token!r}, id {number}")
        seen.add(token)


def _filler(number: int, taken: set[str]) -> str:
    """A name for an id that the tokenizer does not use."""
    name = f"[PAD{number}]"
    while name in taken:
        name = f"[{name}]"
    return name


_NOT_GREEDY = frozenset(("<unk>", "<s>", "<|endoftext|>"))
_GREEDY_NAME = "phi-3"


def set_stripping(vocabulary: Vocabulary, values: Mapping[str, Any]) -> None:
    """Added tokens that swallow blanks beside them: a GGUF file cannot say so of one.

    llama.cpp lets every special token but three swallow the blanks after it in a model of one
    name, which a file that behaves so is given; for others there is a note.
    """
    added = {entry["content"]: entry for entry in values.get("added_tokens", [])}
    greedy = [
        text
        for text, entry in added.items()
        if entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word")
    ]
    if not greedy:
        return
    to_the_right = all(
        (bool(entry.get("rstrip")), bool(entry.get("lstrip")), bool(entry.get("single_word")))
        == (text not in _NOT_GREEDY, False, False)
        for text, entry in added.items()
    )
    if to_the_right and {*_NOT_GREEDY, "</s>"} <= added.keys():
        vocabulary.name = _GREEDY_NAME
        return
    vocabulary.notes.append(
        f"{len(greedy)} token(s) such as {greedy[0]!r} swallow the blanks beside them in the "
        "tokenizer; llama.cpp keeps those blanks."
    )
