"""The K-quants: 256 numbers share float16 scales, and their groups whole-number scales of those.

Q3_K and Q6_K have 16 groups of 16: ``x ≈ d · s · q``. Q4_K and Q5_K have 8 groups of 32, Q2_K 16 of
16: ``x ≈ d · s · q − e · m``. After float scales have been found (:mod:`qft.gguf.scale_search`) and
rounded, the neighbours of each rounded scale are tried with their real error, and ``d`` and ``e``
are fitted again. The bits are laid by :mod:`qft.gguf.super_layouts`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from qft.gguf.scale_search import Blocks, best_line, best_scale, divided, kept, signed_largest

# How far outside the range of codes a group's extremes are tried to lie.
_ENDS = ((0.0, 0.0), (0.0, 0.5), (0.0, -0.5), (-0.5, -0.5), (-0.5, 0.0), (-0.5, 0.5),
         (-0.25, 0.0), (-0.25, 0.5), (0.25, 0.0))  # fmt: skip
_STEPS = tuple((step, other) for step in (-1, 0, 1) for other in (-1, 0, 1))
_WIDE_STEPS, _NARROW_STEPS = tuple(range(-8, 9, 2)), (0, 1, -1)


class Scaled(NamedTuple):
    """What a super-block is stored as; float32 tensors that hold whole numbers, but for ``d``.

    Attributes:
        scale: ``[1, 1, blocks]``, ``d``, in the blocks' unit, as float16 holds it.
        scales: ``[groups, 1, blocks]``, ``s``.
        codes: ``[groups, numbers, blocks]``, ``q``.
    """

    scale: Tensor
    scales: Tensor
    codes: Tensor


class Lowered(NamedTuple):
    """The same with offsets that are subtracted.

    Attributes:
        offset: ``e``, as :attr:`scale`.
        offsets: ``m``, as :attr:`scales`.
    """

    scale: Tensor
    scales: Tensor
    codes: Tensor
    offset: Tensor
    offsets: Tensor


def scaled(blocks: Blocks, smallest: int) -> Scaled:
    """Stores groups by a scale alone.

    Args:
        smallest: of the whole-number scales, which reach to ``-smallest - 1``.
    """
    targets = [blocks.low + step for step in (0.0, -0.7, -0.3, 0.3, 0.7)]
    scale = best_scale(blocks, [*targets, blocks.high, blocks.high + 0.4])
    whole = blocks.half(signed_largest(scale, 0) / smallest)
    scales = divided(scale, whole).round_().clamp_(smallest, -smallest - 1)
    for steps in (_WIDE_STEPS, _NARROW_STEPS):
        scales = _best_neighbours(blocks, whole, scales, steps, smallest)
        whole = _refitted(blocks, whole, scales)
    return Scaled(whole, scales, blocks.codes(whole * scales))


def _best_neighbours(
    blocks: Blocks, whole: Tensor, scales: Tensor, steps: Iterable[int], smallest: int
) -> Tensor:
    """The whole-number scales of least error, so many steps from those given."""
    best: tuple[Tensor, ...] | None = None
    for step in steps:
        near = (scales + step).clamp_(smallest, -smallest - 1)
        tried = (blocks.error(whole * near), near)
        best = tried if best is None else kept(tried, best)
    assert best is not None
    return best[1]


def _refitted(blocks: Blocks, whole: Tensor, scales: Tensor) -> Tensor:
    """``d`` by least squares, where that is better once it is rounded."""
    sums = blocks.sums(blocks.codes(whole * scales))
    found = blocks.half(divided(_total(scales * sums.products), _total(scales**2 * sums.squares)))
    old, new = (_total(blocks.error(scale * scales)) for scale in (whole, found))
    return torch.where(new < old, found, whole)


def scaled_with_offsets(blocks: Blocks, largest: int) -> Lowered:
    """Stores groups by a scale and an offset that is subtracted.

    Args:
        largest: of the whole-number scales and offsets; the smallest is 0.
    """
    scale, offset = best_line(blocks, _ENDS, offset_below_zero=True)
    whole, depth = (blocks.half(part.amax(0, keepdim=True) / largest) for part in (scale, -offset))
    scales = divided(scale, whole).round_().clamp_(0, largest)
    offsets = divided(-offset, depth).round_().clamp_(0, largest)
    whole, depth = _refitted_pair(blocks, whole, depth, scales, offsets)
    best: tuple[Tensor, ...] | None = None
    for step, other in _STEPS:
        near, below = (scales + step).clamp_(0, largest), (offsets + other).clamp_(0, largest)
        tried = (blocks.error(whole * near, -depth * below), near, below)
        best = tried if best is None else kept(tried, best)
    assert best is not None
    _, scales, offsets = best
    whole, depth = _refitted_pair(blocks, whole, depth, scales, offsets)
    return Lowered(whole, scales, blocks.codes(whole * scales, -depth * offsets), depth, offsets)


def _refitted_pair(
    blocks: Blocks, whole: Tensor, depth: Tensor, scales: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """``d`` and ``e`` by least squares, where that is better once they are rounded."""
    sums = blocks.sums(blocks.codes(whole * scales, -depth * offsets))
    first = _total(scales**2 * sums.squares)
    both = -_total(scales * offsets * sums.codes)
    second = _total(offsets**2 * blocks.total_weight())
    along, across = _total(scales * sums.products), -_total(offsets * blocks.total())
    determinant = first * second - both * both
    solvable = determinant > 1e-6 * first * second
    found = divided(second * along - both * across, determinant)
    below = divided(first * across - both * along, determinant)
    solvable &= (found >= 0) & (below >= 0)
    found, below = blocks.half(found), blocks.half(below)
    old = _total(blocks.error(whole * scales, -depth * offsets))
    new = _total(blocks.error(found * scales, -below * offsets))
    better = solvable & (new < old)
    return torch.where(better, found, whole), torch.where(better, below, depth)


def _total(values: Tensor) -> Tensor:
    """Over the groups of a block."""
    return values.sum(0, keepdim=True)
