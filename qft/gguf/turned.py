"""Tensors that stand otherwise in a GGUF file than in a checkpoint, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from qft.merging.tensors import RowSource
from qft.shards import row_blocks

Blocks = Callable[[], Iterator[Tensor]]


def reordered(source: RowSource, name: str, heads: int) -> Blocks:
    """The tensor in blocks of whole heads, each reordered by :func:`reorder_rows`."""
    shape = source.shape(name)
    size = shape[0] // heads

    def blocks() -> Iterator[Tensor]:
        for part in row_blocks((heads, size, *shape[1:])):
            rows = source.rows(name, slice(part.start * size, part.stop * size))
            yield reorder_rows(rows, part.stop - part.start)

    return blocks


def reorder_rows(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection: each head's two halves interleaved.

    transformers rotates the pairs (i, i + d/2) of a head, llama.cpp's Llama the pairs (2i, 2i + 1).
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def plus_one(source: RowSource, name: str) -> Blocks:
    """A norm that multiplies by 1 + weight, as the factor itself, in float32."""

    def blocks() -> Iterator[Tensor]:
        for block in source.blocks(name):
            yield block.float() + 1

    return blocks


def transposed(source: RowSource, name: str) -> Blocks:
    """A matrix stored ``[in, out]`` as ``[out, in]``; it is in memory whole while it is written."""

    def blocks() -> Iterator[Tensor]:
        whole = source.read(name).T
        for part in row_blocks(tuple(whole.shape)):
            yield whole[part].contiguous()

    return blocks
