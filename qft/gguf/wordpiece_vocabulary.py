"""WordPiece (BERT and its kin): llama.cpp's ``bert``.

llama.cpp writes a word's first piece with a blank's sign before it and the others bare, where
WordPiece writes the first bare and the others with ``##``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf

from qft.gguf.token_table import SPACE, Vocabulary, refuse, require_distinct, token_table

_CONTINUES = "##"
_ACCENTS = (
    "Where accents are stripped, llama.cpp also strips the vowel signs of Indian scripts and takes "
    "Korean syllables apart; the tokenizer keeps both."
)


def wordpiece(values: Mapping[str, Any], size: int) -> Vocabulary:
    """Translates a WordPiece vocabulary.

    Args:
        values: what tokenizer.json holds.
        size: rows of the embedding.

    Raises:
        ModelError: llama.cpp cannot express it.
    """
    model = values["model"]
    if model.get("continuing_subword_prefix", _CONTINUES) != _CONTINUES:
        raise refuse("its pieces are not marked with ##", model["continuing_subword_prefix"])
    normalizer = values.get("normalizer") or {}
    if normalizer.get("type") != "BertNormalizer" or not (
        normalizer.get("clean_text") and normalizer.get("handle_chinese_chars")
    ):
        raise refuse("llama.cpp cleans WordPiece text as BERT does", normalizer or "no normaliser")
    before = (values.get("pre_tokenizer") or {}).get("type")
    if before != "BertPreTokenizer":
        raise refuse("llama.cpp cuts WordPiece text as BERT does", before)
    plain, types = token_table(values, size)
    tokens = [
        _as_llama_writes(token) if kind == gguf.TokenType.NORMAL else token
        for token, kind in zip(plain, types, strict=True)
    ]
    require_distinct(tokens)
    lowercase = bool(normalizer.get("lowercase", True))
    accents = normalizer.get("strip_accents")
    stripped = lowercase if accents is None else bool(accents)
    found = Vocabulary("bert", "default", tokens, types, settings={
        "normalizer.lowercase": lowercase,
        "normalizer.strip_accents": stripped,
    }, notes=[_ACCENTS] if stripped else [])  # fmt: skip
    if model.get("unk_token") in plain:
        found.retype(gguf.TokenType.UNKNOWN, plain.index(model["unk_token"]))
    return found


def _as_llama_writes(token: str) -> str:
    if token.startswith("[") and token.endswith("]"):
        return token  # reserved ones
    return token.removeprefix(_CONTINUES) if token.startswith(_CONTINUES) else SPACE + token
