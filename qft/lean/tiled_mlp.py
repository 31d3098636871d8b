"""An MLP run over a few tokens at a time, in the forward and in the backward pass.

An MLP treats each token alone, so its wide inner activations need exist for one tile of tokens
only. Its input is all that is kept; each tile is run again in the backward pass.

The idea is that of ALST (Bekman et al. 2025, https://arxiv.org/abs/2506.13996).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qft.lean.alike import tiles


def tiled(run: Callable[[Tensor], Tensor], x: Tensor, trained: list[Tensor], rows: int) -> Tensor:
    """``run(x)``, ``rows`` tokens at a time.

    Args:
        run: treats each token alone; ``[tokens, width]`` to the same shape.
        x: ``[…, width]``.
        trained: the parameters in it that train.
    """
    result: Tensor = _Tiled.apply(x, run, rows, *trained)  # type: ignore[no-untyped-call]
    return result


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], rows: int, *trained: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *trained)
        ctx.run, ctx.rows = run, rows
        flat = x.reshape(-1, x.shape[-1])
        result = torch.empty_like(flat)
        for part in tiles(flat, rows):
            result[part] = run(flat[part])
        return result.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *trained = ctx.saved_tensors
        flat, arriving = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, x.shape[-1])
        result = torch.empty_like(flat)
        sums: list[Tensor | None] = [None] * len(trained)
        for part in tiles(flat, ctx.rows):
            with torch.enable_grad():
                tile = flat[part].detach().requires_grad_()
                made = torch.autograd.grad(
                    ctx.run(tile), [tile, *trained], arriving[part], allow_unused=True
                )
            result[part] = made[0]
            for number, value in enumerate(made[1:]):
                known = sums[number]
                if value is None:  # an adapter that is not in use
                    continue
                sums[number] = value if known is None else known.add_(value)
        return result.view(x.shape), None, None, *sums


def tile_rows(width: int) -> int:
    """Tokens a tile: products of this size lose no speed, and their activations are small."""
    return max(256, width // 4)
