"""Whole numbers in as few bits as they need: the ids of a vocabulary of 128,256 in 17, not 64.

The bits of a row follow one another, the lowest of each number first; a row begins at a byte, so
that each can be read alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_BITS = 24


def bits_for(choices: int) -> int:
    """Bits that tell ``choices`` numbers apart, counted from 0."""
    return max(1, (choices - 1).bit_length())


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a row of ``count`` numbers."""
    return -(-count * bits // 8)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Packs each row.

    Args:
        numbers: ``[rows, count]``, of any whole type, from 0 to ``2 ** bits - 1``.
        bits: of each number, at most 24.

    Returns:
        uint8 ``[rows, packed_bytes(count, bits)]``.

    Raises:
        ValueError: a number needs more bits.
    """
    rows, count = numbers.shape
    if not 1 <= bits <= _MOST_BITS:
        raise ValueError(f"numbers of 1 to {_MOST_BITS} bits can be packed, not of {bits}")
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < 1 << bits:
        raise ValueError(f"a number does not fit into {bits} bits")
    starts = torch.arange(packed_bytes(count, bits), device=numbers.device) * 8
    first, offset = starts // bits, starts % bits
    most = (bits + 6) // bits  # numbers, beside the first, that a byte may hold a part of
    wide = torch.nn.functional.pad(numbers.to(torch.int64), (0, most + 1))
    found = torch.zeros(rows, len(starts), dtype=torch.int64, device=numbers.device)
    for further in range(most + 1):
        part, shift = wide[:, first + further], offset - further * bits
        found |= (part >> shift.clamp(min=0)) << (-shift).clamp(min=0)
    return (found & 255).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """What `pack` was given: int64 ``[rows, count]``."""
    starts = torch.arange(count, device=packed.device) * bits
    first, offset = starts // 8, starts % 8
    most = (bits + 6) // 8  # bytes, beside the first, that a number may lie in
    wide = torch.nn.functional.pad(packed, (0, most + 1))
    found = torch.zeros(packed.shape[0], count, dtype=torch.int64, device=packed.device)
    for further in range(most + 1):
        found |= wide[:, first + further].to(torch.int64) << (8 * further)
    return (found >> offset) & ((1 << bits) - 1)
