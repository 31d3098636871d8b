"""Opens whatever a user can name: a base model, a run, an adapter, a merged or exported model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from qft import models
from qft.adapter_folder import AdapterFolder, open_adapter_model
from qft.errors import RecipeError
from qft.gguf_model import open_gguf
from qft.verification.read_back import read_back
from qft.verification.subject import Subject, locate


@dataclass(frozen=True)
class Opened:
    """A model ready to evaluate or generate, in eval mode.

    Attributes:
        task: what it was trained for; ``text`` for a base model that does not say.
        labels: class names (classify) or tags (token).
        adapter: where it is a run or an adapter.
        labels_are: see :class:`qft.models.ModelSpec`.
        note: how the weights are held, where that is not as they are stored.
    """

    model: nn.Module
    tokenizer: Any
    task: str
    labels: tuple[str, ...] | None
    adapter: AdapterFolder | None
    labels_are: str = "one"
    note: str | None = None


def open_any(
    source: str,
    *,
    base: str | None = None,
    strategy: str | None = None,
    task: str | None = None,
    trust: models.Trust | None = None,
    to_write: bool = False,
    **spec_changes: Any,
) -> Opened:
    """Opens ``source`` with the right tokenizer.

    Args:
        source: folder of a run, checkpoint, adapter, model, GGUF or ONNX export; a .gguf or .onnx
            file; a hub id.
        base: for an adapter, where its base is.
        task: overrides what the model says of itself.
        to_write: refuse what writes no text, before it is opened.
        spec_changes: ``quantize``, ``dtype``, ``device`` of :class:`qft.models.ModelSpec`.

    Raises:
        QftError: it cannot be opened; says why.
    """
    trust = trust or models.Trust()
    subject = locate(source, base=base, strategy=strategy, task=task, trust=trust)
    if to_write:
        _require_writer(subject, task)
    if subject.adapter is not None:
        return _open_adapter(subject.adapter, trust, spec_changes)
    spec = subject.spec
    if subject.gguf is not None:
        model, note = open_gguf(subject, **spec_changes)
        return Opened(model, subject.tokenizer(), spec.task, spec.labels, None,
                      spec.labels_are, note)  # fmt: skip
    if subject.onnx is not None:
        model = read_back(subject.onnx, task=spec.task)
        tokenizer = models.open_tokenizer(subject.folder)
        return Opened(model, tokenizer, spec.task, spec.labels, None, spec.labels_are)
    # the classes are those of its own config
    plain = models.ModelSpec(source=source, task=spec.task, trust=trust, **spec_changes)
    model = models.open_model(subject.folder, plain)
    tokenizer = models.open_tokenizer(subject.folder, trust)
    return Opened(model, tokenizer, spec.task, spec.labels, None, spec.labels_are)


def _require_writer(subject: Subject, asked: str | None) -> None:
    """Raises RecipeError where a model writes no text."""
    task, config = subject.spec.task, subject.config()
    if subject.adapter is None and asked is None:  # an encoder may not say what it is for
        task = models.task_to_run(config)
    if task in ("classify", "extract", "token", "embed"):
        named = str((config.get("architectures") or [""])[0])
        raise RecipeError("This model reads text and writes none.", where=subject.source,
                          found=f"{named or 'a model'} for the task {task}",
                          fix="qft eval MODEL --data FILE")  # fmt: skip


def _open_adapter(
    found: AdapterFolder, trust: models.Trust, spec_changes: dict[str, Any]
) -> Opened:
    spec = replace(found.spec(trust=trust), **spec_changes)
    model = open_adapter_model(found, spec)
    tokenizer = models.open_tokenizer(found.base, trust)
    return Opened(model, tokenizer, found.task, spec.labels, found, spec.labels_are)
