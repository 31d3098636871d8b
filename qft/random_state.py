"""The state of every random generator a training draws from: taken, and put back."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """Python's, NumPy's and torch's generators at one moment.

    Attributes:
        cuda: of every CUDA device that is in use.
    """

    python: Any
    numpy: Any
    torch: Tensor
    cuda: tuple[Tensor, ...]

    @classmethod
    def now(cls) -> RandomState:
        """As they are; no number is drawn."""
        used = torch.cuda.is_available() and torch.cuda.is_initialized()
        return cls(
            random.getstate(),
            numpy.random.get_state(),
            torch.get_rng_state(),
            tuple(torch.cuda.get_rng_state_all()) if used else (),
        )

    def restore(self) -> None:
        """From now on they draw again what they drew since."""
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
