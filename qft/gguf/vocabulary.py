"""A Hugging Face tokenizer as GGUF metadata, for llama.cpp's kinds of vocabulary.

llama.cpp does not run ``tokenizer.json``. It has one byte-level BPE, told by name which regular
expression cuts the text first, one SentencePiece BPE, told by a score a token which merge comes
first, and one WordPiece. Whatever none can express is refused: a file that babbles is worse than
none. Where llama.cpp knowingly differs, a note says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from qft.gguf.byte_level_vocabulary import byte_level
from qft.gguf.file import Value
from qft.gguf.sentencepiece_vocabulary import sentencepiece
from qft.gguf.special_tokens import special_tokens
from qft.gguf.token_table import Vocabulary, refuse, set_stripping
from qft.gguf.wordpiece_vocabulary import wordpiece

_DEFAULT = "default"  # the template a tokenizer with several uses


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
        raise refuse("it has no fast tokenizer", type(tokenizer).__name__)
    values = json.loads(backend.to_str())
    found = _translated(values, size)
    set_stripping(found, values)
    return found


def _translated(values: Mapping[str, Any], size: int) -> Vocabulary:
    kind = values["model"].get("type")
    if kind == "WordPiece":
        return wordpiece(values, size)
    if kind == "Unigram":
        raise refuse("qft writes no Unigram vocabulary (T5, ALBERT, XLM)", kind)
    if kind != "BPE":
        raise refuse("only BPE and WordPiece vocabularies can be written", kind)
    if values["model"].get("byte_fallback"):
        return sentencepiece(values, size)
    return byte_level(values, size)


def vocabulary_metadata(
    tokenizer: Any,
    config: Mapping[str, Any],
    stops: Iterable[int] = (),
    notes: list[str] | None = None,
) -> dict[str, Value]:
    """Everything a GGUF file says of a tokenizer.

    Args:
        tokenizer: from ``AutoTokenizer``; says which ids are special, what it puts around a text,
            and how a chat is rendered.
        config: the model's config; its ids stand in where the tokenizer names none.
        stops: tokens that must end a generation: those of generation_config.json, and what
            training ended its answers with.
        notes: gets a sentence for each way in which llama.cpp differs from the tokenizer.

    Raises:
        ModelError: llama.cpp cannot express this tokenizer; says what stands in the way.
    """
    vocabulary = read_vocabulary(tokenizer, int(config["vocab_size"]))
    special = special_tokens(tokenizer, vocabulary, config, stops)
    values: dict[str, Value] = {
        "model": vocabulary.model, "pre": vocabulary.pre, "tokens": vocabulary.tokens,
        "token_type": vocabulary.types,
    }  # fmt: skip
    if vocabulary.scores:
        values["scores"] = vocabulary.scores
    if vocabulary.merges:
        values["merges"] = vocabulary.merges
    values |= {**vocabulary.settings, **special}
    if notes is not None:
        notes += vocabulary.notes
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    if vocabulary.name:
        metadata["general.name"] = vocabulary.name
    return metadata | _templates(tokenizer)


def _templates(tokenizer: Any) -> dict[str, Value]:
    """Chat templates; a tokenizer may have several by name."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    if not isinstance(template, Mapping):
        return {}
    others = {str(name): str(text) for name, text in template.items() if name != _DEFAULT}
    found: dict[str, Value] = {
        f"tokenizer.chat_template.{name}": text for name, text in others.items()
    }
    if others:
        found["tokenizer.chat_templates"] = list(others)
    if _DEFAULT in template:
        found["tokenizer.chat_template"] = str(template[_DEFAULT])
    return found
