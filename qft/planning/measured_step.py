"""What a training's step really holds: the planner's numbers are judged by it.

The training is `qft.train` itself, with a callback that counts one of its steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qft import hardware
from qft.data.tasks import Example
from qft.lean.meter import Meter, Reading
from qft.recipe import Recipe
from qft.strategy import Strategy
from qft.trainer import StepBatches
from qft.training import train

METERED_STEP = 3  # the second is as large, and is left alone: a meter takes memory itself


@dataclass(frozen=True)
class MeasuredStep:
    """One step of a real training.

    Attributes:
        reading: live bytes of tensors; weights are the model's as the step found it.
        resident_load_bytes: the most the process had in memory until the first step.
        resident_peak_bytes: the most it had in the two steps before the metered one.
    """

    reading: Reading
    resident_load_bytes: int
    resident_peak_bytes: int


def measured_step(recipe: Recipe) -> MeasuredStep:
    """Trains three steps and counts the last.

    Args:
        recipe: it trains as many steps as it is told to here, into a folder that must be new.

    Raises:
        QftError: as `qft.train`.
    """
    settings = recipe.train.model_copy(
        update={"max_steps": METERED_STEP, "save_every": 10**6, "eval_every": None}
    )
    watch = _Watch(recipe.strategy)
    train(recipe.model_copy(update={"train": settings}), callbacks=[watch])
    assert watch.reading is not None
    return MeasuredStep(watch.reading, watch.resident_load_bytes, watch.resident_peak_bytes)


def examples_of_step(
    recipe: Recipe, examples: Sequence[Example], step: int = METERED_STEP
) -> list[Example]:
    """Those of one optimizer step (from 1), in the order the training has them."""
    batches = StepBatches(len(examples), recipe.train.batch_size, recipe.train.seed)
    batches.epoch, within = divmod(step - 1, len(batches))
    return [examples[number] for number in list(batches)[within]]


class _Watch(TrainerCallback):
    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self.reading: Reading | None = None
        self.resident_load_bytes = self.resident_peak_bytes = 0
        self._meter: Meter | None = None

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        if state.global_step == 0:
            self.resident_load_bytes = hardware.device_memory("cpu")[1]
            forget_peak()
        if state.global_step + 1 == METERED_STEP:
            self.resident_peak_bytes = hardware.device_memory("cpu")[1]
            self._meter = Meter(model, optimizer)
            self._meter.__enter__()
            self._meter.hold(self._strategy.state(model)[0].values())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
            self.reading = self._meter.reading()
            self._meter = None


def forget_peak() -> None:
    """Lets the kernel count this process's fullest moment from now on, where it can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
