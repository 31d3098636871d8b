"""Weights as symmetric integers with a scale a row, or a scale a group of a row's weights.

A weight is ``q · s`` with q in ``[-2^(b-1), 2^(b-1) - 1]``. The scale is searched: the largest
weight may be cut off where that makes the squared error of the others smaller by more. Scales are
rounded to the dtype they are stored in before anything is rounded by them, so that what is stored
is what was judged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qft.errors import ModelError

_STEPS = 24  # scales that are tried
_SMALLEST = {4: 0.55, 8: 0.88}  # share of the largest weight at which the search ends, by bits


@dataclass(frozen=True)
class IntegerGrid:
    """How the weights of one matrix are rounded.

    Attributes:
        bits: 4 or 8.
        group: neighbouring weights of a row that share a scale; None is the whole row.
    """

    bits: int
    group: int | None = None

    @property
    def least(self) -> int:
        """The least integer."""
        return -(1 << (self.bits - 1))

    @property
    def most(self) -> int:
        """The largest integer."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, width: int) -> int:
        """Scales of a row."""
        return width // self.group if self.group else 1


def find_scales(
    rows: Tensor, grid: IntegerGrid, dtype: torch.dtype, importance: Tensor | None = None
) -> Tensor:
    """The scales that leave the least squared error.

    Args:
        rows: ``[rows, in]``.
        dtype: what the scales are stored in.
        importance: ``[in]``: how much the squared error of a column counts; None is all alike.

    Returns:
        ``[rows, groups]`` in ``dtype``.

    Raises:
        ModelError: a weight is not finite, or its scale is not in ``dtype``.
    """
    grouped = rows.float().unflatten(1, (grid.groups(rows.shape[1]), -1))
    weight = None if importance is None else importance.float().view(grouped.shape[1:])
    largest = grouped.abs().amax(-1)
    if not bool(torch.isfinite(largest).all()):
        raise ModelError("A weight is not finite.")
    widest = largest / grid.most
    best = _stored(widest, dtype)
    if not bool(torch.isfinite(best).all()):
        raise ModelError("A weight is too large for a scale of its dtype.",
                         found=f"{float(largest.max()):g} as {dtype}")  # fmt: skip
    least = _error(grouped, best, grid, weight)
    for step in range(1, _STEPS + 1):
        share = 1 - (1 - _SMALLEST[grid.bits]) * step / _STEPS
        best, least = _better(grouped, _stored(widest * share, dtype), best, least, grid, weight)
    refined = _stored(_fitted(grouped, best, grid, weight), dtype)
    return _better(grouped, refined, best, least, grid, weight)[0].to(dtype)


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they are read back, in float32; never zero, which a group of zeros would want."""
    return scales.clamp(min=torch.finfo(dtype).smallest_normal).to(dtype).float()


def _better(
    grouped: Tensor,
    scales: Tensor,
    best: Tensor,
    least: Tensor,
    grid: IntegerGrid,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    error = _error(grouped, scales, grid, weight)
    wins = error < least
    return torch.where(wins, scales, best), torch.where(wins, error, least)


def _error(grouped: Tensor, scales: Tensor, grid: IntegerGrid, weight: Tensor | None) -> Tensor:
    scales = scales[..., None]
    wrong = _integers(grouped, scales, grid).mul_(scales).sub_(grouped).square_()
    return (wrong if weight is None else wrong.mul_(weight)).sum(-1)


def _fitted(grouped: Tensor, scales: Tensor, grid: IntegerGrid, weight: Tensor | None) -> Tensor:
    """The scale that suits best the integers that ``scales`` give: least squares."""
    integers = _integers(grouped, scales[..., None], grid)
    counted = integers if weight is None else integers * weight
    size = (counted * integers).sum(-1)
    return torch.where(size > 0, (counted * grouped).sum(-1) / size, scales).clamp(min=0)


def _integers(grouped: Tensor, scales: Tensor, grid: IntegerGrid) -> Tensor:
    return (grouped / scales).round_().clamp_(grid.least, grid.most)


def to_integers(rows: Tensor, scales: Tensor, grid: IntegerGrid) -> Tensor:
    """The nearest integers.

    Args:
        rows: ``[rows, in]``.
        scales: ``[rows, groups]``, from :func:`find_scales`.

    Returns:
        ``[rows, in]``, int8.
    """
    grouped = rows.float().unflatten(1, (scales.shape[1], -1))
    return _integers(grouped, scales.float()[..., None], grid).flatten(1).to(torch.int8)


def from_integers(integers: Tensor, scales: Tensor) -> Tensor:
    """What integers stand for, ``[rows, in]``, computed in the scales' dtype as readers do it."""
    grouped: Tensor = integers.unflatten(1, (scales.shape[1], -1))
    full: Tensor = (grouped.to(scales.dtype) * scales[..., None]).flatten(1)
    return full


def pack(integers: Tensor, bits: int) -> Tensor:
    """Integers side by side in words of 32 bits, the first in the lowest bits.

    They are stored from zero up (4 bits: 0 to 15 for -8 to 7); a row's last word is filled up with
    zero bits.

    Args:
        integers: int8, ``[rows, in]``.
        bits: 4 or 8.

    Returns:
        int32, ``[rows, ceil(in · bits / 32)]``.
    """
    from torch.nn import functional

    stored = integers.to(torch.int16).add_(1 << (bits - 1)).to(torch.uint8)
    stored = functional.pad(stored, (0, -stored.shape[1] % (32 // bits)))
    if bits == 4:
        stored = stored[:, ::2] | (stored[:, 1::2] << 4)
    return stored.contiguous().view(torch.int32)
