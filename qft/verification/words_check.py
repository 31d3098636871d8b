"""Tokens, template and stop tokens of an artefact's files, beside the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qft import models
from qft.verification.diagnosis import Finding
from qft.verification.gguf_numbers import check_settings
from qft.verification.gguf_tokens import check_inside, check_same_tables
from qft.verification.stops import check_inside_gguf, check_stops
from qft.verification.subject import Subject
from qft.verification.tokens_check import check_template, check_tokens


def check_words(
    reference: Subject, artefact: Subject, tokenizer: Any, texts: Sequence[str]
) -> tuple[list[Finding], list[str]]:
    """Tokens, template and stop tokens of the artefact's files; what is wrong, and notes.

    Args:
        tokenizer: the reference's.
        texts: held-out ones.
    """
    findings: list[Finding] = []
    notes: list[str] = []
    beside = artefact.gguf is None or "tokenizer.json" in artefact.files()
    if beside:
        other = artefact.tokenizer()
        findings += check_tokens(tokenizer, other, texts, "the artefact's tokenizer")
        findings += check_template(tokenizer, other, "the artefact's tokenizer",
                                   f"{artefact.home.name}/chat_template.jinja")  # fmt: skip
        findings += _outside(tokenizer, other, reference, artefact)
    if artefact.gguf is not None and reference.gguf is not None and not _has_tokenizer(reference):
        findings += check_same_tables(reference, artefact)
    elif artefact.gguf is not None:
        found, notes = check_inside(tokenizer, artefact, texts)
        findings += [*check_settings(reference, artefact), *found]
        findings += check_inside_gguf(reference, artefact, tokenizer)
    if artefact.gguf is None or has_settings(artefact):
        findings += check_stops(reference, artefact, tokenizer, vocabulary(artefact))
    return findings, notes


def _outside(tokenizer: Any, other: Any, reference: Subject, artefact: Subject) -> list[Finding]:
    """Tokens the artefact has no embedding for, where the reference has."""
    highest = max(other.get_vocab().values(), default=0)
    known = max(tokenizer.get_vocab().values(), default=0) < vocabulary(reference)
    if highest < vocabulary(artefact) or not known:
        return []
    return [Finding(
        "tokens",
        f"the tokenizer has id {highest}, the artefact {vocabulary(artefact)} embeddings",
        "put the reference's tokenizer files beside the weights",
    )]  # fmt: skip


def vocabulary(subject: Subject) -> int:
    """Rows of the embeddings."""
    if subject.gguf is not None:
        return len(subject.reader.fields["tokenizer.ggml.tokens"].data)
    config = models.open_config(subject.folder, subject.spec)
    return int(config.get_text_config().vocab_size)


def _has_tokenizer(subject: Subject) -> bool:
    return "tokenizer.json" in subject.files()


def has_settings(artefact: Subject) -> bool:
    """Whether files beside it say how it generates; a lone GGUF file has none."""
    return "generation_config.json" in artefact.files() or bool(artefact.config())
