"""The rows of a source's linear layers as they are quantized, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from qft.merging.bnb_rounding import blocks_of_groups, rows_together
from qft.merging.tensors import MergedTensors, TensorSource


@dataclass(frozen=True)
class Block:
    """Some rows of a layer, ``[out, in]``.

    Attributes:
        part: which.
        base: the base's; None where it has none.
        merged: with the adapter's change, not rounded; the same object where there is none.
        rows: what is quantized: the merged ones in the source's dtype.
    """

    part: range
    base: Tensor | None
    merged: Tensor
    rows: Tensor

    @property
    def changed(self) -> bool:
        """Whether an adapter changes them."""
        return self.base is not None and self.merged is not self.base

    @property
    def plain(self) -> Tensor:
        """What would be quantized of the base alone."""
        assert self.base is not None
        return self.base.to(self.rows.dtype)


class LayerRows:
    """Reads the layers of a source.

    Args:
        linears: names of the layers → whether their module holds the weight transposed.
        groups: whether blocks begin and end with whole groups of 64 weights.
    """

    def __init__(self, source: TensorSource, linears: Mapping[str, bool], *, groups: bool) -> None:
        self._source, self._linears, self._groups = source, linears, groups

    def size(self, name: str) -> tuple[int, int]:
        """Outputs and inputs of a layer, by the name of its weight in the source."""
        height, width = self._source.shape(name)
        return (width, height) if self._turned(name) else (height, width)

    def _turned(self, name: str) -> bool:
        return self._linears[self._source.module(name).removesuffix(".weight")]

    def blocks(self, name: str) -> Iterator[Block]:
        """All rows of a layer.

        A weight that its module holds transposed (GPT-2's) is read whole: each of the rows that are
        quantized needs all of those that are stored.
        """
        size = self.size(name)
        whole = None
        if self._turned(name) or not isinstance(self._source, MergedTensors):
            whole = self._block(name, range(self._source.shape(name)[0]))
        together = rows_together(size[1]) if self._groups else 1
        for part in blocks_of_groups(size, together):
            yield self._block(name, part) if whole is None else self._cut(whole, part, name)

    def _block(self, name: str, part: range) -> Block:
        """Rows of the tensor as the source holds it."""
        if not isinstance(self._source, MergedTensors):
            rows = self._source.read(name)
            return Block(part, rows, rows, rows)
        places = slice(part.start, part.stop)
        base, merged = self._source.pair(name, places)
        return Block(part, base, merged, self._source.as_stored(name, merged, places))

    def _cut(self, whole: Block, part: range, name: str) -> Block:
        turned = self._turned(name)

        def cut(tensor: Tensor) -> Tensor:
            tensor = tensor.T if turned else tensor
            return tensor[part.start : part.stop].contiguous()

        base = None if whole.base is None else cut(whole.base)
        merged = cut(whole.merged) if base is None or whole.changed else base
        return Block(part, base, merged, cut(whole.rows))
