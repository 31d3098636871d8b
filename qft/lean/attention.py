"""Attention for training on a CPU, by hand-written autograd: batched products, a tile at a time.

SDPA's CPU kernel is slow in bfloat16, most of all backwards; ordinary batched products are fast,
but keep all scores. Here a tile of queries meets the keys it can see, its scores are gone before
the next tile comes, and the backward pass makes them again. Several examples may lie in one row:
each is attended to by itself, so that no work goes into what a mask would hide, or into padding.
Of fake tensors, which are there to be metered, only those tiles are run that memory depends on;
what the others would compute is counted.

Sources: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; making the scores again is from
Dao et al. 2022, https://arxiv.org/abs/2205.14135.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

TILE = 128  # queries whose scores exist at one time


@dataclass(frozen=True)
class Visible:
    """Which keys a query sees.

    Attributes:
        borders: where the examples of a row begin and end, ``0, …, tokens``; each sees itself.
        causal: a query sees no later key; a mask says so itself.
        mask: ``[batch or 1, 1, queries, keys]``, true where visible; None is everything.
    """

    borders: Sequence[int]
    causal: bool
    mask: Tensor | None = None


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Visible) -> Tensor:
    """``softmax(scale · query · keyᵀ) · value``.

    Args:
        query: ``[batch, heads, tokens, width]``.
        key: ``[batch, key-value heads, tokens, width]``, of which each serves several heads.
        value: like ``key``, of any width.

    Returns:
        ``[batch, tokens, heads, width of value]``; zeros where a query sees nothing.
    """
    result: Tensor = _Attention.apply(query, key, value, scale, visible)  # type: ignore[no-untyped-call]
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Visible
    ) -> Tensor:
        batch, heads, tokens, _ = query.shape
        shared = key.shape[1]
        result = query.new_empty(batch, tokens, heads, value.shape[-1])
        scores = _Room(query, key)
        _count_left_out(query, visible, query.shape[-1] + value.shape[-1])
        for row in _rows(query):
            asked, keys, values = _grouped(query[row], shared), key[row].contiguous(), value[row]
            values = values.contiguous()
            found = query.new_empty(*asked.shape[:2], values.shape[-1])
            for tile in _tiles(row, visible, heads // shared, _is_fake(query)):
                chances = _chances(asked, keys, scale, tile, scores)
                found[:, tile.rows] = chances @ values[:, tile.keys]
            result[row].unflatten(1, (shared, -1)).copy_(_ungrouped(found, tokens))
        ctx.save_for_backward(query, key, value)
        ctx.settings = (scale, visible)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        scale, visible = ctx.settings
        to_query, to_key, to_value = (_like(x) for x in (query, key, value))
        scores = _Room(query, key)
        _count_left_out(query, visible, 3 * query.shape[-1] + 2 * value.shape[-1])
        for row in _rows(query):
            made = _row_backward(row, query, key, value, gradient, scale, visible, scores)
            for whole, part in zip((to_query, to_key, to_value), made, strict=True):
                whole[row] = part
        return to_query, to_key, to_value, None, None


def _row_backward(
    row: int, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, scale: float,
    visible: Visible, scores: _Room,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shared, heads = key.shape[1], query.shape[1]
    asked, keys, values = _grouped(query[row], shared), key[row].contiguous(), value[row]
    values = values.contiguous()
    arriving = _grouped(gradient[row].transpose(0, 1), shared)
    to_asked, to_keys, to_values = (torch.zeros_like(x) for x in (asked, keys, values))
    for tile in _tiles(row, visible, heads // shared, _is_fake(query)):
        rows, seen = tile.rows, tile.keys
        chances = _chances(asked, keys, scale, tile, scores)
        to_values[:, seen].baddbmm_(chances.transpose(1, 2), arriving[:, rows])
        to_scores = scores.take(0, chances.shape)
        torch.bmm(arriving[:, rows], values[:, seen].transpose(1, 2), out=to_scores)
        to_scores = torch._softmax_backward_data(to_scores, chances, -1, chances.dtype)
        to_asked[:, rows].baddbmm_(to_scores, keys[:, seen], alpha=scale)
        to_keys[:, seen].baddbmm_(to_scores.transpose(1, 2), asked[:, rows], alpha=scale)
    to_asked = _ungrouped(to_asked, query.shape[2]).flatten(1, 2).transpose(0, 1)
    return to_asked, to_keys, to_values


@dataclass(frozen=True)
class _Tile:
    """Some queries of a row, and the keys they see.

    Attributes:
        queries: of the tile.
        heads: how many of them each key-value head serves.
        keys: those that some query of the tile sees.
        hidden: ``[queries, keys]``, true where a score does not count; None where the mask does
            not say.
        causal: of the last keys, as many as there are queries, each query sees its own and those
            before it.
        blind: some query sees nothing.
    """

    queries: slice
    heads: int
    keys: slice
    hidden: Tensor | None
    causal: bool
    blind: bool

    @property
    def rows(self) -> slice:
        """The queries of all heads, in the order of `_grouped`."""
        return slice(self.queries.start * self.heads, self.queries.stop * self.heads)


class _Room:
    """Memory for the scores and the chances of one tile after another."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        size = query.shape[1] * min(TILE, query.shape[2]) * key.shape[2]
        self._buffers = [query.new_empty(size) for _ in range(2)]
        # what is added to the scores of later keys
        self.later = query.new_full((TILE, TILE), float("-inf")).triu_(1)

    def take(self, number: int, shape: Sequence[int]) -> Tensor:
        """One of the two, in this shape, with whatever is in it."""
        heads, rows, keys = shape
        return self._buffers[number][: heads * rows * keys].view(heads, rows, keys)


