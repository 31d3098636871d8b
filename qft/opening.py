"""Opens whatever a user can name: a base model, a run, an adapter, a merged or exported model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from qft import models
from qft.adapter_folder import AdapterFolder, adapter_in, locate_adapter, open_adapter_model
from qft.errors import RecipeError
from qft.verification.read_back import gguf_file, read_back


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
        source: folder of a run, checkpoint, adapter, model or GGUF export; a .gguf file; a hub id.
        base: for an adapter, where its base is.
        task: overrides what the model says of itself.
        spec_changes: ``quantize``, ``dtype``, ``device`` of :class:`qft.models.ModelSpec`.

    Raises:
        QftError: it cannot be opened; says why.
    """
    trust = trust or models.Trust()
    path = Path(source).expanduser()
    if (path.is_dir() and adapter_in(path) is not None) or (path / "checkpoints").is_dir():
        found = locate_adapter(path, base=base, strategy=strategy, trust=trust)
        if task not in (None, found.task):
            raise RecipeError("The adapter was trained for another task.", where="--task",
                              found=f"{task}; it was trained for {found.task}")  # fmt: skip
        return _open_adapter(found, trust, spec_changes)
    if gguf := gguf_file(path):
        tokenizer = models.open_tokenizer(gguf.parent)
        config_file = gguf.parent / "config.json"
        config = models.read_config(gguf.parent) if config_file.is_file() else {}
        return Opened(read_back(gguf), tokenizer, task or models.task_of(config), None, None)
    folder = models.resolve_folder(source, trust)
    config = models.read_config(folder)
    named = task or models.task_of(config)
    if named not in models.AUTO_CLASSES:
        raise RecipeError("No such task.", where="--task", found=named,
                          fix=", ".join(models.AUTO_CLASSES))  # fmt: skip
    spec = models.ModelSpec(source=source, task=named, trust=trust, **spec_changes)
    model = models.open_model(folder, spec)
    labels, kind = models.labels_in(config) if named in ("classify", "token") else (None, "one")
    tokenizer = models.open_tokenizer(folder, trust)
    return Opened(model, tokenizer, spec.task, labels, None, kind)


def _open_adapter(
    found: AdapterFolder, trust: models.Trust, spec_changes: dict[str, Any]
) -> Opened:
    spec = replace(found.spec(trust=trust), **spec_changes)
    model = open_adapter_model(found, spec)
    tokenizer = models.open_tokenizer(found.base, trust)
    return Opened(model, tokenizer, found.task, spec.labels, found, spec.labels_are)
