"""What a process on a CPU has in memory beside live tensors.

Four parts. What is there once: code and tables that the first steps load. The kernels that oneDNN
makes for 16-bit matrix products, one for each shape it meets, and keeps: rows of many lengths are
many shapes, and each costs about 0.7 MiB (float32 products cost none). What the C library keeps:
small objects settle in the holes that freed tensors leave, and the next tensor of that size needs
new room; so the more a step makes and frees, the more is kept, and large gradients do not find
room where activations were. And a checkpoint's file, which is mapped: what was never read of it
(rows of an embedding) does not count, though its tensor is alive.

The figures were measured with glibc 2.36 and one thread, of single products in many shapes, and of
the trainings in `benchmarks/plan_resident.py`; the same training twice differs by up to 5 %. A
machine's own residuals (`qft.planning.calibration`) shift the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from qft.planning.amounts import StepWork

MIB = 1 << 20
LOADED_BYTES = 4 * MIB  # growth of a process from its imports to a model that is loaded
ONCE_BYTES = 25 * MIB  # and to its first steps
KERNEL_BYTES = int(0.7 * MIB)  # of one shape of product, in 16 bits
MOST_KERNELS = 1024  # oneDNN forgets the oldest beyond (ONEDNN_PRIMITIVE_CACHE_CAPACITY)
KEPT = 0.2  # of the activations that wait for the backward pass
HOLES, HOLES_FLOAT32 = 0.03, 0.055  # of all that a step makes


@dataclass(frozen=True)
class Work:
    """What a process did until a phase's fullest moment, as far as it decides what it keeps.

    Attributes:
        half: products are of 16-bit numbers.
        step: the training's; None: it has not trained yet.
        kernels: shapes of products that the whole training meets.
        unread_bytes: of mapped tables of which few rows are read.
    """

    half: bool
    step: StepWork | None = None
    kernels: int = 0
    unread_bytes: int = 0


@dataclass(frozen=True)
class ResidentUnseen:
    """Bytes of the resident set that no tensor explains.

    Attributes:
        once: code, tables and kernels; less than nothing where tables are not read.
        kept: freed, and not given back.
    """

    once: int
    kept: int


def resident_unseen(work: Work, live_bytes: int) -> ResidentUnseen:
    """Of a process that did this work.

    Args:
        live_bytes: of tensors, at the phase's fullest moment.
    """
    if work.step is None:
        return ResidentUnseen(LOADED_BYTES - work.unread_bytes, 0)
    kernels = KERNEL_BYTES * min(MOST_KERNELS, work.kernels) if work.half else 0
    holes = HOLES if work.half else HOLES_FLOAT32
    kept = int(KEPT * work.step.kept_bytes + holes * work.step.made_bytes)
    kept = max(kept, work.step.apart_bytes - live_bytes)
    return ResidentUnseen(ONCE_BYTES + kernels - work.unread_bytes, kept)
