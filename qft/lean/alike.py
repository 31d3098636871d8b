"""Loops over tiles that are all alike: on fake tensors a few of them stand for all.

What is alive at the fullest moment is the same, since from the second tile on every whole one finds
what the one before it found. What is counted by the meter (operations, bytes made) is told to it.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_times = 1  # that what runs now is to be counted


def times() -> int:
    """How many tiles the one that runs stands for."""
    return _times


def tiles(tensor: Tensor, size: int) -> Iterator[slice]:
    """Slices of a tensor's first dimension, ``size`` long but for the last one.

    Of a fake tensor only the first, the second (for all whole ones after the first) and a last one
    that is shorter.
    """
    total = tensor.shape[0]
    whole = total // size
    if not isinstance(tensor, FakeTensor) or whole < 3:
        yield from (slice(start, min(total, start + size)) for start in range(0, total, size))
        return
    yield slice(0, size)
    yield from _counted(slice(size, 2 * size), whole - 1)
    if total % size:
        yield slice(whole * size, total)


def _counted(tile: slice, number: int) -> Iterator[slice]:
    global _times
    before, _times = _times, _times * number
    try:
        yield tile
    finally:
        _times = before
