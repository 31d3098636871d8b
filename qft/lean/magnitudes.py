"""The k-th largest magnitude of a tensor that is never whole in memory, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

_HALF_BITS = 16  # of a float32's 32
_COUNTERS = 2**_HALF_BITS

Pass = Callable[[], Iterable[Mapping[int, Tensor]]]


def smallest_kept(blocks: Pass, count: int, kept: int) -> list[float]:
    """The ``kept``-th largest magnitude of each of several tensors of one size.

    The bits of a non-negative float32 order as the numbers do. One pass counts the values by the
    upper half of their bits and finds the half that the wanted one has; a second counts those by
    the lower half. Together 65,536 counters a tensor, whatever the size.

    Args:
        blocks: begins a pass: each step gives the next float32 block of every tensor, by number;
            what is left out is zero.
        count: how many tensors.
        kept: how many values of each are kept.

    Returns:
        By number: what has at least this magnitude is kept; infinity where ``kept`` is 0, and 0
        where fewer values are not zero.
    """
    if kept == 0:
        return [float("inf")] * count
    left = [kept] * count
    upper = _found(_counts(blocks, count, [None] * count), left)
    lower = _found(_counts(blocks, count, upper), left)
    return [_float_of(high, low) for high, low in zip(upper, lower, strict=True)]


def _counts(blocks: Pass, count: int, upper: Sequence[int | None]) -> Tensor:
    """How many values have each upper half of bits; or, with their ``upper`` one, each lower."""
    counts = torch.zeros(count, _COUNTERS, dtype=torch.int64)
    for parts in blocks():
        for number, part in parts.items():
            bits = part.abs().contiguous().view(torch.int32).reshape(-1)
            halves = bits >> _HALF_BITS
            if upper[number] is not None:
                halves = (bits & (_COUNTERS - 1))[halves == upper[number]]
            counts[number] += torch.bincount(halves, minlength=_COUNTERS)
    return counts


def _found(counts: Tensor, left: list[int]) -> list[int]:
    """The counter that holds each tensor's wanted value; ``left`` becomes its rank within it.

    0 where there are fewer values: those that were not given are zeros.
    """
    places = []
    for number, row in enumerate(counts):
        sums = row.flip(0).cumsum(0)
        place = int(torch.searchsorted(sums, left[number]))
        if place == _COUNTERS:
            places.append(0)
            continue
        left[number] -= int(sums[place - 1]) if place else 0
        places.append(_COUNTERS - 1 - place)
    return places


def _float_of(high: int, low: int) -> float:
    bits = torch.tensor([(high << _HALF_BITS) | low], dtype=torch.int32)
    return float(bits.view(torch.float32))
