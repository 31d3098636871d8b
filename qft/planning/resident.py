"""What a process on a CPU has in memory beside live tensors.

Four parts. What is there once: code and tables that the first steps load. The kernels that oneDNN
makes for 16-bit matrix products, one for each shape it meets, and keeps: rows of many lengths are
many shapes, and each costs about 0.7 MiB (float32 products cost none). And what the C library
keeps: freed blocks between live ones. And a checkpoint's file, which is mapped: as long as one
tensor lives in it, all that was read of it counts, quantized weights' originals too; what was never
read (rows of an embedding) does not count, though its tensor is alive.

All figures were measured with glibc 2.36 and one thread, in fresh processes, of steps and of single
products in many shapes; a machine's own residuals (`qft.planning.calibration`) shift the sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MIB = 1 << 20
ONCE_BYTES = 34 * MIB  # growth of a process from its imports to its first steps
KERNEL_BYTES = int(0.7 * MIB)  # of one shape of product, in 16 bits
MOST_KERNELS = 1024  # oneDNN forgets the oldest beyond (ONEDNN_PRIMITIVE_CACHE_CAPACITY)
KERNELS_A_WIDTH = 25  # products of a forward and a backward pass that a number of tokens decides
KERNELS_A_TILE = 7  # and of attention's tiles, for each length of an example
TILE = 128  # tokens; `qft.lean.attention.TILE`
# of the bytes that come and go, what lies free between live blocks at the fullest moment
KEPT = {"activations": 0.35, "temporary": 0.15}
# a layer that is run again in the backward pass leaves more of it
KEPT_RECOMPUTED, KEPT_RECOMPUTED_FLOAT32 = 1.2, 3.5


@dataclass(frozen=True)
class Work:
    """What a training does, as far as it decides what a process keeps.

    Attributes:
        half: products are of 16-bit numbers.
        recomputed: layers are run again in the backward pass.
        kernels: shapes of products, see `kernels_of`.
        file_bytes: of the checkpoint's file, beside what tensors live in: what is still mapped of
            weights that were quantized; or, below zero, mapped tables of which few rows are read.
    """

    half: bool
    recomputed: bool
    kernels: int = KERNELS_A_WIDTH
    file_bytes: int = 0


@dataclass(frozen=True)
class ResidentUnseen:
    """Bytes of the resident set that no tensor explains.

    Attributes:
        once: code, tables, kernels, and what is mapped of a file.
        kept: freed, and not given back.
    """

    once: int
    kept: int


def resident_unseen(by_category: Mapping[str, int], work: Work) -> ResidentUnseen:
    """Of a phase's fullest moment, whose tensors' bytes are ``by_category``."""
    kept = sum(share * by_category.get(name, 0) for name, share in KEPT.items())
    if work.recomputed:
        share = KEPT_RECOMPUTED if work.half else KEPT_RECOMPUTED_FLOAT32
        kept += share * by_category.get("temporary", 0)
    kernels = KERNEL_BYTES * min(MOST_KERNELS, work.kernels) if work.half else 0
    return ResidentUnseen(max(0, ONCE_BYTES + kernels + work.file_bytes), int(kept))


def kernels_of(lengths: Sequence[int], micro_batch: int, micro_batches: int, flat: bool) -> int:
    """About how many shapes of matrix products a training meets.

    Args:
        lengths: tokens of each example.
        micro_batch: examples a forward pass.
        micro_batches: different ones that the whole training has, at most.
        flat: a micro-batch is one long row, and attention takes each example by itself; else all
            are as wide as the longest.
    """
    if not lengths:
        return KERNELS_A_WIDTH
    distinct = set(lengths)
    spread = max(distinct) - min(distinct)
    widths = micro_batch * spread + 1 if flat else len(distinct)
    tiles = sum(math.ceil(length / TILE) for length in distinct) if flat else 0
    return KERNELS_A_WIDTH * max(1, min(widths, micro_batches)) + KERNELS_A_TILE * tiles
