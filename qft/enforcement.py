"""`memory.budget` is kept to: by CUDA's allocator, or on a CPU by looking at every micro-batch.

On a GPU the allocator may reserve the budget less what the CUDA context takes beside it. On a CPU,
where the system would rather kill the process than refuse, a micro-batch raises the error that a
GPU's allocator raises, in two cases:

- its live bytes pass the budget, by the meter, at the very operation that does it. Counting every
  operation costs 1.4 to 3 times the time of a small model's step, so that only a micro-batch is
  metered that is larger (examples, tokens, labels) than all that were metered and found within;
- the resident set has grown beyond the budget since the libraries were there. Its high-water mark
  is read after every micro-batch, which costs 0.1 ms; where the kernel does not let it be set back,
  the resident set at the end of the micro-batch is read instead.

Without a budget nothing is enforced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from qft import hardware
from qft.budget import STATE_BYTES
from qft.lean.heap import trim_heap
from qft.lean.meter import Meter
from qft.out_of_memory import OverBudgetError
from qft.phase_peaks import PhasePeaks
from qft.progress import human_bytes

Phase = Literal["train", "evaluate", "generate"]
CONTEXT_BYTES = 512 * 2**20  # of CUDA, where other processes hide what ours takes
RESERVE = 0.05  # share of the free memory that `auto` leaves to others
LEAST_RESERVE_BYTES = 128 * 2**20
NEARLY = 0.8  # share of the budget from which the heap is trimmed beforehand


class Limit:
    """One run's budget, and what it was seen to take.

    Args:
        budget: bytes, ``auto``, or None for none.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, budget: int | Literal["auto"] | None, device: str) -> None:
        self.device = device
        self.peaks = PhasePeaks(device)
        self.budget_bytes = _free_for_us(device) if budget == "auto" else budget
        self._model: nn.Module | None = None
        self._optimizer: Any = None
        self._state_bytes = 0.0  # of each trained number
        self._within: dict[str, list[tuple[int, ...]]] = {}
        self._trims = False

    @property
    def tensor_bytes(self) -> int | None:
        """What tensors may take of the budget; on a CPU the resident set has a say as well."""
        if self.budget_bytes is None or self.device != "cuda":
            return self.budget_bytes
        return max(0, self.budget_bytes - context_bytes())

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        """Within it the budget holds for all that this process does; afterwards it is as before."""
        global _limit
        if self.budget_bytes is None:
            yield
            return
        former, _limit = _limit, self
        try:
            with _allocator_fraction(self.tensor_bytes if self.device == "cuda" else None):
                yield
        finally:
            _limit = former

    def watch(self, model: nn.Module, optimizer: Any, optimizer_name: str) -> None:
        """From now on micro-batches are looked at (on a CPU)."""
        self._model, self._optimizer = model, optimizer
        self._state_bytes = STATE_BYTES[optimizer_name]

    @contextlib.contextmanager
    def micro_batch(self, phase: Phase, size: tuple[int, ...]) -> Iterator[None]:
        """Looks at one; see `within_budget`."""
        if self._model is None or self.budget_bytes is None or self.device == "cuda":
            yield
            return
        if self._trims and hardware.resident_bytes() > NEARLY * self.budget_bytes:
            trim_heap()
        self.peaks.take()
        known = self._within.setdefault(phase, [])
        if any(all(a <= b for a, b in zip(size, seen, strict=True)) for seen in known):
            yield
        else:
            with self._metered(self.budget_bytes - self._to_come()):
                yield
            known[:] = [s for s in known if not all(b <= a for a, b in zip(size, s, strict=True))]
            known.append(size)
        self._require_resident_within(self.budget_bytes)

    def rehearsed(self) -> contextlib.AbstractContextManager[None]:
        """Around a rehearsal: its live bytes are counted on a CPU, with a budget or without."""
        plain = self.budget_bytes is not None or self.device == "cuda"
        return contextlib.nullcontext() if plain else self._metered(None)

    @contextlib.contextmanager
    def _metered(self, allowed: int | None) -> Iterator[None]:
        counting = Meter(self._model, self._optimizer, ceiling=allowed)
        try:
            with counting:
                yield
        except torch.OutOfMemoryError as error:
            if allowed is None:
                raise
            held = counting.reading().peak.by_category
            text = (
                f"more than {human_bytes(sum(held.values()))} of tensors, "
                f"{human_bytes(allowed)} are allowed"
            )
            raise OverBudgetError(text, held) from error
        self.peaks.saw_live(counting.reading().peak_bytes)

    def _to_come(self) -> int:
        """Optimizer states that are not there before the first step."""
        assert self._model is not None
        if self._optimizer is None or self._optimizer.state:
            return 0
        trained = sum(p.numel() for p in self._model.parameters() if p.requires_grad)
        return int(self._state_bytes * trained)

    def _require_resident_within(self, allowed: int) -> None:
        peak = self.peaks.take()
        if peak is None:
            peak = hardware.resident_bytes() - self.peaks.baseline_bytes
        if peak > allowed:
            self._trims = True
            raise OverBudgetError(
                f"the resident set grew by {human_bytes(peak)}, {human_bytes(allowed)} are allowed",
                {"resident, beyond the libraries": peak},
                idle=True,
            )


_limit: Limit | None = None  # of this process, as CUDA's own is


def within_budget(
    phase: Phase, examples: int, tokens: int, labels: int
) -> contextlib.AbstractContextManager[None]:
    """Around one micro-batch: forward, and backward where there is one.

    Args:
        phase: what fits in one says nothing of another.
        tokens: with padding.

    Raises:
        torch.OutOfMemoryError: it took more than the budget, on a CPU.
    """
    if _limit is None:
        return contextlib.nullcontext()
    return _limit.micro_batch(phase, (examples, tokens, labels))


def context_bytes() -> int:
    """What CUDA takes of the device beside the allocator's memory, as far as it can be told."""
    free, total = torch.cuda.mem_get_info()
    beside = total - free - torch.cuda.memory_reserved()
    return int(min(beside, CONTEXT_BYTES))  # more than that is another process's


def _free_for_us(device: str) -> int | None:
    """What is free, with what this process has already, less a reserve."""
    free = hardware.free_memory_bytes(device)
    if free is None:
        return None
    reserve = max(LEAST_RESERVE_BYTES, int(RESERVE * free))
    own = context_bytes() + torch.cuda.memory_reserved() if device == "cuda" else 0
    return max(0, free + own - reserve)


@contextlib.contextmanager
def _allocator_fraction(allowed: int | None) -> Iterator[None]:
    """CUDA's caching allocator reserves no more than this; None leaves it alone."""
    if allowed is None:
        yield
        return
    read: Any = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)
    former = float(read())
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(former)
