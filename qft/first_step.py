"""After the first optimizer step: did what should train get a gradient, and nothing else change?

A frozen tensor that moves, or a trained one that the loss does not reach, is a silent failure that
shows in no loss curve. The fingerprints of the frozen tensors read a few values of each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from qft.errors import QftError

_SAMPLED = 256  # values of each frozen tensor that are compared


class FirstStepCheck(TrainerCallback):
    """Looks once, after the first step of a training that begins at its beginning."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._frozen: dict[str, Tensor] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remembers the frozen tensors; a resumed run was looked at when it began."""
        if state.global_step == 0:
            self._frozen = {name: _sample(tensor) for name, tensor in _frozen(self._model)}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compares; called before the gradients are dropped.

        Raises:
            QftError: names the tensors.
        """
        if self._frozen is None:
            return
        changed = [
            name
            for name, tensor in _frozen(self._model)
            if name in self._frozen and not torch.equal(_sample(tensor), self._frozen[name])
        ]
        self._frozen = None
        if changed:
            raise _error("Tensors that should be frozen changed in the first step.", changed)
        unreached = without_gradient(self._model)
        if unreached:
            raise _error("Tensors that should train got no gradient: no loss reaches them.",
                         unreached)  # fmt: skip


def without_gradient(model: nn.Module) -> list[str]:
    """Trained tensors without a gradient, but for experts of whose kind another one got some.

    A mixture's expert to which no token was sent has none in this step, and may in the next.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    reached = {_kind(name) for name, p in trained if p.grad is not None}
    return [
        name
        for name, p in trained
        if p.grad is None and not ("expert" in name and _kind(name) in reached)
    ]


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _frozen(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p.data) for name, p in model.named_parameters() if not p.requires_grad]


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()
    stride = max(1, flat.numel() // _SAMPLED)
    return flat[::stride].clone()


def _error(what: str, names: Sequence[str]) -> QftError:
    shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
    return QftError(what, where="after the first optimizer step",
                    found=f"{len(names)}: {shown}",
                    fix="a fault of the strategy or of the model's code; the run was stopped "
                    "before it could waste your time")  # fmt: skip
