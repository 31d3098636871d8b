"""The most memory each phase of a run held: what a plan's figures are set beside.

On a GPU the allocator's own marks are read and set back at each change of phase; on a CPU the
kernel's mark of the resident set, where it may be set back, else nothing is known of a phase.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch

from qft import hardware
from qft.lean.heap import trim_heap


class PhasePeaks:
    """Follows one run from phase to phase (`qft.planning.amounts.PHASES`).

    Args:
        device: ``cpu`` or ``cuda``.

    Attributes:
        baseline_bytes: resident before the model was loaded: libraries and rows. On a CPU the
            phases' figures are what came on top.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._phase: str | None = None
        self._most: dict[str, dict[str, int]] = {}
        self._since: dict[str, int] = {}
        self._allocated = 0  # at the most, before CUDA's own mark was last set back
        self.baseline_bytes = 0
        self.rebase()

    def rebase(self) -> None:
        """What is in memory now is no part of the run."""
        self.take()
        self.baseline_bytes = hardware.resident_bytes()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is in memory after it and was not before is no part of the run either."""
        former, before = self._phase, hardware.resident_bytes()
        self.enter(None)
        try:
            yield
        finally:
            gc.collect()
            trim_heap()
            self.baseline_bytes += max(0, hardware.resident_bytes() - before)
            self.enter(former)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase within another one, such as an evaluation between two steps."""
        former = self._phase
        self.enter(name)
        try:
            yield
        finally:
            self.enter(former)

    def enter(self, name: str | None) -> None:
        """The phase at hand is over, and another begins; None is none of them."""
        self.take()
        self._phase = name

    def take(self) -> int | None:
        """The most since this was last asked, in bytes; it counts for the phase at hand.

        Returns:
            Allocated on a GPU; on a CPU resident above the baseline. None where nobody knows.
        """
        if self._cuda:
            allocated = torch.cuda.max_memory_allocated()
            self._allocated = max(self._allocated, allocated)
            self._saw("allocated_bytes", allocated)
            self._saw("reserved_bytes", torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()
            return allocated
        peak = hardware.resident_bytes_since()
        if peak is None:
            return None
        above = max(0, peak - self.baseline_bytes)
        self._saw("resident_bytes", above)
        return above

    def saw_live(self, live_bytes: int) -> None:
        """A meter counted so many bytes of tensors at the fullest moment."""
        self._saw("live_bytes", live_bytes)

    @property
    def floor_bytes(self) -> int:
        """What a run's own bytes begin above: the baseline on a CPU, nothing on a GPU."""
        return 0 if self._cuda else self.baseline_bytes

    def process_peak_bytes(self) -> int:
        """The most so far: allocated on a GPU; on a CPU resident, libraries and all."""
        if not self._cuda:
            return hardware.device_memory("cpu")[1]
        return max(self._allocated, torch.cuda.max_memory_allocated())

    def since_asked(self) -> dict[str, int]:
        """The most since this was last called, whatever the phase; empty where nobody knows."""
        self.take()
        found, self._since = self._since, {}
        return found

    def report(self) -> dict[str, dict[str, Any]]:
        """By phase what is known of it, in bytes; ``resident_bytes`` None is unknown."""
        self.take()
        empty: dict[str, Any] = {} if self._cuda else {"resident_bytes": None}
        return {name: empty | found for name, found in self._most.items()}

    def _saw(self, name: str, value: int) -> None:
        self._since[name] = max(self._since.get(name, 0), value)
        if self._phase is not None:
            found = self._most.setdefault(self._phase, {})
            found[name] = max(found.get(name, 0), value)
