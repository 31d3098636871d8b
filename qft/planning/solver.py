"""The recipe nearest to the one that was written that fits into a budget.

Rung by rung (`qft.planning.changes`) each change is made at its strongest until the job fits. Then
it is undone from the costliest on: what turns out unnecessary goes, and of what is needed the
mildest that suffices is kept. What is left is minimal: with any of its changes taken back or made
milder by one, the job would not fit, as long as bytes fall with each change. Where they do not,
what is found still fits, and is found after as many trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from qft.errors import QftError, first_line
from qft.planning.changes import LENGTH, Change, Rung, Value, changed_recipe, ladder
from qft.planning.crossing import crossing
from qft.planning.job import PlannedJob

REMEDIES = 3


class Forecast(Protocol):
    """How many bytes a job takes of its device at its fullest moment."""

    def __call__(self, job: PlannedJob) -> int:
        """Bytes.

        Raises:
            QftError: the job would be refused.
        """


@dataclass(frozen=True)
class Step:
    """A change, and the peak with it and all that come before it."""

    change: Change
    peak_bytes: int


@dataclass(frozen=True)
class Remedy:
    """Changes in the order of their rungs, and the job with all of them.

    Attributes:
        steps: none where the job is taken as it is written.
        job: under the changed recipe.
        peak_bytes: of it.
    """

    steps: tuple[Step, ...]
    job: PlannedJob
    peak_bytes: int

    @property
    def words(self) -> str:
        """What to write after ``qft train RECIPE``."""
        return " ".join(step.change.words for step in self.steps)

    @property
    def contrary(self) -> tuple[str, ...]:
        """What the user wrote in so many words and these changes overrule."""
        return tuple(step.change.contrary for step in self.steps if step.change.contrary)


@dataclass(frozen=True)
class Solution:
    """What fits, or what comes nearest.

    Attributes:
        budget_bytes: what the job may take.
        job: as it was written.
        peak_bytes: of it.
        nearest: the least that makes it fit; nothing is changed where it fits as it is; None where
            nothing makes it fit.
        others: further ways that each make it fit, the cheaper ones first.
        smallest: the fewest bytes there are a way to, where nothing makes it fit.
        uncut_bytes: the fewest with sequences as long as they are, where nothing makes it fit.
        refused: changes that the recipe, the model or the strategy does not allow, and why.
    """

    budget_bytes: int
    job: PlannedJob
    peak_bytes: int
    nearest: Remedy | None
    others: tuple[Remedy, ...] = ()
    smallest: Remedy | None = None
    uncut_bytes: int | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """As it was written."""
        return self.peak_bytes <= self.budget_bytes

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        """All ways, the nearest first; none where it fits as it is, or nothing helps."""
        if self.fits or self.nearest is None:
            return ()
        return (self.nearest, *self.others)

    @property
    def cheapest_changes(self) -> tuple[str, ...]:
        """Up to three ways in words that can be written after ``qft train RECIPE``."""
        return tuple(remedy.words for remedy in self.remedies)


def solve(
    job: PlannedJob,
    budget_bytes: int,
    peak: Forecast,
    *,
    remedies: int = REMEDIES,
    without: Sequence[str] = (),
) -> Solution:
    """Finds the recipe nearest to a job's own that fits.

    Args:
        job: as it was written; with `checkpointing: auto` it recomputes all layers if it must.
        budget_bytes: what it may take.
        peak: its bytes; a job is asked for once.
        remedies: how many ways to look for at most; 1 is the nearest alone.
        without: names of rungs (`qft.planning.changes.Rung`) that are left out.

    Raises:
        QftError: the job itself would be refused.
    """
    trials = Trials(job, peak)
    written = trials.peak({})
    if written <= budget_bytes:
        return Solution(budget_bytes, job, written, trials.remedy({}))
    rungs = [rung for rung in ladder(job) if rung.name not in without]
    strongest = climbed(trials, rungs, budget_bytes)
    if trials.peak(strongest) > budget_bytes:
        return Solution(
            budget_bytes,
            job,
            written,
            None,
            smallest=trials.remedy(_relaxed(trials, strongest, trials.peak(strongest))),
            uncut_bytes=trials.peak(_without(strongest, LENGTH)),
            refused=trials.refused,
        )
    found = [_relaxed(trials, strongest, budget_bytes)]
    if remedies > 1:
        found += _others(trials, rungs, found[0], budget_bytes, remedies - 1)
    ways = [trials.remedy(state) for state in found]
    return Solution(budget_bytes, job, written, ways[0], tuple(ways[1:]), refused=trials.refused)


State = dict[str, tuple[Rung, int]]  # by the rung's name: which of its changes is made


class Trials:
    """Forecasts of one job under changes, each made once.

    Attributes:
        refused: why a change cannot be made, by its words.
    """

    def __init__(self, job: PlannedJob, peak: Forecast) -> None:
        self.job = job
        self.refused: dict[str, str] = {}
        self._peak = peak
        self._known: dict[tuple[Change, ...], int] = {}
        self._opened: dict[tuple[tuple[str, Value], ...], PlannedJob] = {(): job}

    @property
    def known_bytes(self) -> dict[str, int]:
        """Every peak that was asked for, by the words of its changes."""
        return {" ".join(c.words for c in made): size for made, size in self._known.items()}

    def peak(self, state: State) -> int:
        """Bytes with these changes.

        Raises:
            QftError: such a job would be refused.
        """
        changes = _changes(state)
        if changes not in self._known:
            self._known[changes] = self._peak(self.changed(state))
        return self._known[changes]

    def tried(self, state: State, added: Change) -> int | None:
        """The same; None, and a note, where the change that was added last is refused."""
        try:
            return self.peak(state)
        except QftError as error:
            self.refused[added.words] = first_line(error)
            return None

    def changed(self, state: State) -> PlannedJob:
        """The job with these changes; what `memory` says needs no model to be opened anew."""
        changes = _changes(state)
        settings = tuple(pair for change in changes for pair in change.settings)
        others = tuple(pair for pair in settings if not pair[0].startswith("memory."))
        if others not in self._opened:
            self._opened[others] = self.job.changed(changed_recipe(self.job.recipe, changes))
        return replace(self._opened[others], recipe=changed_recipe(self.job.recipe, changes))

    def remedy(self, state: State) -> Remedy:
        """With the peak after each of the changes."""
        if not state:
            return Remedy((), self.job, self.peak(state))
        steps, so_far = [], State()
        for name, (rung, number) in state.items():
            so_far[name] = rung, number
            steps.append(Step(rung.changes[number], self.peak(so_far)))
        return Remedy(tuple(steps), self.changed(state), self.peak(state))


def climbed(trials: Trials, rungs: Sequence[Rung], budget_bytes: int) -> State:
    """Every rung at its strongest, up to the first with which the job fits.

    What makes the peak higher, or is refused, is left out. What changes nothing stays for now: it
    may help once what stood above it is gone.
    """
    state = State()
    lowest = trials.peak(state)
    for rung in rungs:
        trial = {**state, rung.name: (rung, len(rung.changes) - 1)}
        found = trials.tried(trial, rung.changes[-1])
        if found is None or found > lowest:
            continue
        state, lowest = trial, found
        if lowest <= budget_bytes:
            break
    return state


def _relaxed(trials: Trials, state: State, budget_bytes: int) -> State:
    """Undone from the costliest on: each change is as mild as it can be, or gone."""
    for name in reversed(list(state)):
        rung, number = state[name]
        bytes_at = _bytes_at(trials, state, rung)
        if bytes_at(number - 1) > budget_bytes:  # the strongest is needed, or all there is
            continue
        if bytes_at(-1) <= budget_bytes:
            state = _with(state, rung, -1)
            continue
        state = _with(state, rung, crossing(bytes_at, number - 1, -1, budget_bytes))
    return state


def _bytes_at(trials: Trials, state: State, rung: Rung) -> Callable[[int], float]:
    """Bytes by the number of a rung's change; -1 is without, which may be refused."""

    def bytes_at(number: int) -> float:
        try:
            return trials.peak(_with(state, rung, number))
        except QftError:
            return math.inf

    return bytes_at


