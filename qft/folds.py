"""k-fold evaluation: as many trainings as folds, each judged on the rows it did not see."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from qft.errors import RecipeError
from qft.files import write_json
from qft.progress import QUIET, Reporter
from qft.recipe import Recipe
from qft.training import train

SUMMARY = "folds.json"


def train_folds(
    recipe: Recipe, folds: int, *, overwrite: bool = False, reporter: Reporter = QUIET
) -> dict[str, Any]:
    """Trains ``folds`` times into ``output/fold-1``, …; every row is held out exactly once.

    Returns:
        `folds`: each fold's metrics; `mean` and `deviation` (of the sample) of every metric. The
        same is written to ``output/folds.json``.

    Raises:
        RecipeError: fewer than two folds, or a recipe that names held-out rows of its own.
    """
    if folds < 2:
        raise RecipeError("There must be two folds or more.", where="--folds", found=folds)
    if recipe.data.eval is not None or recipe.data.eval_share > 0:
        raise RecipeError(
            "The folds are the held-out rows; the recipe names others.",
            where="data.eval",
            fix="leave out data.eval and data.eval_share",
        )
    output = Path(recipe.output)
    measured = []
    for number in range(1, folds + 1):
        reporter.say(f"fold {number} of {folds}")
        data = recipe.data.model_copy(update={"fold": f"{number}/{folds}"})
        one = recipe.model_copy(update={"data": data, "output": str(output / f"fold-{number}")})
        measured.append(train(one, overwrite=overwrite, reporter=reporter).metrics)
    summary: dict[str, Any] = {
        "folds": measured,
        "mean": {name: statistics.mean(m[name] for m in measured) for name in measured[0]},
        "deviation": {name: statistics.stdev(m[name] for m in measured) for name in measured[0]},
    }
    write_json(output / SUMMARY, summary)
    return summary
