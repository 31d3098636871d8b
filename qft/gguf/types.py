"""How a tensor may be stored in a GGUF file: the block types of ggml.

The numbers are ggml's own (``ggml.h``); a block is so many neighbouring numbers of one row, with
the scales they share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types.

    Attributes:
        number: what stands for it in a file.
        block: numbers a block.
        bytes: bytes a block.
    """

    number: int
    block: int
    bytes: int

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of ``width`` numbers, a multiple of :attr:`block`."""
        return width // self.block * self.bytes


TYPES = {
    "f32": BlockType(0, 1, 4),
    "f16": BlockType(1, 1, 2),
    "q4_0": BlockType(2, 32, 18),
    "q4_1": BlockType(3, 32, 20),
    "q5_0": BlockType(6, 32, 22),
    "q5_1": BlockType(7, 32, 24),
    "q8_0": BlockType(8, 32, 34),
    "q2_k": BlockType(10, 256, 84),
    "q3_k": BlockType(11, 256, 110),
    "q4_k": BlockType(12, 256, 144),
    "q5_k": BlockType(13, 256, 176),
    "q6_k": BlockType(14, 256, 210),
    "iq4_nl": BlockType(20, 32, 18),
    "bf16": BlockType(30, 1, 2),
}


def stored_bytes(kind: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of ``shape`` (the last axis is a row) in the type ``kind``."""
    kept = TYPES[kind]
    return math.prod(shape) // kept.block * kept.bytes


def holds(kind: str, width: int) -> bool:
    """Whether rows of ``width`` numbers fill whole blocks."""
    return width % TYPES[kind].block == 0
