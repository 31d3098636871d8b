"""`qft bench train`: a short training several times over, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qft.bench.ledger import ledger_path
from qft.bench.ledger_file import Record, append, read
from qft.errors import QftError, RecipeError
from qft.progress import QUIET, Reporter
from qft.recipe import load_recipe


def train_repeatedly(
    recipe: Path,
    overrides: Sequence[str],
    *,
    steps: int,
    repeat: int,
    ledger: Path | None = None,
    reporter: Reporter = QUIET,
) -> list[Record]:
    """Trains so many steps so often, with the recipe's own seed, and returns the records.

    The runs go to a temporary folder, which is removed; their records stay in the ledger.

    Args:
        ledger: as `qft.bench.ledger.ledger_path` takes it.

    Raises:
        RecipeError: the ledger is off, or the recipe is wrong.
        QftError: a training failed; its own error stands on standard error.
    """
    path = ledger_path(ledger)
    if path is None:
        raise RecipeError("These runs are measured by their records, and the ledger is off.",
                          where="QFT_LEDGER, --ledger", fix="--ledger FILE")  # fmt: skip
    changes = [*overrides, f"train.max_steps={steps}"]
    load_recipe(recipe, changes)  # before a process is started for it
    with tempfile.TemporaryDirectory(prefix="qft-bench-") as folder:
        found = []
        for number in range(1, repeat + 1):
            reporter.say(f"training {number} of {repeat}, {steps} steps")
            own = Path(folder) / f"{number}.jsonl"  # others may write to the ledger meanwhile
            command = [sys.executable, "-m", "qft.cli", "train", str(recipe), *changes,
                       f"output={folder}/run", "--overwrite", "--quiet",
                       "--ledger", str(own)]  # fmt: skip
            done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
            if done.returncode != 0:
                raise QftError(f"Training {number} of {repeat} failed.", where=recipe,
                               found=f"exit status {done.returncode}")  # fmt: skip
            found += [append(record, path) for record in read(own)[0]]
    if len(found) != repeat:
        raise QftError("The trainings left no records of themselves.", where=recipe)
    return found
