"""What PyTorch's caching allocator and CUDA take beside tensors: rounding, segments, workspaces.

The sizes are those of PyTorch's own allocator (c10/cuda/CUDACachingAllocator.h, BSD). What depends
on the run, the room between blocks, is a share that was fitted to peaks measured on one card.
Nothing here needs a GPU, or more of the toolkit than this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MIB = 1 << 20
BLOCK_BYTES = 512  # every tensor is rounded up to a multiple
SMALL_BYTES = MIB  # tensors up to here share small segments
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_BYTES = 10 * MIB  # smaller ones than this share large segments
LARGE_SEGMENT_BYTES = 20 * MIB
ROUND_LARGE_BYTES = 2 * MIB  # larger ones have a segment each, a multiple of this
# cuBLAS and cuBLASLt keep theirs through the allocator; what an H200 was seen to add to the meter's
WORKSPACE_BYTES = 64 * MIB
# the driver's share, kernels that were loaded and the like; outside of the allocator, not measured
CONTEXT_BYTES = 600 * MIB
# of what comes and goes, the share that lies between blocks at the peak, and what is always there;
# fitted to the engine's rows of benchmarks/results/gpu.jsonl (`benchmarks/gpu/plan_accuracy.py`)
BETWEEN_BLOCKS = 0.07
ALWAYS_BYTES = 40 * MIB
COME_AND_GO = ("gradients", "activations", "temporary", "key-value cache")


def rounded_bytes(nbytes: int) -> int:
    """What the allocator counts as allocated for a tensor of so many bytes."""
    if nbytes <= 0:
        return 0
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


def segment_bytes(nbytes: int) -> int:
    """What the allocator asks CUDA for where no free block holds a tensor of so many bytes."""
    size = rounded_bytes(nbytes)
    if size <= 0:
        return 0
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


@dataclass
class _Pool:
    """The free rests of the segments of one size, which serve what comes next."""

    least_rest: int
    free: list[int]

    def place(self, size: int, segment: int) -> int:
        """Takes the smallest rest that holds it (best fit), or a segment; bytes newly reserved."""
        fits = [rest for rest in self.free if rest >= size]
        reserved = 0 if fits else segment
        rest = min(fits) if fits else segment
        if fits:
            self.free.remove(rest)
        if rest - size >= self.least_rest:  # else the rest stays with the tensor
            self.free.append(rest - size)
        return reserved


def reserved_by(tensor_bytes: Iterable[int]) -> int:
    """What the allocator reserves for tensors that come one after another and all stay."""
    small, large = _Pool(BLOCK_BYTES, []), _Pool(SMALL_BYTES + 1, [])
    reserved = 0
    for nbytes in tensor_bytes:
        size = rounded_bytes(nbytes)
        if size:
            pool = small if size <= SMALL_BYTES else large
            reserved += pool.place(size, segment_bytes(nbytes))
    return reserved


@dataclass(frozen=True)
class CudaUnseen:
    """What a phase takes of a GPU beside its tensors, in bytes.

    Attributes:
        allocated: rounding and workspaces: what `torch.cuda.max_memory_allocated` has beside
            the meter's count.
        between: what `torch.cuda.max_memory_reserved` has beside that.
        context: what the card loses beside that.
    """

    allocated: int
    between: int
    context: int = CONTEXT_BYTES


def cuda_unseen(by_category: Mapping[str, int], tensors: int = 0) -> CudaUnseen:
    """Of a phase's fullest moment.

    Args:
        by_category: its tensors' bytes.
        tensors: how many there are, about; each is rounded by half a block on average.
    """
    comes_and_goes = sum(by_category.get(name, 0) for name in COME_AND_GO)
    rounding = tensors * BLOCK_BYTES // 2
    between = ALWAYS_BYTES + int(BETWEEN_BLOCKS * comes_and_goes)
    return CudaUnseen(WORKSPACE_BYTES + rounding, between)
