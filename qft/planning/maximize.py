"""The largest context, micro-batch or model of a family that fits into a budget."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qft import models
from qft.bench.shapes import SHAPES, shape_config
from qft.data.tasks import Example
from qft.errors import QftError, RecipeError
from qft.planning.changes import LENGTH, MICRO_BATCH, Change, Value, changed_recipe, ladder
from qft.planning.crossing import crossing
from qft.planning.job import PlannedJob
from qft.planning.solver import Forecast, Remedy, Trials, climbed, solve

What = Literal["max_length", "batch_size", "model"]
ENDLESS = 2**20  # where a model sets its positions no limit
MOST_ROWS = 2**12  # of one forward pass


@dataclass(frozen=True)
class Largest:
    """The largest that fits.

    Attributes:
        what: ``max_length``, ``batch_size`` (examples a forward pass) or ``model``.
        value: None where not even the smallest fits.
        peak_bytes: with it; of the smallest where that does not fit.
        words: it, and what else must change, as `qft train RECIPE` takes them.
        limited_by: what a larger one would run against, a sentence.
    """

    what: str
    value: int | str | None
    peak_bytes: int
    words: str
    limited_by: str


def maximize(
    job: PlannedJob, budget_bytes: int, peak: Forecast, what: str, solve: bool = False
) -> Largest:
    """Finds the largest that fits, with all else as the recipe says.

    Args:
        job: what is asked for is planned at full length, its rows repeated where they are shorter.
        budget_bytes: what it may take.
        peak: the bytes of a job.
        what: ``max_length``, ``batch_size`` or ``model``.
        solve: other settings may change as well (`qft.planning.solver`), but no sequence is cut.

    Raises:
        RecipeError: there is no such thing to make larger.
        QftError: the job itself would be refused.
    """
    match what:
        case "max_length":
            return _largest_number(job, budget_bytes, peak, _Lengths(job), solve)
        case "batch_size":
            return _largest_number(job, budget_bytes, peak, _MicroBatches(job), solve)
        case "model":
            return _largest_model(job, budget_bytes, peak, solve)
    raise RecipeError("Nothing of that name can be made larger.", where="--maximize", found=what,
                      fix="max_length, batch_size or model")  # fmt: skip


class _Lengths:
    """Jobs by the tokens of their longest sequence."""

    what, left_out = "max_length", (LENGTH,)

    def __init__(self, job: PlannedJob) -> None:
        self.job, self.first = job, job.recipe.train.max_length
        positions = models.longest_of(job.ready.skeleton.config)
        self.limit = (positions or ENDLESS) - job.ready.needs.extra_positions
        self.step = next((size for size in (64, 16, 4) if self.limit > 32 * size), 1)
        known = f"the model has positions for {self.limit} tokens"
        self.limit_is = known if positions else f"no more than {ENDLESS} tokens were tried"

    def settings(self, value: int) -> tuple[tuple[str, Value], ...]:
        """What the recipe is to say."""
        return (("train.max_length", value),)

    def examples(self, value: int) -> list[Example]:
        """As many rows of this length as a step takes."""
        longest = self.job.longest()[0]
        row = _stretched(longest, value, self.job.inputs.task.predicts)
        return [replace(row, index=number) for number in range(self.job.recipe.train.batch_size)]


class _MicroBatches:
    """Jobs by the examples of a forward pass; a step has as many at least."""

    what, left_out, step = "batch_size", (MICRO_BATCH, LENGTH), 1

    def __init__(self, job: PlannedJob) -> None:
        self.job, self.first = job, job.micro_batch
        self._rows = job.inputs.train
        count = len(self._rows.examples)
        self.limit = count if self._rows.fingerprint else MOST_ROWS
        self.limit_is = f"there are {count} rows"
        if not self._rows.fingerprint:
            self.limit_is = f"no more than {MOST_ROWS} rows were tried"

    def settings(self, value: int) -> tuple[tuple[str, Value], ...]:
        """What the recipe is to say."""
        made: list[tuple[str, Value]] = [("memory.micro_batch", value)]
        if value > self.job.recipe.train.batch_size:
            made.append(("train.batch_size", value))
        return tuple(made)

    def examples(self, value: int) -> list[Example]:
        """The rows that were read, or as many imagined ones."""
        rows = self._rows.examples
        if self._rows.fingerprint:
            return rows
        return [
            replace(rows[number % len(rows)], index=number)
            for number in range(max(value, self.job.recipe.train.batch_size))
        ]


_Numbers = _Lengths | _MicroBatches


def _job_at(numbers: _Numbers, value: int) -> PlannedJob:
    """Nothing that decides whether the job is refused changes, but for positions: see `limit`."""
    job = numbers.job
    recipe = changed_recipe(job.recipe, [Change(numbers.settings(value), "")])
    rows = replace(job.inputs.train, examples=numbers.examples(value))
    return replace(job, recipe=recipe, inputs=replace(job.inputs, train=rows))


def _largest_number(
    job: PlannedJob, budget_bytes: int, peak: Forecast, numbers: _Numbers, solving: bool
) -> Largest:
    """The strongest changes say how far it goes; the nearest recipe is then sought there."""
    first = min(numbers.first, numbers.limit)
    strongest: list[Change] = []
    if solving:
        at_first = _job_at(numbers, first)
        rungs = [rung for rung in ladder(at_first) if rung.name not in numbers.left_out]
        state = climbed(Trials(at_first, peak), rungs, 0)
        strongest = [rung.changes[number] for rung, number in state.values()]
    with_them = job.changed(changed_recipe(job.recipe, strongest)) if strongest else job
    numbers.job = with_them
    known: dict[int, int] = {}

    def bytes_at(value: int) -> int:
        if value not in known:
            known[value] = peak(_job_at(numbers, value))
        return known[value]

    value = _search(bytes_at, first, numbers.limit, numbers.step, budget_bytes)
    if value is None:
        smallest = min(numbers.step, numbers.limit)
        return Largest(numbers.what, None, bytes_at(smallest), "", "not even the smallest fits")
    numbers.job = job
    found = solve(_job_at(numbers, value), budget_bytes, peak, remedies=1, without=numbers.left_out)
    remedy = found.nearest or Remedy((), found.job, found.peak_bytes)
    own = " ".join(Change((pair,), "").words for pair in numbers.settings(value))
    limit = numbers.limit_is if value == numbers.limit else "the budget"
    return Largest(
        numbers.what, value, remedy.peak_bytes, " ".join(filter(None, (own, remedy.words))), limit
    )


def _search(
    bytes_at: Callable[[int], int], first: int, limit: int, step: int, budget_bytes: int
) -> int | None:
    """The largest multiple of ``step``, or ``limit`` itself, within the budget.

    From ``first`` on it goes where a straight line through the last two points would end, twice as
    far at least and eight times at most, until it is beyond the budget; then back.
    """
    low = max(step, first // step * step)
    if bytes_at(low) > budget_bytes:
        if low == step or bytes_at(step) > budget_bytes:
            return None
        inside, outside = step, low
    else:
        inside, outside = low, 0
        before = (0, 0)
        while not outside:
            if inside == limit:
                return limit
            far = _ahead(before, (inside, bytes_at(inside)), budget_bytes)
            far = min(limit, far // step * step)
            before = (inside, bytes_at(inside))
            if bytes_at(far) <= budget_bytes:
                inside = far
            else:
                outside = far
    last = math.ceil(outside / step)  # the limit itself need be no multiple

    def at(number: int) -> int:
        return bytes_at(min(outside, number * step))

    return crossing(at, inside // step, last, budget_bytes) * step


def _ahead(before: tuple[int, int], now: tuple[int, int], budget_bytes: int) -> int:
    """A little beyond where a line through two points passes the budget."""
    slope = (now[1] - before[1]) / (now[0] - before[0])
    guess = now[0] + 1.05 * (budget_bytes - now[1]) / slope if slope > 0 else math.inf
    return int(min(max(guess, 2 * now[0]), 8 * now[0]))


def _stretched(example: Example, length: int, predicts: str) -> Example:
    """Its tokens repeated, or cut, to a length; so are labels that are tokens' own."""
    whole = len(example.inputs["input_ids"])
    inputs: dict[str, Any] = {}
    for name, value in example.inputs.items():
        of_tokens = name != "labels" or predicts in ("tokens", "tags")
        if isinstance(value, list) and of_tokens and value:
            size = max(1, round(len(value) * length / whole))  # another text's stay in proportion
            inputs[name] = (value * math.ceil(size / len(value)))[:size]
        else:
            inputs[name] = value
    return replace(example, inputs=inputs)