def _others(
    trials: Trials, rungs: Sequence[Rung], nearest: State, budget_bytes: int, count: int
) -> list[State]:
    """Other ways: one change alone, what the user did not speak against, another costliest one."""
    found: list[State] = []

    def take(chosen: Sequence[Rung]) -> None:
        if len(found) == count or not chosen:
            return
        strongest = climbed(trials, chosen, budget_bytes)
        if trials.peak(strongest) <= budget_bytes:
            way = _relaxed(trials, strongest, budget_bytes)
            if _changes(way) not in [_changes(known) for known in (nearest, *found)]:
                found.append(way)

    if any(rung.changes[number].contrary for rung, number in nearest.values()):
        take([rung for rung in rungs if not rung.changes[0].contrary])
    if len(nearest) > 1:
        for rung in rungs[:-1]:
            take([rung])
    costliest = list(nearest)[-1]
    take([rung for rung in rungs if rung.name != costliest])
    for rung in rungs:
        take([rung])
    return sorted(found, key=lambda way: _cost(rungs, way))


def _cost(rungs: Sequence[Rung], state: State) -> tuple[int, int]:
    """The place of its costliest rung, then how many changes there are."""
    names = [rung.name for rung in rungs]
    return max((names.index(name) for name in state), default=-1), len(state)


def _with(state: State, rung: Rung, number: int) -> State:
    """With another of a rung's changes; -1 is none."""
    if number < 0:
        return _without(state, rung.name)
    return {**state, rung.name: (rung, number)}


def _without(state: State, name: str) -> State:
    return {key: made for key, made in state.items() if key != name}


def _changes(state: State) -> tuple[Change, ...]:
    return tuple(rung.changes[number] for rung, number in state.values())
