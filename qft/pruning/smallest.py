"""Sets the smallest weights of a matrix to zero: magnitude and Wanda.

Ties, of which 16-bit weights have many, fall to the weight that comes first, so that exactly as
many become zero as were asked for. Everything runs over a few rows at a time: no mask and no copy
of the matrix is ever there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qft.pruning.sparsity import Sparsity

PIECE = 2**20  # weights looked at together
_LOW_BITS = 16  # of a float32's 32, those that the second count is about


def prune_by_magnitude_(weight: Tensor, sparsity: Sparsity) -> None:
    """Sets the smallest ``|w|`` to zero, in place: of the whole matrix, or of each group.

    Args:
        weight: ``[out, in]``.
    """
    if sparsity.group is None:
        _zero_smallest_(weight, sparsity.zeros_of(weight.numel()))
    else:
        _zero_by_rows_(weight, sparsity, lambda rows: rows.abs())


def prune_by_wanda_(weight: Tensor, norms: Tensor, sparsity: Sparsity) -> None:
    """Sets the smallest ``|w| · ‖x‖₂`` of each row, or of each group, to zero, in place.

    Source: Sun et al. 2023, https://arxiv.org/abs/2306.11695.

    Args:
        weight: ``[out, in]``.
        norms: ``[in]``: the length of each input over all of the calibration's tokens.
    """
    lengths = norms.float()
    _zero_by_rows_(weight, sparsity, lambda rows: rows.abs().mul_(lengths))


def _zero_by_rows_(weight: Tensor, sparsity: Sparsity, score: Callable[[Tensor], Tensor]) -> None:
    group = sparsity.compared(weight.shape[1])
    count = sparsity.zeros_of(group)
    for rows in _pieces(weight):
        scores = score(rows.float()).view(-1, group)
        rows.masked_fill_(smallest(scores, count).view(rows.shape), 0)


def smallest(scores: Tensor, count: int) -> Tensor:
    """Where the ``count`` smallest of each row are, ``[rows, group]``, the first of equals first.

    Args:
        scores: ``[rows, group]``.
    """
    order = scores.argsort(dim=1, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], True)


def _pieces(weight: Tensor) -> Iterator[Tensor]:
    yield from weight.split(max(1, PIECE // weight.shape[1]))


def _zero_smallest_(weight: Tensor, count: int) -> None:
    """Sets the ``count`` smallest of the whole matrix to zero.

    A float's bits without the sign, read as an integer, are in the order of its size. So the
    largest weight that goes is found by counting: first the upper halves, then the lower halves of
    those that share its upper half.
    """
    if not count:
        return
    upper, before = _place(_counts(weight, None), count)
    lower, before = _place(_counts(weight, upper), count, before)
    last = upper << _LOW_BITS | lower
    ties = count - before  # of the weights just as large as the last one
    for rows in _pieces(weight):
        bits = _bits(rows)
        goes = bits < last
        same = (bits == last).view(-1).nonzero().view(-1)[:ties]
        goes.view(-1)[same] = True
        ties -= len(same)
        rows.masked_fill_(goes, 0)


def _bits(rows: Tensor) -> Tensor:
    return rows.float().abs().view(torch.int32)


def _counts(weight: Tensor, upper: int | None) -> Tensor:
    """How often each upper half occurs, or each lower half beside a given upper one."""
    counts = torch.zeros(2**_LOW_BITS, dtype=torch.int64, device=weight.device)
    for rows in _pieces(weight):
        bits = _bits(rows).view(-1)
        halves = bits >> _LOW_BITS
        if upper is not None:
            halves = bits[halves == upper] & (2**_LOW_BITS - 1)
        counts += torch.bincount(halves, minlength=len(counts))
    return counts


def _place(counts: Tensor, wanted: int, before: int = 0) -> tuple[int, int]:
    """The half in which the ``wanted``-th smallest lies, and how many lie before that half."""
    totals = counts.cumsum(0) + before
    place = int(torch.searchsorted(totals, wanted))
    return place, int(totals[place - 1]) if place else before
