"""Opens whatever a user can name: a base model, a run, an adapter, a merged or exported model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from qft import models
from qft.adapter_folder import AdapterFolder, open_adapter_model
from qft.verification.read_back import read_back
from qft.verification.subject import locate


@dataclass(frozen=True)
class Opened:
    """A model ready to evaluate or generate, in eval mode.

    Attributes:
        task: what it was trained for; ``text`` for a base model that does not say.
        labels: class names (classify) or tags (token).
        adapter: where it is a run or an adapter.
        labels_are: see :class:`qft.models.ModelSpec`.
    """

    model: nn.Module
    tokenizer: Any
    task: str
    labels: tuple[str, ...] | None
    adapter: AdapterFolder | None
    labels_are: str = "one"


def open_any(
    source: str,
    *,
    base: str | None = None,
    strategy: str | None = None,
    task: str | None = None,
    trust: models.Trust | None = None,
    **spec_changes: Any,
) -> Opened:
    """Opens ``source`` with the right tokenizer.

    Args:
        source: folder of a run, checkpoint, adapter, model, GGUF or ONNX export; a .gguf or .onnx
            file; a hub id.
        base: for an adapter, where its base is.
        task: overrides what the model says of itself.
        spec_changes: ``quantize``, ``dtype``, ``device`` of :class:`qft.models.ModelSpec`.

    Raises:
        QftError: it cannot be opened; says why.
    """
    trust = trust or models.Trust()
    subject = locate(source, base=base, strategy=strategy, task=task, trust=trust)
    if subject.adapter is not None:
        return _open_adapter(subject.adapter, trust, spec_changes)
    spec = subject.spec
    if subject.gguf is not None:
        tokenizer = models.open_tokenizer(subject.folder)
        return Opened(read_back(subject.gguf), tokenizer, spec.task, spec.labels, None,
                      spec.labels_are)  # fmt: skip
    if subject.onnx is not None:
        model = read_back(subject.onnx, task=spec.task)
        tokenizer = models.open_tokenizer(subject.folder)
        return Opened(model, tokenizer, spec.task, spec.labels, None, spec.labels_are)
    # the classes are those of its own config
    plain = models.ModelSpec(source=source, task=spec.task, trust=trust, **spec_changes)
    model = models.open_model(subject.folder, plain)
    tokenizer = models.open_tokenizer(subject.folder, trust)
    return Opened(model, tokenizer, spec.task, spec.labels, None, spec.labels_are)


def _open_adapter(
    found: AdapterFolder, trust: models.Trust, spec_changes: dict[str, Any]
) -> Opened:
    spec = replace(found.spec(trust=trust), **spec_changes)
    model = open_adapter_model(found, spec)
    tokenizer = models.open_tokenizer(found.base, trust)
    return Opened(model, tokenizer, found.task, spec.labels, found, spec.labels_are)
