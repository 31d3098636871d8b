"""The run folder: its place is free, or it is a run to go on with.

runs/support-bot/
  recipe.yaml      the resolved recipe, every default written out
  start.json       fingerprints of data and base: what a resumed run must find again
  run.json         versions, device, times, memory, throughput, metrics
  samples.json     a few training rows with their masks, and notes on the data
  metrics.jsonl    one line a logged step or evaluation
  adapter/         the result, in PEFT's format where it has one
  checkpoints/     what --resume continues from
  report.html      all of this as one page
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qft import checkpoints
from qft.errors import OutputExistsError, RecipeError
from qft.files import new_folder, read_json, require_absent, write_json, write_text
from qft.progress import Reporter
from qft.recipe import Recipe, load_recipe


def find_start(
    folder: Path, recipe: Recipe, resume: bool | str, overwrite: bool, reporter: Reporter
) -> Path | None:
    """The checkpoint to go on from, or None for a new run, whose place must be free."""
    if not resume:
        if not overwrite and (folder / "checkpoints").is_dir():
            raise OutputExistsError(
                "The output folder holds a former run.",
                where=folder,
                fix="--resume to go on with it, --overwrite to replace it, or another output",
            )
        require_absent(folder, overwrite=overwrite)
        return None
    _check_same_recipe(folder, recipe)
    if isinstance(resume, str):
        named = Path(resume)
        checkpoints.require_complete(named)
        return named
    found, skipped = checkpoints.newest_complete(folder / "checkpoints")
    for line in skipped:
        reporter.say(f"skipped {line}")
    reporter.say(f"resuming from {found.name}" if found else "no checkpoint yet: from the start")
    return found


def create_run_folder(folder: Path, recipe: Recipe, identity: Mapping[str, str]) -> None:
    """Makes the folder, replacing a former run, with the resolved recipe in it.

    Args:
        identity: fingerprints of data and base, and the dtype: what a resumed run must find again.
    """
    with new_folder(folder, overwrite=True) as temporary:
        write_json(temporary / START, dict(identity))
        write_text(temporary / "recipe.yaml", recipe.to_yaml())
        (temporary / "checkpoints").mkdir()


def require_same_start(folder: Path, identity: Mapping[str, str]) -> None:
    """Refuses to resume on other data, another base or in another dtype than the run began with.

    Raises:
        RecipeError: names what has changed.
    """
    path = folder / START
    before = read_json(path) if path.is_file() else {}
    changed = [key for key in identity if before.get(key, identity[key]) != identity[key]]
    if changed:
        raise RecipeError(
            "What this run began with has changed since.",
            where=folder,
            found=", ".join(f"another {key}" for key in changed),
            fix="restore it, or train into another output",
        )


START = "start.json"
# What may change between the parts of one run, since it changes no update.
_MAY_CHANGE = {"memory", "device"}


def _check_same_recipe(folder: Path, recipe: Recipe) -> None:
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise RecipeError("There is no run to resume.", where=folder,
                          fix="leave out --resume")  # fmt: skip
    before = load_recipe(path)
    then, now = before.to_dict(), recipe.to_dict()
    changed = [k for k in now if k not in _MAY_CHANGE | {"output"} and then.get(k) != now[k]]
    if changed:
        raise RecipeError(
            "The recipe is not the one this run began with.",
            where=path,
            found=f"changed: {', '.join(changed)}",
            fix="resume with the run's own recipe.yaml, or train into another output",
        )
