"""The C library's heap: what was freed goes back to the system, or never lies in it (glibc)."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_MIB = 1 << 20
MAPPED_FROM = _MIB  # bytes of a block, while large ones are mapped
# where glibc's own moving thresholds come to rest once large blocks were freed
_USUAL_MAPPED, _USUAL_TRIM = 32 * _MIB, 64 * _MIB


def trim_heap() -> None:
    """Free pages go back to the system."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def large_blocks_mapped() -> Iterator[None]:
    """Within it each block of a MiB or more is memory of its own, gone once it is freed.

    Where large tensors come and smaller ones stay, as while a model is quantized, the small ones
    settle in the holes of the large, and the next large one finds no room: the heap grew to twice
    what was alive (int8, 676 to 810 MB for 460). Asking the system for each block costs time
    (a tenth to a half of loading), so that it is for phases only.
    """
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _USUAL_MAPPED)
        mallopt(_M_TRIM_THRESHOLD, _USUAL_TRIM)


def _mallopt() -> Any:
    with contextlib.suppress(OSError, AttributeError, TypeError):
        return ctypes.CDLL(None).mallopt
    return None
