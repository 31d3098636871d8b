"""Types with one scale for 32 numbers: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL.

The layouts are ggml's (``ggml-common.h``); :mod:`qft.gguf.scale_search` finds scale and offset.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qft.gguf.scale_search import (
    Blocks,
    best_line,
    best_scale,
    kept,
    refitted_line,
    refitted_scale,
)

# How far outside the range of codes a block's extremes are tried to lie.
_BEYOND = (-0.15, -0.08, 0.0, 0.04, 0.08, 0.12, 0.18, 0.25, 0.4, 0.7)
_ENDS = ((0.0, 0.0), (0.0, 0.5), (0.0, -0.5), (-0.5, -0.5), (-0.5, 0.0), (-0.5, 0.5),
         (-0.25, 0.0), (-0.25, 0.5), (0.25, 0.0), (-1.0, 1.0))  # fmt: skip
_MORE_ENDS = ((-2.0, 2.0), (-2.0, 0.0), (0.0, 2.0), (-1.0, 0.0), (0.0, 1.0), (-0.75, 0.75),
              (-4.0, 0.0), (0.0, 4.0))  # fmt: skip
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def encode_q4_0(values: Tensor, weights: Tensor | None) -> Tensor:
    """A float16 scale, then 4-bit codes, 8 above what they stand for.

    Args:
        values: ``[blocks, 32]``.
        weights: ``[blocks, 32]``, positive; None is all alike.

    Returns:
        uint8 ``[bytes, blocks]``, as all of this file.
    """
    blocks = Blocks(values, weights, 1, -8, 7)
    scale = _scaled(blocks)
    codes = _bytes(blocks.codes(scale) + 8)
    return torch.cat([blocks.half_bytes(scale), _nibbles(codes)])


def encode_q5_0(values: Tensor, weights: Tensor | None) -> Tensor:
    """A float16 scale, the fifth bits, then the low 4 bits of codes that are 16 too high."""
    blocks = Blocks(values, weights, 1, -16, 15)
    scale = _scaled(blocks)
    codes = _bytes(blocks.codes(scale) + 16)
    return torch.cat([blocks.half_bytes(scale), _fifth_bits(codes), _nibbles(codes & 15)])


def encode_q4_1(values: Tensor, weights: Tensor | None) -> Tensor:
    """Scale and offset in float16, then 4-bit codes."""
    blocks = Blocks(values, weights, 1, 0, 15)
    scale, offset = _lined(blocks)
    codes = _bytes(blocks.codes(scale, offset))
    return torch.cat([blocks.half_bytes(scale), blocks.half_bytes(offset), _nibbles(codes)])


def encode_q5_1(values: Tensor, weights: Tensor | None) -> Tensor:
    """Scale and offset in float16, the fifth bits, then the low 4 bits."""
    blocks = Blocks(values, weights, 1, 0, 31)
    scale, offset = _lined(blocks)
    codes = _bytes(blocks.codes(scale, offset))
    halves = [blocks.half_bytes(scale), blocks.half_bytes(offset)]
    return torch.cat([*halves, _fifth_bits(codes), _nibbles(codes & 15)])


def encode_q8_0(values: Tensor, weights: Tensor | None) -> Tensor:
    """A float16 scale, then 32 signed bytes."""
    blocks = Blocks(values, weights, 1, -127, 127)
    whole = blocks.largest() / 127
    scale = _exact(blocks, [whole, refitted_scale(blocks, whole), whole * (127 / 127.5)])
    codes = blocks.codes(scale).to(torch.int8).view(torch.uint8)[0]
    return torch.cat([blocks.half_bytes(scale), codes])


def encode_iq4_nl(values: Tensor, weights: Tensor | None) -> Tensor:
    """A float16 scale, then 4-bit places in a table of 16 unevenly spaced values."""
    blocks = _TableBlocks(values, weights)
    targets = [low * (1 + part) for part in _BEYOND[:7] for low in (-127.0, 113.0)]
    fitted = best_scale(blocks, targets)
    scale = _exact(blocks, [fitted, refitted_scale(blocks, fitted), blocks.largest() / -127])
    places = torch.bucketize(blocks.codes(scale), torch.tensor(_IQ4_VALUES, dtype=torch.float32))
    return torch.cat([blocks.half_bytes(scale), _nibbles(_bytes(places))])


class _TableBlocks(Blocks):
    """Blocks whose codes are the values of IQ4_NL's table."""

    def __init__(self, values: Tensor, weights: Tensor | None) -> None:
        super().__init__(values, weights, 1, _IQ4_VALUES[0], -_IQ4_VALUES[0])
        table = torch.tensor(_IQ4_VALUES, dtype=torch.float32)
        whole = torch.arange(self.low, self.high + 1)
        self._nearest_value = table[(whole[:, None] - table).abs().argmin(1)]

    def _nearest(self, scaled: Tensor) -> Tensor:
        whole = super()._nearest(scaled)
        return whole.copy_(self._nearest_value[whole.sub_(self.low).int()])


def _scaled(blocks: Blocks) -> Tensor:
    """The best scale that float16 holds."""
    targets = [blocks.low * (1 + part) for part in _BEYOND]
    targets += [blocks.high * (1 + part) for part in _BEYOND[2:6]]
    fitted = best_scale(blocks, targets)
    again = refitted_scale(blocks, fitted)
    return _exact(blocks, [fitted, again, blocks.largest() / blocks.low])


def _exact(blocks: Blocks, scales: list[Tensor]) -> Tensor:
    """Of several scales the best, as float16 holds them."""
    best: tuple[Tensor, ...] | None = None
    for scale in map(blocks.half, scales):
        tried = (blocks.error(scale), scale)
        best = tried if best is None else kept(tried, best)
    assert best is not None
    return best[1]


def _lined(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """The best scale and offset that float16 holds."""
    bottom, top = blocks.values.amin(1, keepdim=True), blocks.values.amax(1, keepdim=True)
    ends = _ENDS if blocks.weights is None else _ENDS + _MORE_ENDS
    fitted = best_line(blocks, ends, offset_below_zero=False)
    held = blocks.half(bottom)  # what its rounding has left may go to the scale
    lines = [fitted, refitted_line(blocks, *fitted)]
    lines += [((top - start) / blocks.high, bottom) for start in (bottom, held)]
    best: tuple[Tensor, ...] | None = None
    for pair in lines:
        scale, offset = map(blocks.half, pair)
        tried = (blocks.error(scale, offset), scale, offset)
        best = tried if best is None else kept(tried, best)
    assert best is not None
    return best[1], best[2]


def _bytes(codes: Tensor) -> Tensor:
    """``[1, 32, blocks]`` to uint8 ``[32, blocks]``."""
    return codes[0].to(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    """Two codes a byte: number j in the low half, number j + 16 in the high one."""
    return codes[:16] | codes[16:] << 4


def _fifth_bits(codes: Tensor) -> Tensor:
    """The fifth bits of 32 codes, eight a byte, the first in the lowest bit."""
    bits = (codes >> 4 & 1).view(4, 8, -1)
    return (bits << torch.arange(8, dtype=torch.uint8)[:, None]).sum(1, dtype=torch.uint8)
