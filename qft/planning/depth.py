"""`step_reading`: what a training step holds, soon enough for a search to ask many times.

Only layers that differ run (`qft.planning.short_training`); a prepared model is kept for the next
question of its kind, and a question that was asked before is answered from memory.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

from qft.data.encoding import UNSUPERVISED
from qft.data.tasks import Example
from qft.lean.timeline import Reading
from qft.planning.job import PlannedJob
from qft.planning.short_training import ShortTraining

KEPT_TRAININGS, KEPT_READINGS = 3, 4096
Value = TypeVar("Value")


def step_reading(
    job: PlannedJob, examples: Sequence[Example] | None = None, micro_batch: int | None = None
) -> Reading:
    """The second training step on these examples, as of all layers.

    Exact, but for what a strategy computes from all layers' parameters outside of the layers
    (AdaLoRA's orthogonality, some kilobytes to megabytes): of that only some is counted.

    Args:
        job: what is trained.
        examples: of one optimizer step; None is the micro-batch that needs most.
        micro_batch: examples a forward pass; None is the job's.
    """
    chosen = job.longest() if examples is None else examples
    count = micro_batch or job.micro_batch
    model = _model_key(job)
    question = (model, _step_key(job), tuple(_row_key(e) for e in chosen), count)
    found = _readings.find(question)
    if found is None:
        training = _trainings.find(model)
        if training is None or not training.suits(job):
            training = ShortTraining(job)
            _trainings.keep(model, training)
        found = training.meter(job, chosen, count)
        _readings.keep(question, found)
    return found


def forget() -> None:
    """Frees what is kept for the next question."""
    _trainings.clear()
    _readings.clear()


class Kept(Generic[Value]):
    """The values that were asked for last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def find(self, key: Hashable) -> Value | None:
        """What is kept of this question, if it is."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def keep(self, key: Hashable, value: Value) -> None:
        """The one that was asked for longest ago makes room."""
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > self._most:
            self._values.popitem(last=False)

    def clear(self) -> None:
        """All of it is forgotten."""
        self._values.clear()


_trainings: Kept[ShortTraining] = Kept(KEPT_TRAININGS)
_readings: Kept[Reading] = Kept(KEPT_READINGS)


def _model_key(job: PlannedJob) -> Hashable:
    """What decides the prepared model, but for which layers recompute."""
    recipe, ready = job.recipe, job.ready
    config = (job.inputs.base / "config.json").read_bytes()
    return (
        hashlib.sha256(config).hexdigest(),
        replace(ready.spec, source="", device=None),
        ready.held,
        ready.needs,
        type(recipe.strategy),
        recipe.strategy.model_dump_json(),
        recipe.memory.savers.model_dump_json(),
        ready.context.total_steps,
        job.device,
    )


def _step_key(job: PlannedJob) -> Hashable:
    """What else decides a step's bytes, but for its rows."""
    memory, train = job.recipe.memory, job.recipe.train
    packed = train.max_length if train.packing else None
    smoothed = train.label_smoothing > 0
    return (memory.checkpointing, memory.offload, packed, smoothed, train.group_by_length, job.flat)


def _row_key(example: Example) -> Hashable:
    """A row's lengths, and how many of its tokens have a label."""
    return tuple((name, _size(value)) for name, value in sorted(example.inputs.items()))


def _size(value: Any) -> Hashable:
    if not isinstance(value, list):
        return type(value).__name__
    supervised = len(value) - value.count(UNSUPERVISED)
    return len(value), supervised, bool(value) and value[0] != UNSUPERVISED
