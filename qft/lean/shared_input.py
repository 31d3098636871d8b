"""LoRA on several projections of one input: one product for all of their A matrices.

Query, key and value read the same hidden states, and so do gate and up. Their A matrices are
narrow, which makes poor products of them; side by side they are one, forwards and backwards, and
the input's gradient is made once instead of being added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qft.lean.lora_linear import Frozen, Update, lean_update

FAMILIES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
)


def lora_linears(x: Tensor, frozen: Sequence[Frozen], updates: Sequence[Update]) -> list[Tensor]:
    """``W x + s B A x`` of several layers.

    Args:
        x: ``[…, in]``.
        updates: without dropout, which is different in each layer.

    Returns:
        ``[…, out]`` for each layer.
    """
    trained = [t for update in updates for t in (update.down, update.up)]
    results = _LoRALinears.apply(x, frozen, updates, *trained)  # type: ignore[no-untyped-call]
    return list(results)


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, frozen: Sequence[Frozen], updates: Sequence[Update], *trained: Tensor
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ _side_by_side(trained[::2], x.dtype).t()
        results = []
        ranks = [down.shape[0] for down in trained[::2]]
        for layer, part, up, update in zip(
            frozen, inner.split(ranks, 1), trained[1::2], updates, strict=True
        ):
            result = layer.product(x)
            flat = result.view(-1, result.shape[-1])
            flat.addmm_(part, up.to(x.dtype).t(), alpha=update.scale)
            results.append(result)
        ctx.save_for_backward(x, inner, *trained)
        ctx.layers = (frozen, updates, ranks)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, inner, *trained = ctx.saved_tensors
        frozen, updates, ranks = ctx.layers
        back = torch.empty_like(inner)
        to_x: Tensor | None = None
        to_ups = []
        for layer, gradient, up, update, part, place in zip(
            frozen, gradients, trained[1::2], updates, inner.split(ranks, 1), back.split(ranks, 1),
            strict=True,
        ):  # fmt: skip
            rows = gradient.reshape(-1, gradient.shape[-1])
            torch.mul(rows @ up.to(rows.dtype), update.scale, out=place)
            to_ups.append((rows.t() @ part).mul_(update.scale).to(up.dtype))
            if ctx.needs_input_grad[0]:
                through = layer.transposed(rows)
                to_x = through if to_x is None else to_x.add_(through)
        to_downs = (back.t() @ x.reshape(-1, x.shape[-1])).split(ranks, 0)
        if to_x is not None:
            to_x = to_x.addmm_(back, _side_by_side(trained[::2], x.dtype)).view(x.shape)
        made = zip(to_downs, trained[::2], to_ups, strict=True)
        return to_x, None, None, *(g for d, down, u in made for g in (d.to(down.dtype), u))


def _side_by_side(downs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([down.to(dtype) for down in downs])


@dataclass
class Siblings:
    """The projections of one input, of which the first that is asked computes for all.

    They are taken for siblings by their names (`FAMILIES`). A result is used only for the very
    tensor it was made of; one that nobody comes for is thrown away.

    Attributes:
        layers: PEFT's LoRA layers, by the module that holds them.
        frozen: their bases.
        waiting: results that were not fetched yet.
    """

    layers: list[Any] = field(default_factory=list)
    frozen: list[Frozen] = field(default_factory=list)
    waiting: dict[int, Tensor] = field(default_factory=dict)
    _input: Tensor | None = None
    _version: int = 0

    def add(self, layer: nn.Module, frozen: Frozen) -> None:
        """One more of them."""
        self.layers.append(layer)
        self.frozen.append(frozen)

    def answer(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """``W x + s B A x`` of one of them; None where it must be computed alone."""
        known = x is self._input and x._version == self._version
        if not known or id(layer) not in self.waiting:
            self._forget()
            if not self._compute(x):
                return None
        result = self.waiting.pop(id(layer))
        if not self.waiting:
            self._forget()
        return result

    def _compute(self, x: Tensor) -> bool:
        if any(m._forward_pre_hooks or m._forward_hooks or not m.training for m in self.layers):
            return False
        updates = [lean_update(layer, x) for layer in self.layers]
        if any(update is None or update.dropout is not None for update in updates):
            return False
        results = lora_linears(x, self.frozen, updates)  # type: ignore[arg-type]
        self._input, self._version = x, x._version
        self.waiting = {id(m): r for m, r in zip(self.layers, results, strict=True)}
        return True

    def _forget(self) -> None:
        self.waiting, self._input = {}, None
