"""What a process on a CPU has in memory beside live tensors.

There are two parts. What is there once: code and tables that the first steps load, kernels made for
this processor, threads' scratch. And what the C library's allocator keeps: freed blocks between
live ones, and what kernels take for themselves. Both were fitted to steps in fresh processes
(`benchmarks/plan_accuracy.py` measures them and judges the fit on others).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MIB = 1 << 20
# growth of a process from its imports to its first steps that no tensor explains
ONCE_BYTES = 66 * MIB
QUANTIZED_BYTES = 0  # bitsandbytes beside that
# of the bytes that come and go, what lies free between live blocks at the fullest moment
KEPT = {"activations": 0.15, "temporary": 0.5, "gradients": 0.5, "optimizer": 0.0}


@dataclass(frozen=True)
class ResidentUnseen:
    """Bytes of the resident set that no tensor explains."""

    once: int
    kept: int


def resident_unseen(by_category: Mapping[str, int], *, quantized: bool = False) -> ResidentUnseen:
    """Of a phase's fullest moment.

    Args:
        by_category: its tensors' bytes.
        quantized: whether weights are held in 4 or 8 bits.
    """
    kept = sum(share * by_category.get(name, 0) for name, share in KEPT.items())
    return ResidentUnseen(ONCE_BYTES + (QUANTIZED_BYTES if quantized else 0), int(kept))
