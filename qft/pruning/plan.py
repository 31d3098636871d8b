"""What every way to prune is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from qft.errors import RecipeError
from qft.merging.tensors import TensorSource
from qft.progress import Reporter
from qft.pruning.anatomy import Anatomy
from qft.pruning.calibration import CalibrationRows
from qft.pruning.score_store import ScoreStore
from qft.pruning.targets import Cost, Scale, Target, read_target


@dataclass(frozen=True)
class Settings:
    """What the user asked for, as `qft.prune` takes it."""

    method: str
    ratio: float | None = None
    pattern: str | None = None
    params: str | int | None = None
    size: str | int | None = None
    layers: str | None = None
    width: str | None = None
    importance: str | None = None
    multiple_of: int = 8
    keep_first: int = 1
    keep_last: int = 1
    calibration_rows: int = 128
    max_length: int = 512
    seed: int = 0


class PrunedSource(TensorSource, Protocol):
    """What a method leaves of the model, ready to be written."""

    def close(self) -> None:
        """Closes the files that are read."""


@dataclass(frozen=True)
class Plan:
    """What a method would do.

    Attributes:
        source: the pruned model, tensor by tensor; None in a dry run without a target.
        facts: plain values for pruning.json: what stayed, and the scores.
        choices: a row a choice, for a dry run.
        cost: of the pruned model.
    """

    source: PrunedSource | None
    facts: dict[str, Any]
    choices: list[dict[str, Any]]
    cost: Cost | None


@dataclass(frozen=True)
class Job:
    """One pruning: the model, the rows and the user's wishes.

    Attributes:
        rows: to score by; None without data.
        judged: rows whose held-out part judges; None without any.
        dry: only the choices are wanted, and no target need be given.
    """

    anatomy: Anatomy
    scale: Scale
    settings: Settings
    rows: CalibrationRows | None
    store: ScoreStore
    reporter: Reporter
    dry: bool = False
    judged: CalibrationRows | None = None

    def target(self) -> Target | None:
        """How small it is to become."""
        asked = self.settings
        return read_target(self.scale.whole(), asked.ratio, asked.params, asked.size)

    def require_rows(self) -> CalibrationRows:
        """The rows.

        Raises:
            RecipeError: there are none.
        """
        if self.rows is None:
            raise RecipeError(
                f"The method {self.settings.method!r} scores the model on rows of yours.",
                where="--data",
                fix="--data FILE; without rows --method depth --layers 10-15 names what goes",
            )
        return self.rows

    def scores(self, name: str, compute: Callable[[], Any]) -> Any:
        """Scores of that name, as plain values; kept ones where an earlier try made them."""
        found, kept = self.store.once(name, compute)
        if kept:
            self.reporter.say(f"scores: {name}: those of the earlier try are used")
        return found


def no_target(other: str) -> RecipeError:
    """The error of a method that is not told how much to take; ``other`` would work as well."""
    return RecipeError("How much is to go?", where="--ratio, --params or --size",
                       fix=f"--ratio 0.25, --params 1.0B, --size 500MiB, or {other}")  # fmt: skip
