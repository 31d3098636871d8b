"""Blocks that are mapped leave nothing behind; other systems have no such thing."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from qft.lean import heap

GLIBC = hasattr(ctypes.CDLL(None), "mallopt")

# large blocks come and go, of each a small part stays: as while a model is quantized
HOLES = """
import contextlib, sys, torch
from qft import hardware
from qft.lean import heap
inside = heap.large_blocks_mapped() if sys.argv[1] == "mapped" else contextlib.nullcontext()
warm = [torch.ones(1 << 20) for _ in range(8)]
del warm
heap.trim_heap()
before, kept = hardware.resident_bytes(), []
with inside:
    for _ in range(40):
        large = torch.ones(2 << 20, dtype=torch.float32)
        kept.append(large[: 1 << 17].clone())
        del large
    print(hardware.resident_bytes() - before)
"""


@pytest.mark.skipif(not GLIBC, reason="this C library has no mallopt")
def test_mapped_blocks_leave_no_holes():
    def grown(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", HOLES, how], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    mapped = grown("mapped")
    assert 40 * (1 << 19) <= mapped < 32 * (1 << 20)
    assert mapped <= grown("plain")


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    def none_such(name: object) -> object:
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", none_such)
    heap.trim_heap()
    with heap.large_blocks_mapped():
        pass
