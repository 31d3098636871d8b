"""How the K-quants lie in a file: the bits of codes and of whole-number scales.

The layouts are ggml's (``ggml-common.h``, and the readers in ``ggml-quants.c``). All functions take
``[blocks, 256]`` and give uint8 ``[bytes, blocks]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qft.gguf.scale_search import Blocks
from qft.gguf.super_blocks import scaled, scaled_with_offsets


def encode_q2_k(values: Tensor, weights: Tensor | None) -> Tensor:
    """4-bit scales and offsets of 16 groups, 2-bit codes, two float16 scales."""
    blocks = Blocks(values, weights, 16, 0, 3, turn=True)
    found = scaled_with_offsets(blocks, 15)
    scales, offsets = _bytes(found.scales), _bytes(found.offsets)
    codes = _quarters(_bytes(found.codes))
    halves = [blocks.half_bytes(found.scale), blocks.half_bytes(found.offset)]
    return torch.cat([scales | offsets << 4, codes, *halves])


def encode_q3_k(values: Tensor, weights: Tensor | None) -> Tensor:
    """The third bits of the codes, their low two, 6-bit scales of 16 groups, a float16 scale."""
    blocks = Blocks(values, weights, 16, -4, 3)
    found = scaled(blocks, -32)
    codes, scales = _bytes(found.codes + 4), _bytes(found.scales + 32)
    thirds = _shifted(codes.view(8, 32, -1) >> 2)
    low = scales[:8] & 15 | (scales[8:] & 15) << 4
    high = _shifted((scales >> 4).view(4, 4, -1), 2)
    return torch.cat([thirds, _quarters(codes & 3), low, high, blocks.half_bytes(found.scale)])


def encode_q4_k(values: Tensor, weights: Tensor | None) -> Tensor:
    """Two float16 scales, 6-bit scales and offsets of 8 groups, 4-bit codes."""
    head, codes = _with_eight_groups(values, weights, 15)
    return torch.cat([head, _pairs(codes)])


def encode_q5_k(values: Tensor, weights: Tensor | None) -> Tensor:
    """As Q4_K, with the codes' fifth bits before their low four."""
    head, codes = _with_eight_groups(values, weights, 31)
    fifths = _shifted(codes.view(8, 32, -1) >> 4)
    return torch.cat([head, fifths, _pairs(codes & 15)])


def encode_q6_k(values: Tensor, weights: Tensor | None) -> Tensor:
    """The codes' low four bits, their high two, 8-bit scales of 16 groups, a float16 scale."""
    blocks = Blocks(values, weights, 16, -32, 31)
    found = scaled(blocks, -128)
    codes = _bytes(found.codes + 32)
    halves = (codes & 15).view(2, 2, 64, -1)  # of each 128 numbers the first and the second 64
    low = (halves[:, 0] | halves[:, 1] << 4).flatten(0, 1)
    scales = found.scales.to(torch.int8).view(torch.uint8).flatten(0, 1)
    return torch.cat([low, _quarters(codes >> 4), scales, blocks.half_bytes(found.scale)])


def _with_eight_groups(
    values: Tensor, weights: Tensor | None, highest: int
) -> tuple[Tensor, Tensor]:
    """Q4_K's and Q5_K's first 16 bytes, and the codes ``[256, blocks]``."""
    blocks = Blocks(values, weights, 8, 0, highest, turn=True)
    found = scaled_with_offsets(blocks, 63)
    scales, offsets = _bytes(found.scales), _bytes(found.offsets)
    head = [
        blocks.half_bytes(found.scale),
        blocks.half_bytes(found.offset),
        scales[:4] | scales[4:] >> 4 << 6,  # the high two bits of the last four lie on the first
        offsets[:4] | offsets[4:] >> 4 << 6,
        scales[4:] & 15 | (offsets[4:] & 15) << 4,
    ]
    return torch.cat(head), _bytes(found.codes)


def _bytes(codes: Tensor) -> Tensor:
    """``[groups, numbers, blocks]`` to uint8 ``[all numbers, blocks]``."""
    return codes.to(torch.uint8).flatten(0, 1)


def _pairs(codes: Tensor) -> Tensor:
    """Two codes a byte: of each 64 numbers the first 32 low, the others high."""
    halves = codes.view(4, 2, 32, -1)
    return (halves[:, 0] | halves[:, 1] << 4).flatten(0, 1)


def _quarters(codes: Tensor) -> Tensor:
    """Four codes a byte: of each 128 numbers every 32nd, the first in the lowest bits."""
    return torch.cat([_shifted(part, 2) for part in codes.view(2, 4, 32, -1)])


def _shifted(parts: Tensor, bits: int = 1) -> Tensor:
    """Lays ``[parts, bytes, blocks]`` beside each other, the first in the lowest bits."""
    places = torch.arange(0, bits * parts.shape[0], bits, dtype=torch.uint8)
    return (parts << places[:, None, None]).sum(0, dtype=torch.uint8)