# --- models


def _largest_model(job: PlannedJob, budget_bytes: int, peak: Forecast, solving: bool) -> Largest:
    config = models.read_config(job.inputs.base)
    names = family_of(config)
    if not names:
        raise RecipeError(
            "No built-in shape is of this model's family.",
            where="--maximize model",
            found=f"model_type {config.get('model_type')}",
            fix=f"one of {', '.join(sorted({str(s['model_type']) for s in SHAPES.values()}))}",
        )
    found, smallest = _first_fitting(job, names, budget_bytes, peak, solving)
    if found is None:
        return Largest("model", None, smallest, "", "not even the smallest fits")
    name, remedy = found
    own = Change((("model", name),), "").words
    limit = "the budget" if name != names[0] else "there is no larger built-in shape of its family"
    words = " ".join(filter(None, (own, remedy.words)))
    return Largest("model", name, remedy.peak_bytes, words, limit)


def family_of(config: Mapping[str, Any]) -> list[str]:
    """Built-in shapes of a config's family, the largest first."""
    names = [n for n, shape in SHAPES.items() if shape["model_type"] == config.get("model_type")]
    return sorted(names, key=lambda name: -_layers_size(SHAPES[name]))


def smaller_that_fits(job: PlannedJob, budget_bytes: int, peak: Forecast) -> Largest | None:
    """The largest smaller built-in shape of the job's family that some changes make fit."""
    config = models.read_config(job.inputs.base)
    names = [n for n in family_of(config) if _layers_size(SHAPES[n]) < _layers_size(config)]
    found, _ = _first_fitting(job, names, budget_bytes, peak, solving=True)
    if found is None:
        return None
    name, remedy = found
    words = " ".join(filter(None, (f"model={name}", remedy.words)))
    return Largest("model", name, remedy.peak_bytes, words, "the budget")


