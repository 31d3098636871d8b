"""Which scale, and which offset, lets whole numbers stand for a block with the least error.

A block ``x`` is stored as codes ``q``: ``x ≈ scale · q + offset``. For given codes the best scale
and offset solve a weighted least-squares problem; for given scale and offset the best codes are the
nearest ones. What no such alternation finds is which of many near-equal starts is the lucky one, so
several are tried. All blocks of a chunk are searched at once; a chunk stays in the CPU's cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_LARGEST_F16 = 65504.0
_SMALLEST_F16 = 2.0**-24
_WEIGHTY = 0.03  # of a group's largest weight
_SINGULAR = 1e-6  # of what it would be if codes and offset had nothing in common


class Sums(NamedTuple):
    """Weighted sums over each group, ``[groups, 1, blocks]``.

    Attributes:
        codes: Σ w·q.
        squares: Σ w·q².
        products: Σ w·q·x.
    """

    codes: Tensor
    squares: Tensor
    products: Tensor


class Blocks:
    """Numbers to be stored, and the codes they may have.

    Args:
        values: ``[blocks, numbers]``, finite.
        weights: ``[blocks, numbers]``, positive: what a squared error weighs; None is all alike.
        groups: parts of a block that have scales of their own.
        low: smallest code.
        high: largest code.
        turn: turn the signs of blocks whose groups lie above 0 rather than below, for types whose
            offsets cannot be positive.

    Attributes:
        values: ``[groups, numbers a group, blocks]``, each block divided by :attr:`unit`.
        unit: ``[1, 1, blocks]``, a power of two near the block's largest magnitude, so that
            squares neither overflow nor vanish, negative where signs are turned. Scales and
            offsets below are in this unit.
    """

    def __init__(
        self,
        values: Tensor,
        weights: Tensor | None,
        groups: int,
        low: int,
        high: int,
        turn: bool = False,
    ) -> None:
        self.values = values.t().contiguous().unflatten(0, (groups, -1))
        bottom, top = self.values.amin(1, keepdim=True), self.values.amax(1, keepdim=True)
        largest = torch.maximum(top.amax(0, keepdim=True), -bottom.amin(0, keepdim=True))
        within = largest >= _SMALLEST_F16 / 2**16  # float16 scales cannot reach what is smaller
        exponent = torch.where(within, torch.frexp(largest).exponent, 0)
        self.unit = torch.ldexp(torch.ones_like(largest), exponent)
        if turn:
            above, below = (side.clamp_min(0).sum(0, keepdim=True) for side in (bottom, -top))
            self.unit = torch.where(above > below, -self.unit, self.unit)
        self.values.mul_(within / self.unit)
        self.low, self.high = low, high
        self.weights = None if weights is None else weights.t().contiguous().view_as(self.values)
        self._weighted: Tensor = self.values if self.weights is None else self.values * self.weights
        self._codes, self._scratch = torch.empty_like(self.values), torch.empty_like(self.values)

    def total_weight(self) -> Tensor:
        """Σ w, ``[groups, 1, blocks]``."""
        if self.weights is None:
            return torch.full_like(self.values[:, :1], self.values.shape[1])
        return self.weights.sum(1, keepdim=True)

    def total(self) -> Tensor:
        """Σ w·x, ``[groups, 1, blocks]``."""
        return self._weighted.sum(1, keepdim=True)

    def energy(self) -> Tensor:
        """Σ w·x², ``[groups, 1, blocks]``."""
        return torch.mul(self._weighted, self.values, out=self._scratch).sum(1, keepdim=True)

    def largest(self) -> Tensor:
        """The number of largest magnitude, with its sign, ``[groups, 1, blocks]``."""
        return signed_largest(self.values, 1)

    def ranges(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The smallest and largest number of each group, and of those in it that weigh most."""
        yield self.values.amin(1, keepdim=True), self.values.amax(1, keepdim=True)
        if self.weights is not None:
            light = self.weights < _WEIGHTY * self.weights.amax(1, keepdim=True)
            yield (self.values.masked_fill(light, torch.inf).amin(1, keepdim=True),
                   self.values.masked_fill(light, -torch.inf).amax(1, keepdim=True))  # fmt: skip

    def codes(self, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """The nearest codes; they last until the next call of any method.

        Args:
            scale: ``[groups, 1, blocks]``; where it is 0, so are the codes.
            offset: the same shape; None is 0.
        """
        inverse = divided(1.0, scale)
        if offset is None:
            torch.mul(self.values, inverse, out=self._codes)
        else:
            torch.sub(self.values, offset, out=self._codes).mul_(inverse)
        return self._nearest(self._codes)

    def _nearest(self, scaled: Tensor) -> Tensor:
        """Rounds in place."""
        return scaled.round_().clamp_(self.low, self.high)

    def sums(self, codes: Tensor) -> Sums:
        """What the best scale and offset for these codes follow from."""
        if self.weights is None:
            first = codes.sum(1, keepdim=True)
            torch.mul(codes, codes, out=self._scratch)
        else:
            first = torch.mul(codes, self.weights, out=self._scratch).sum(1, keepdim=True)
            self._scratch.mul_(codes)
        squares = self._scratch.sum(1, keepdim=True)
        products = torch.mul(codes, self._weighted, out=self._scratch).sum(1, keepdim=True)
        return Sums(first, squares, products)

    def error(self, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """Σ w·(x − scale·q − offset)² with the nearest codes, ``[groups, 1, blocks]``.

        From the differences themselves: sums of squares would lose an error near float32's own.
        """
        difference = self.codes(scale, offset).mul_(scale).sub_(self.values)
        if offset is not None:
            difference.add_(offset)
        squares = torch.mul(difference, difference, out=self._scratch)
        return (squares if self.weights is None else squares.mul_(self.weights)).sum(
            1, keepdim=True
        )

    def half(self, scale: Tensor) -> Tensor:
        """The scale a float16 can hold, still in :attr:`unit`; never 0 for one that is not 0."""
        true = scale * self.unit
        held = true.clamp(-_LARGEST_F16, _LARGEST_F16).half().float()
        held = torch.where((held == 0) & (true != 0), _SMALLEST_F16 * true.sign(), held)
        return held / self.unit

    def half_bytes(self, scale: Tensor) -> Tensor:
        """The bytes of a scale from :meth:`half`, uint8 ``[2, blocks]``."""
        true = (scale.reshape(-1) * self.unit.reshape(-1)).half()
        return true.view(torch.uint8).view(-1, 2).t()


def signed_largest(values: Tensor, axis: int) -> Tensor:
    """Along an axis, which is kept, the number of largest magnitude with its sign."""
    top, bottom = values.amax(axis, keepdim=True), values.amin(axis, keepdim=True)
    return torch.where(top >= -bottom, top, bottom)


def divided(numerator: Tensor | float, denominator: Tensor) -> Tensor:
    """The quotient; 0 where the denominator is."""
    return torch.where(denominator != 0, numerator / denominator, 0.0)


def best_scale(blocks: Blocks, targets: Iterable[float]) -> Tensor:
    """The scale of least error, in float32, without an offset.

    Args:
        targets: what the number of largest magnitude is tried to be stored as, in codes; each try
            is followed by the least-squares scale ``Σwqx / Σwq²``.

    Returns:
        ``[groups, 1, blocks]``.
    """
    largest = blocks.largest()
    scale, gain = torch.zeros_like(largest), torch.zeros_like(largest)
    for target in targets:
        found, saved = _least_squares_scale(blocks, largest / target)
        better = saved > gain
        scale, gain = torch.where(better, found, scale), torch.where(better, saved, gain)
    return scale


def refitted_scale(blocks: Blocks, scale: Tensor) -> Tensor:
    """The least-squares scale for the codes that are nearest under ``scale``."""
    return _least_squares_scale(blocks, scale)[0]


def _least_squares_scale(blocks: Blocks, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The scale, and by how much it makes Σwx² smaller."""
    sums = blocks.sums(blocks.codes(scale))
    found = divided(sums.products, sums.squares)
    return found, found * sums.products


def best_line(
    blocks: Blocks, ends: Sequence[tuple[float, float]], offset_below_zero: bool
) -> tuple[Tensor, Tensor]:
    """Scale and offset of least error, in float32.

    Args:
        ends: where the smallest and the largest number of a group are tried to be stored: so many
            codes above the lowest, and above the highest code.
        offset_below_zero: the scale must not be negative, the offset not positive.

    Returns:
        Two of ``[groups, 1, blocks]``.
    """
    line = _Line(blocks, offset_below_zero)
    best: tuple[Tensor, ...] | None = None
    for bottom, top in blocks.ranges():
        start = bottom.clamp_max(0) if offset_below_zero else bottom
        for low, high in ends:
            first, last = blocks.low + low, blocks.high + high
            scale = (top - start) / (last - first)
            tried = line.through(blocks.sums(blocks.codes(scale, start - first * scale)))
            best = tried if best is None else kept(tried, best)
    assert best is not None
    return best[1], best[2]


def refitted_line(blocks: Blocks, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares scale and offset, of any sign, for the codes nearest under those given."""
    line = _Line(blocks, offset_below_zero=False)
    _, scale, offset = line.through(blocks.sums(blocks.codes(scale, offset)))
    return scale, offset


class _Line:
    """Least squares of ``x ≈ scale · q + offset``, one pair a group."""

    def __init__(self, blocks: Blocks, offset_below_zero: bool) -> None:
        self._weight, self._total = blocks.total_weight(), blocks.total()
        self._energy = blocks.energy()
        self._bounded = offset_below_zero

    def through(self, sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
        """Error, scale and offset."""
        weight, total = self._weight, self._total
        determinant = weight * sums.squares - sums.codes * sums.codes
        solvable = determinant > _SINGULAR * weight * sums.squares
        scale = divided(weight * sums.products - total * sums.codes, determinant)
        offset = divided(sums.squares * total - sums.codes * sums.products, determinant)
        if self._bounded:
            solvable &= (scale >= 0) & (offset <= 0)
        # On the edge of what is allowed one of the two is 0.
        alone = divided(sums.products, sums.squares)
        level = total / weight
        if self._bounded:
            alone, level = alone.clamp_min(0), level.clamp_max(0)
        flat = level * (2 * total - level * weight) > alone * (
            2 * sums.products - alone * sums.squares
        )
        scale = torch.where(solvable, scale, torch.where(flat, 0.0, alone))
        offset = torch.where(solvable, offset, torch.where(flat, level, 0.0))
        error = (
            self._energy
            - 2 * (scale * sums.products + offset * total)
            + scale * scale * sums.squares
            + 2 * scale * offset * sums.codes
            + offset * offset * weight
        )
        return error, scale, offset


def kept(tried: tuple[Tensor, ...], best: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Block by block whichever has the smaller error, which comes first; ties keep ``best``."""
    better = tried[0] < best[0]
    return tuple(torch.where(better, new, old) for new, old in zip(tried, best, strict=True))
