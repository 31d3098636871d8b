"""LoRA on a frozen linear layer, by hand-written autograd.

    y = W x + s B A drop(x)

Autograd alone keeps, for each of a layer's seven projections, the input in the adapter's float32,
the input after dropout, the mask, and intermediate products. All that the backward pass needs is x
itself, of which projections that share it (query, key and value; gate and up) keep one, and
``A drop(x)``, which is narrow. A quantized W is dequantized again in the backward pass; dropout
draws its mask again from its seed. Adapters stay in float32 for the optimizer and are used in the
type of x.

Source of the method: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from qft.lean.dropout import Replay, SeededDropout


class Frozen(Protocol):
    """A linear layer that does not train, whatever its weight is stored as."""

    def product(self, x: Tensor) -> Tensor:
        """``W x + bias``: ``[…, in]`` to a new ``[…, out]``."""

    def transposed(self, gradient: Tensor) -> Tensor:
        """``Wᵀ gradient``: ``[rows, out]`` to a new ``[rows, in]``."""


@dataclass(frozen=True)
class Dense:
    """A weight that is stored as it is."""

    layer: Any

    def product(self, x: Tensor) -> Tensor:
        """See `Frozen`."""
        return functional.linear(x, self.layer.weight, self.layer.bias)

    def transposed(self, gradient: Tensor) -> Tensor:
        """See `Frozen`."""
        product: Tensor = gradient @ self.layer.weight
        return product


_LORA_LAYERS = ("Linear", "Linear4bit", "Linear8bitLt")
MakeFrozen = Callable[[nn.Module], "Frozen | None"]


@dataclass(frozen=True)
class Update:
    """The trained part of one layer, for one forward pass.

    Attributes:
        down: A, ``[rank, in]``.
        up: B, ``[out, rank]``.
        scale: what B A x is multiplied with.
        dropout: draws the same mask whenever it is called, or None.
    """

    down: Tensor
    up: Tensor
    scale: float
    dropout: Replay | None


def lora_linear(x: Tensor, frozen: Frozen, update: Update) -> Tensor:
    """``W x + s B A drop(x)``, keeping x and ``A drop(x)`` for the backward pass.

    Args:
        x: ``[…, in]``.

    Returns:
        ``[…, out]``, in the type of x.
    """
    result: Tensor = _LoRALinear.apply(x, update.down, update.up, frozen, update)  # type: ignore[no-untyped-call]
    return result


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, frozen: Frozen, update: Update
    ) -> Tensor:
        result = frozen.product(x)
        inner = add_update(result, x, down, up, update)
        ctx.save_for_backward(x, inner, down, up)
        ctx.frozen, ctx.update = frozen, update
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, inner, down, up = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        back, to_up = update_backward(rows, inner, up, ctx.update)
        to_down = gradient_of_down(back, x, down, ctx.update)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = input_gradient(rows, back, down, x.shape, ctx.frozen, ctx.update)
        return to_x, to_down, to_up, None, None


def add_update(result: Tensor, x: Tensor, down: Tensor, up: Tensor, update: Update) -> Tensor:
    """Adds ``s B A drop(x)`` to ``result`` in place; returns ``A drop(x)``, ``[rows, rank]``."""
    dropped = x if update.dropout is None else update.dropout(x)
    inner = dropped.reshape(-1, x.shape[-1]) @ down.to(x.dtype).t()
    result.view(-1, result.shape[-1]).addmm_(inner, up.to(x.dtype).t(), alpha=update.scale)
    return inner


def update_backward(
    rows: Tensor, inner: Tensor, up: Tensor, update: Update
) -> tuple[Tensor, Tensor]:
    """The gradient that reaches A's output (``[rows, rank]``, scaled), and that of B."""
    back = (rows @ up.to(rows.dtype)).mul_(update.scale)
    to_up = (rows.t() @ inner).mul_(update.scale)
    return back, to_up.to(up.dtype)


def gradient_of_down(back: Tensor, x: Tensor, down: Tensor, update: Update) -> Tensor:
    """The gradient of A."""
    dropped = x if update.dropout is None else update.dropout(x)
    return (back.t() @ dropped.reshape(-1, x.shape[-1])).to(down.dtype)


def input_gradient(
    rows: Tensor, back: Tensor, down: Tensor, shape: torch.Size, frozen: Frozen, update: Update
) -> Tensor:
    """The gradient of x, through W and through the update."""
    result = frozen.transposed(rows)
    down = down.to(rows.dtype)
    if update.dropout is None:
        return result.addmm_(back, down).view(shape)
    return result.view(shape).add_(update.dropout((back @ down).view(shape)))


def is_lora_layer(module: nn.Module) -> bool:
    """Whether a module is PEFT's LoRA on a linear layer: not AdaLoRA's, nor on GPT-2's Conv1D."""
    kind = type(module)
    of_peft = kind.__module__.startswith("peft.tuners.lora.") and kind.__name__ in _LORA_LAYERS
    return of_peft and not getattr(module, "fan_in_fan_out", False)


def is_cast(x: Tensor) -> bool:
    """Whether autocast is at work on a tensor's device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def lean_update(layer: Any, x: Tensor, *, keeps_zeros: bool = False) -> Update | None:
    """What a PEFT LoRA layer adds to ``W x`` just now; None where PEFT's own forward must do it.

    That is where the adapter is switched off, merged, one of several, a variant (DoRA), or where
    the base itself trains.

    Args:
        keeps_zeros: the update of the one variant that leaves the base's zeros alone is asked for
            (`qft.lean.kept_zeros`), and of no other layer.
    """
    active = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(active) != 1 or is_cast(x):
        return None
    name = active[0]
    variant = layer.lora_variant.get(name)
    wanted = getattr(variant, "keeps_zeros", False) if keeps_zeros else variant is None
    if name not in layer.lora_A or not wanted:
        return None
    if layer.lora_B[name].bias is not None or any(
        p.requires_grad for p in layer.get_base_layer().parameters(recurse=False)
    ):
        return None
    dropout = layer.lora_dropout[name]
    if not isinstance(dropout, (nn.Identity, SeededDropout)):
        return None
    replay = dropout.replay(x) if isinstance(dropout, SeededDropout) else None
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    return Update(down, up, float(layer.scaling[name]), replay)


class Together(Protocol):
    """Layers that may be computed together (`qft.lean.shared_input`)."""

    def answer(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """``W x + s B A x`` of one of them; None where it must be computed alone."""


@dataclass(frozen=True)
class LeanForward:
    """The ``forward`` of a PEFT LoRA layer: by hand where it trains, PEFT's own otherwise."""

    layer: Any
    frozen: Frozen
    siblings: Together | None
    plain: Callable[..., Tensor]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[…, in]`` to ``[…, out]``."""
        if self.layer.training and not (args or kwargs):
            if self.siblings is not None:
                shared = self.siblings.answer(self.layer, x)
                if shared is not None:
                    return shared
            update = lean_update(self.layer, x)
            if update is not None:
                return lora_linear(x, self.frozen, update)
        return self.plain(x, *args, **kwargs)