def _first_fitting(
    job: PlannedJob, names: list[str], budget_bytes: int, peak: Forecast, solving: bool
) -> tuple[tuple[str, Remedy] | None, int]:
    """The first that fits, the largest being the first; and the last one's peak."""
    last = 0
    for name in names:
        with _of_shape(job, name) as sized:
            if sized is None:
                continue
            if solving:
                found = solve(sized, budget_bytes, peak, remedies=1, without=(LENGTH,))
                if found.nearest is not None:
                    return (name, found.nearest), found.nearest.peak_bytes
                last = found.peak_bytes if found.smallest is None else found.smallest.peak_bytes
            else:
                last = peak(sized)
                if last <= budget_bytes:
                    return (name, Remedy((), sized, last)), last
    return None, last


@contextlib.contextmanager
def _of_shape(job: PlannedJob, name: str) -> Iterator[PlannedJob | None]:
    """The job with a built-in shape for its model; None where it would be refused."""
    with tempfile.TemporaryDirectory(prefix="qft-shape-") as folder:
        shape_config(name).save_pretrained(folder)
        inputs = replace(job.inputs, base=Path(folder))
        try:
            recipe = changed_recipe(job.recipe, [Change((("model", name),), "")])
            sized: PlannedJob | None = replace(job, inputs=inputs).changed(recipe)
        except QftError:  # its sequences are longer than this one's positions
            sized = None
        yield sized


def _layers_size(config: Mapping[str, Any]) -> int:
    """Grows with the parameters of a family's models."""
    return int(config.get("num_hidden_layers") or 0) * int(config.get("hidden_size") or 0) ** 2
