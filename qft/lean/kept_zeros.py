"""LoRA that leaves a pruned weight's zeros alone, by hand-written autograd.

    y = W x + ((W ≠ 0) ⊙ s B A) drop(x)

The update is a matrix as large as W once it is masked, and autograd would keep it, its mask and its
gradient. Here it is made a few rows at a time, forwards and backwards, and its mask is read off W
each time: beside x nothing is kept, and never more than `PIECE` weights' worth is there. The price
is time: a step multiplies with matrices of W's size five times where LoRA does so twice.

An update that can be merged and leaves the model as sparse as it was: Lu et al. 2024 (SPP),
https://arxiv.org/abs/2405.16057, where the mask comes of multiplying with W itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qft.lean.lora_linear import Frozen, Update, lean_update

PIECE = 2**22  # elements of the update that are there at a time


def kept_zeros_linear(x: Tensor, weight: Tensor, frozen: Frozen | None, update: Update) -> Tensor:
    """``W x + ((W ≠ 0) ⊙ s B A) drop(x)``, keeping x for the backward pass.

    Args:
        x: ``[…, in]``.
        weight: W, ``[out, in]``, frozen.
        frozen: the layer of W; without it the result is the update's part alone.

    Returns:
        ``[…, out]``, in the type of x.
    """
    result: Tensor = _KeptZeros.apply(x, update.down, update.up, weight, frozen, update)  # type: ignore[no-untyped-call]
    return result


class _KeptZeros(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, weight: Tensor, frozen: Frozen | None,
        update: Update,
    ) -> Tensor:  # fmt: skip
        result = x.new_zeros(*x.shape[:-1], len(weight)) if frozen is None else frozen.product(x)
        flat, dropped = result.view(-1, len(weight)), _dropped(x, update)
        for part in _pieces(weight):
            flat[:, part].addmm_(dropped, _delta(down, up, weight, update.scale, part, x).t())
        ctx.save_for_backward(x, down, up, weight)
        ctx.frozen, ctx.update = frozen, update
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, down, up, weight = ctx.saved_tensors
        update, frozen = ctx.update, ctx.frozen
        rows, dropped = gradient.reshape(-1, len(weight)), _dropped(x, update)
        to_down, to_up = torch.zeros_like(down), torch.empty_like(up)
        to_x: Tensor | None = None  # through the update
        whole: Tensor | None = None  # through W as well; with dropout the two are kept apart
        if ctx.needs_input_grad[0]:
            whole = None if frozen is None else frozen.transposed(rows)
            to_x = whole if whole is not None and update.dropout is None else None
            to_x = torch.zeros_like(dropped) if to_x is None else to_x
        for part in _pieces(weight):
            arriving = rows[:, part]
            to_delta = (arriving.t() @ dropped).masked_fill_(weight[part] == 0, 0)
            to_up[part] = (to_delta @ down.to(x.dtype).t()).mul_(update.scale)
            to_down.add_(up[part].to(x.dtype).t() @ to_delta, alpha=update.scale)
            if to_x is not None:
                del to_delta
                to_x.addmm_(arriving, _delta(down, up, weight, update.scale, part, x))
        if to_x is not None:
            to_x = to_x.view(x.shape)
            if update.dropout is not None:
                to_x = update.dropout(to_x)
                to_x = to_x if whole is None else whole.view(x.shape).add_(to_x)
        return to_x, to_down, to_up, None, None, None


def _dropped(x: Tensor, update: Update) -> Tensor:
    dropped = x if update.dropout is None else update.dropout(x)
    return dropped.reshape(-1, x.shape[-1])


def _pieces(weight: Tensor) -> Iterator[slice]:
    rows = max(1, PIECE // weight.shape[1])
    for begin in range(0, len(weight), rows):
        yield slice(begin, min(begin + rows, len(weight)))


def _delta(
    down: Tensor, up: Tensor, weight: Tensor, scale: float, part: slice, like: Tensor
) -> Tensor:
    """Some rows of the masked update, ``[rows, in]``."""
    made = (up[part].to(like.dtype) @ down.to(like.dtype)).mul_(scale)
    return made.masked_fill_(weight[part] == 0, 0)


@dataclass(frozen=True)
class KeptZerosForward:
    """The ``forward`` of a PEFT LoRA layer that keeps zeros; PEFT's own where it does not train."""

    layer: Any
    frozen: Frozen
    plain: Callable[..., Tensor]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[…, in]`` to ``[…, out]``."""
        if self.layer.training and not (args or kwargs):
            update = lean_update(self.layer, x, keeps_zeros=True)
            if update is not None:
                weight = self.layer.get_base_layer().weight
                return kept_zeros_linear(x, weight, self.frozen, update)
        return self.plain(x, *args, **kwargs)


def keeps_zeros(layer: nn.Module) -> bool:
    """Whether one of PEFT's LoRA layers has an adapter that leaves its weight's zeros alone."""
    variants: dict[str, Any] = getattr(layer, "lora_variant", {})
    return any(getattr(variant, "keeps_zeros", False) for variant in variants.values())
