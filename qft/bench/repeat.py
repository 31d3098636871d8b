"""`qft bench train`: a short training several times over, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qft.bench.ledger import Record, ledger_path, read
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
    known = {record.get("id") for record in read(path)[0]}
    with tempfile.TemporaryDirectory(prefix="qft-bench-") as folder:
        for number in range(1, repeat + 1):
            reporter.say(f"training {number} of {repeat}, {steps} steps")
            command = [sys.executable, "-m", "qft.cli", "train", str(recipe), *changes,
                       f"output={folder}/run", "--overwrite", "--quiet",
                       "--ledger", str(path)]  # fmt: skip
            done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
            if done.returncode != 0:
                raise QftError(f"Training {number} of {repeat} failed.", where=recipe,
                               found=f"exit status {done.returncode}")  # fmt: skip
    made = [record for record in read(path)[0] if record.get("id") not in known]
    found = [record for record in made if record.get("verb") == "train"]
    if len(found) < repeat:
        raise QftError("The trainings left no records of themselves.", where=path,
                       fix="--ledger FILE, in a folder that can be written to")  # fmt: skip
    return found[-repeat:]
