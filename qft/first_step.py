"""After the first optimizer step: did what should train get a gradient, and nothing else change?

A frozen tensor that moves, or a trained one that the loss does not reach, is a silent failure that
shows in no loss curve. So is a gradient that is there and exactly zero: of every tensor, it is an
error; of some, it may be their beginning (LoRA's A while B is zero), so they are looked at again
after the second step, and named in a note if theirs is still zero. The fingerprints of the frozen
tensors read a few values of each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from qft.errors import QftError
from qft.lean.trunk import has_left
from qft.progress import QUIET, Reporter

_SAMPLED = 256  # values of each frozen tensor that are compared


class FirstStepCheck(TrainerCallback):
    """Looks after the first two steps of a training that begins at its beginning."""

    def __init__(self, model: nn.Module, reporter: Reporter = QUIET) -> None:
        self._model = model
        self._reporter = reporter
        self._frozen: dict[str, Tensor] | None = None
        self._zero: list[str] = []  # names to look at again after the second step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remembers the frozen tensors; a resumed run was looked at when it began."""
        if state.global_step == 0:
            self._frozen = {name: _sample(tensor) for name, tensor in _frozen(self._model)}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compares; called before the gradients are dropped.

        Raises:
            QftError: names the tensors.
        """
        if self._frozen is not None:
            self._look_at_frozen(self._frozen)
            self._frozen = None
            self._zero = self._look_at_trained()
        elif self._zero:
            again = set(self._zero) & set(zero_gradients(self._model))
            self._zero = [name for name in self._zero if name in again]
            if self._zero:
                self._reporter.say(
                    "note: trained tensors whose gradient was exactly zero in the first two steps, "
                    f"{_shown(self._zero)}; unless they are meant to wait, no loss reaches them"
                )
            self._zero = []

    def _look_at_frozen(self, before: dict[str, Tensor]) -> None:
        changed = [
            name
            for name, tensor in _frozen(self._model)
            if name in before and not torch.equal(_sample(tensor), before[name])
        ]
        if changed:
            raise _error("Tensors that should be frozen changed in the first step.", changed)

    def _look_at_trained(self) -> list[str]:
        unreached = without_gradient(self._model)
        if unreached:
            raise _error("Tensors that should train got no gradient: no loss reaches them.",
                         unreached)  # fmt: skip
        trained = [name for name, p in self._model.named_parameters() if p.grad is not None]
        zero = zero_gradients(self._model)
        if trained and not any(_has_gradient(p) for p in self._model.parameters()):
            raise _error("Every gradient is exactly zero: nothing would be learned.", trained)
        return zero


def without_gradient(model: nn.Module) -> list[str]:
    """Trained tensors without a gradient, but for experts of whose kind another one got some."""
    return _unreached(model, lambda parameter: parameter.grad is not None)


def zero_gradients(model: nn.Module) -> list[str]:
    """Trained tensors whose gradient is zero everywhere, but for experts as above."""
    return [
        name
        for name in _unreached(model, _has_gradient)
        if model.get_parameter(name).grad is not None
    ]


def _unreached(model: nn.Module, is_reached: Callable[[nn.Parameter], bool]) -> list[str]:
    """A mixture's expert to which no token was sent may be reached in the next step."""
    trained = {name: is_reached(p) for name, p in model.named_parameters() if p.requires_grad}
    reached = {_kind(name) for name, found in trained.items() if found}
    return [
        name
        for name, found in trained.items()
        if not found and not ("expert" in name and _kind(name) in reached)
    ]


def _has_gradient(parameter: nn.Parameter) -> bool:
    """Whether any entry is not zero; one that is not a number is another check's to find."""
    return parameter.grad is not None and bool(parameter.grad.any())


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _frozen(model: nn.Module) -> list[tuple[str, Tensor]]:
    named = model.named_parameters()
    return [(n, p.data) for n, p in named if not p.requires_grad and not has_left(p)]


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()
    stride = max(1, flat.numel() // _SAMPLED)
    return flat[::stride].clone()


def _shown(names: Sequence[str]) -> str:
    return f"{len(names)}: " + ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def _error(what: str, names: Sequence[str]) -> QftError:
    return QftError(what, where="after the first optimizer step",
                    found=_shown(names),
                    fix="a fault of the strategy or of the model's code; the run was stopped "
                    "before it could waste your time")  # fmt: skip
