"""Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM): llama.cpp's ``gpt2``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from qft.gguf.pre_tokenizers import PreTokenizer, candidates
from qft.gguf.token_table import Vocabulary, refuse, token_table

NO_MERGE = "▁ ▁"  # of two signs that no byte is written as: llama.cpp wants one merge at least


def byte_level(values: Mapping[str, Any], size: int) -> Vocabulary:
    """Translates a byte-level BPE.

    Args:
        values: what tokenizer.json holds.
        size: rows of the embedding.

    Raises:
        ModelError: llama.cpp cannot express it.
    """
    model = values["model"]
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise refuse(f"it has a {key}", model[key])
    if model.get("unk_token") and not _alphabet() <= set(model["vocab"]):
        raise refuse("llama.cpp leaves out bytes that are no token", "no token for every byte")
    normalizer = values.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise refuse("llama.cpp does not normalise byte-level text", normalizer.get("type"))
    chosen = _chosen(candidates(values), values)
    tokens, types = token_table(values, size)
    notes = []
    if normalizer is not None:
        notes.append("The tokenizer composes letters and accents (NFC); llama.cpp takes the text "
                     "as it is: give it composed text.")  # fmt: skip
    if chosen.apart:
        notes.append(f"llama.cpp cuts {chosen.apart} otherwise than the tokenizer.")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return Vocabulary("gpt2", chosen.name, tokens, types, merges=merges or [NO_MERGE],
                      notes=notes)  # fmt: skip


def _chosen(found: list[PreTokenizer], values: Mapping[str, Any]) -> PreTokenizer:
    """The one that takes whole words as the tokenizer does, or one where it makes no difference."""
    wanted = bool(values["model"].get("ignore_merges"))
    for known in found:
        if known.whole_words == wanted:
            return known
    apart = first_word_merged_otherwise(values)
    if apart is None:
        return found[0]
    how = "bypass" if wanted else "go through"
    raise refuse(f"whole words {how} its merges, and llama.cpp has no such name for the way it "
                 "cuts text", f"ignore_merges: {wanted}, first {apart!r}")  # fmt: skip


def first_word_merged_otherwise(values: Mapping[str, Any]) -> str | None:
    """A token that its own merges do not give again; None where all do."""
    from tokenizers import Tokenizer

    merging = {**values["model"], "ignore_merges": False}
    model = Tokenizer.from_str(json.dumps({**values, "model": merging})).model
    added = {entry["content"] for entry in values.get("added_tokens", [])}
    for token in values["model"]["vocab"]:
        if token not in added and [piece.value for piece in model.tokenize(token)] != [token]:
            return str(token)
    return None


@cache
def _alphabet() -> frozenset[str]:
    from tokenizers import pre_tokenizers

    return frozenset(pre_tokenizers.ByteLevel.alphabet())