def _grouped(tensor: Tensor, shared: int) -> Tensor:
    """``[heads, tokens, width]`` to ``[shared, tokens · heads / shared, width]``, contiguous."""
    grouped: Tensor = tensor.unflatten(0, (shared, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
    return grouped.flatten(1, 2).contiguous()


def _ungrouped(tensor: Tensor, tokens: int) -> Tensor:
    """The way back: ``[tokens, shared, heads / shared, width]``."""
    ungrouped: Tensor = tensor.unflatten(1, (tokens, -1)).transpose(0, 1)  # type: ignore[no-untyped-call]
    return ungrouped


def _like(tensor: Tensor) -> Tensor:
    """Room for a gradient that lies in memory as its projection wants it: tokens before heads."""
    batch, heads, tokens, width = tensor.shape
    return tensor.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _tiles(row: int, visible: Visible, heads: int, fake: bool) -> Iterator[_Tile]:
    spans = _spans(visible)
    for span in _telling(spans) if fake else spans:
        if visible.mask is None:
            yield _Tile(span.queries, heads, span.keys, None, visible.causal, False)
        else:
            mask = visible.mask[row if visible.mask.shape[0] > 1 else 0, 0]
            keys, hidden, blind = _seen(mask[span.queries, span.keys], span.keys.start)
            yield _Tile(span.queries, heads, keys, hidden, False, blind)


@dataclass(frozen=True)
class _Span:
    """A tile's queries, and the keys that they may see."""

    queries: slice
    keys: slice

    @property
    def pairs(self) -> int:
        """How many scores there are, for one head."""
        queries, keys = (part.stop - part.start for part in (self.queries, self.keys))
        return int(queries * keys)


def _spans(visible: Visible) -> list[_Span]:
    found = []
    for start, end in itertools.pairwise(visible.borders):
        for at in range(start, end, TILE):
            stop = min(end, at + TILE)
            last = stop if visible.causal and visible.mask is None else end
            found.append(_Span(slice(at, stop), slice(start, last)))
    return found


# of fake tensors: as many bytes as all tiles of all rows take, and as many products


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def _rows(query: Tensor) -> range:
    """A second row is begun while the first one's tensors are still there; others are like it."""
    return range(min(2, query.shape[0]) if _is_fake(query) else query.shape[0])


def _telling(spans: Sequence[_Span]) -> list[_Span]:
    """The largest tile, and the last one, whose tensors outlive the loop."""
    largest = max(spans, key=lambda span: span.pairs)
    return [largest] if largest == spans[-1] else [largest, spans[-1]]


def _count_left_out(query: Tensor, visible: Visible, width: int) -> None:
    """One product of as many numbers as the tiles have that are not run, of a single element."""
    if not _is_fake(query):
        return
    batch, heads = query.shape[:2]
    spans = _spans(visible)
    every = batch * sum(span.pairs for span in spans)
    run = len(_rows(query)) * sum(span.pairs for span in _telling(spans))
    numbers = (every - run) * heads * width
    one = query.new_empty(1, 1, 1)
    torch.bmm(one.expand(1, 1, numbers), one.expand(1, numbers, 1))


def _seen(mask: Tensor, start: int) -> tuple[slice, Tensor, bool]:
    """The keys from the first to the last that is seen, what of them is hidden, and `blind`."""
    if isinstance(mask, FakeTensor):  # which has the sizes and no answers
        return slice(start, start + mask.shape[1]), mask.logical_not(), False
    seen = mask.any(0).nonzero()
    first, last = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 1)
    hidden = mask[:, first:last].logical_not()
    return slice(start + first, start + last), hidden, bool(hidden.all(1).any())


def _chances(asked: Tensor, keys: Tensor, scale: float, tile: _Tile, room: _Room) -> Tensor:
    """What share of its attention each query of a tile gives each key, ``[shared, rows, keys]``."""
    seen = keys[:, tile.keys]
    rows = asked[:, tile.rows]
    shape = (rows.shape[0], rows.shape[1], seen.shape[1])
    scores, chances = room.take(0, shape), room.take(1, shape)
    torch.baddbmm(scores, rows, seen.transpose(1, 2), beta=0, alpha=scale, out=scores)
    by_query = scores.unflatten(1, (-1, tile.heads))
    if tile.causal:
        size = by_query.shape[1]
        by_query[..., -size:].add_(room.later[:size, None, :size])
    elif tile.hidden is not None:
        by_query.masked_fill_(tile.hidden[:, None], float("-inf"))
    torch.softmax(scores, -1, out=chances)
    if tile.blind:
        chances.nan_to_num_(0.0)  # who sees nothing, such as padding, attends to nothing
    return chances
