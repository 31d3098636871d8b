"""How many shapes a training's forward passes have, counted in the order that training has."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from qft.data.packing import Row
from qft.data.tasks import Example, ExampleSet
from qft.lean.attention import TILE
from qft.lean.model_parts import is_encoder_decoder
from qft.micro_batch import MicroBatch
from qft.planning.depth import Kept
from qft.planning.job import PlannedJob
from qft.step import Layout, target_width, width_of
from qft.trainer import StepBatches

ENOUGH = 256  # distinct ones: beyond, no more kernels are kept (`qft.planning.resident`)
MOST_STEPS = 1024  # that are looked at


@dataclass
class RowShapes:
    """What forward passes have met.

    Attributes:
        widths: tokens of a row and how many rows; one for each half of an encoder-decoder.
        lengths: of what attention takes by itself.
    """

    widths: tuple[set[tuple[int, int]], ...]
    lengths: set[int] = field(default_factory=set)

    @property
    def count(self) -> float:
        """Shapes of linear layers' inputs; of two halves the mean."""
        return sum(map(len, self.widths)) / len(self.widths)

    @property
    def tiles(self) -> int:
        """Shapes of attention's tiles."""
        return len({tile for length in self.lengths for tile in _tiles(length)})

    @property
    def fake_tiles(self) -> int:
        """Of those that fakes run: the largest of a row and its last (`qft.lean.attention`)."""
        found = [_tiles(length) for length in self.lengths]
        return len({tile for tiles in found for tile in (max(tiles, key=math.prod), tiles[-1])})


_runs: Kept[tuple[ExampleSet, RowShapes]] = Kept(64)  # each phase of each plan asks


def shapes_of_run(job: PlannedJob) -> RowShapes:
    """Of all steps of a training."""
    rows, train = job.inputs.train, job.recipe.train
    order = (train.batch_size, train.seed, train.epochs, train.max_steps)
    layout = (train.packing and train.max_length, train.group_by_length, job.flat)
    key = (id(rows), order, layout, job.micro_batch)
    known = _runs.find(key)
    if known is None or known[0] is not rows:
        known = rows, _shapes_of(job, steps_of(job))
        _runs.keep(key, known)
    return known[1]


def shapes_of_step(job: PlannedJob) -> RowShapes:
    """Of the step that needs most, as fakes and probes run it."""
    return _shapes_of(job, [job.longest()])


def steps_of(job: PlannedJob) -> Iterator[Sequence[Example]]:
    """The examples of one step after another."""
    train, examples = job.recipe.train, job.inputs.train.examples
    batches = StepBatches(len(examples), train.batch_size, train.seed)
    count = min(train.max_steps or MOST_STEPS, math.ceil(len(batches) * train.epochs), MOST_STEPS)
    for step in range(count):
        batches.epoch, within = divmod(step, len(batches))
        if within == 0:
            order = list(batches)
        yield [examples[number] for number in order[within]]


def _shapes_of(job: PlannedJob, steps: Iterable[Sequence[Example]]) -> RowShapes:
    train, size = job.recipe.train, MicroBatch(job.micro_batch, padded=not job.flat)
    layout = Layout(train.max_length if train.packing else None, train.group_by_length, job.flat)
    found = RowShapes((set(), set()) if is_encoder_decoder(job.ready.skeleton) else (set(),))
    for step in steps:
        rows = layout.rows(step)
        widths = [width_of(row) for row in rows]
        for part in size.split(widths):
            _look(found, rows[part.start : part.stop], widths[part.start : part.stop], job.flat)
        if found.count >= ENOUGH:
            break
    return found


def _look(found: RowShapes, rows: Sequence[Row], widths: list[int], flat: bool) -> None:
    """One forward pass."""
    if len(found.widths) == 2:
        inputs = max(len(example.inputs["input_ids"]) for row in rows for example in row)
        targets = max(target_width(example) for row in rows for example in row)
        found.widths[0].add((len(rows), inputs))
        found.widths[1].add((len(rows), targets))
        return
    found.widths[0].add((1, sum(widths)) if flat else (len(rows), max(widths)))
    examples = itertools.chain.from_iterable(rows)
    found.lengths.update((len(e.inputs["input_ids"]) for e in examples) if flat else [max(widths)])


def _tiles(length: int) -> list[tuple[int, int]]:
    """The queries of each tile, and the keys that they see."""
    starts = range(0, length, TILE)
    return [(min(TILE, length - start), min(length, start + TILE)) for start in starts]
