"""When memory runs out: what is known of it, and what can be freed without giving anything up."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from qft.errors import first_line
from qft.lean.heap import trim_heap
from qft.progress import human_bytes

Made = TypeVar("Made")

# what frameworks say that have no type for it
_WORDS = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class OverBudgetError(torch.OutOfMemoryError):
    """A CPU's micro-batch passed `memory.budget`: what a GPU's allocator raises of itself.

    Attributes:
        held: bytes by category when it happened, where a meter was counting.
        idle: whether memory that nobody uses may be to blame.
    """

    def __init__(self, text: str, held: Mapping[str, int] | None = None, idle: bool = False):
        super().__init__(text)
        self.held = dict(held or {})
        self.idle = idle


@dataclass(frozen=True)
class Shortage:
    """What is known once memory has run out. It holds no traceback: that holds the tensors.

    Attributes:
        message: the first line of the error.
        fragmented: whether memory that was reserved and idle could have held what was asked.
        held: bytes by category on the device, as far as they are known.
    """

    message: str
    fragmented: bool = False
    held: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, error: BaseException) -> Shortage:
        """To be asked while the error is being handled: reserved memory is still as it was."""
        if isinstance(error, OverBudgetError):
            return cls(first_line(error), error.idle, error.held)
        asked, idle = asked_bytes(error), 0
        held: dict[str, int] = {}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            allocated = torch.cuda.memory_allocated()
            idle = torch.cuda.memory_reserved() - allocated
            held = {"allocated": allocated, "reserved, idle": idle}
        return cls(first_line(error), asked is not None and idle >= asked, held)

    @property
    def numbers(self) -> str:
        """The bytes by category in one line, the largest first; empty where none are known."""
        largest = sorted(self.held.items(), key=lambda pair: -pair[1])
        return ", ".join(f"{name} {human_bytes(size)}" for name, size in largest if size)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in _WORDS)


def asked_bytes(error: BaseException) -> int | None:
    """How much was wanted when it ran out, where the message says so."""
    found = _ASKED.search(str(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def tried(run: Callable[[], Made]) -> Made | Shortage:
    """What ``run`` made, or how memory ran out; every other error goes on its way."""
    try:
        return run()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return Shortage.of(error)


def free_idle_memory() -> None:
    """Rings of dead objects, and what allocators keep for later, go back to the system."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim_heap()
