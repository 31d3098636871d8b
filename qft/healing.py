"""`qft heal`: prune → teach → train → merge → export, as one recipe says; each step is kept.

runs/smaller/
  recipe.yaml     the resolved recipe of the whole chain
  pruned/         the smaller model, before it is healed
  judged.json     what the model and the pruned one are worth on the held-out rows
  teacher-cache/  the teacher's word on the training rows, where one teaches
  run/            the training: checkpoints, adapter, figures
  merged/         the healed model
  gguf-q8_0/ …    the formats asked for
  heal.json       the figures of all three models

A step that is done is not done again: the same command goes on where the last one stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qft import models
from qft.data.tasks import pad_id
from qft.errors import Interrupted, OutputExistsError, RecipeError
from qft.evaluation import evaluate
from qft.export.delivery import export, merge
from qft.export.formats import require_known
from qft.files import new_folder, read_json, require_absent, write_json, write_text
from qft.inputs import open_inputs, require_possible, spec_of
from qft.progress import QUIET, Reporter, human_bytes
from qft.pruning.prune import prune
from qft.recipe import Recipe, load_recipe
from qft.shards import ShardedCheckpoint
from qft.training import train

RESULT = "heal.json"


def heal(recipe: Recipe, *, overwrite: bool = False, reporter: Reporter = QUIET) -> dict[str, Any]:
    """Makes a smaller model out of a larger one and teaches it what it has lost.

    Args:
        recipe: with `prune`; a strategy ``{name: distill, teacher: …}`` learns from the teacher,
            which is most often the model that was pruned.
        overwrite: replace what a former chain has written.

    Returns:
        What heal.json holds: parameters, bytes and metrics of the three models.

    Raises:
        Interrupted: Ctrl-C; what is done is kept.
        QftError: see :mod:`qft.errors`.
    """
    folder = Path(recipe.output)
    _require_chain(recipe)
    _begin(folder, recipe, overwrite)
    pruned, run, merged = folder / "pruned", folder / "run", folder / "merged"
    try:
        if not pruned.is_dir():
            _prune(recipe, pruned, reporter)
        training = _training(recipe, pruned, run)
        judged = _once(
            folder / "judged.json",
            lambda: {
                "unpruned": _worth(recipe, reporter, "unpruned"),
                "pruned": _worth(training, reporter, "pruned"),
            },
        )
        if not (run / "run.json").is_file():
            train(training, resume=(run / "recipe.yaml").is_file(), reporter=reporter)
        if not merged.is_dir():
            merge(run, merged, reporter=reporter)
        for format in recipe.export:
            out = folder / format.replace(":", "-")
            if not out.is_dir():
                export(run, out, format=format, reporter=reporter)
    except KeyboardInterrupt:
        raise Interrupted(
            "Stopped; what is done is kept.", where=folder, fix="the same command goes on"
        ) from None
    healed = read_json(run / "run.json")["metrics"]
    result = {**judged, "healed": {**_size(merged), "metrics": healed}}
    write_json(folder / RESULT, result)
    return result


def _require_chain(recipe: Recipe) -> None:
    require_possible(recipe)
    if recipe.prune is None:
        raise RecipeError("Nothing is said to be pruned.", where="prune",
                          fix="prune: {method: depth, ratio: 0.25}; or qft train")  # fmt: skip
    if not recipe.strategy.mergeable:
        raise RecipeError(
            f"What {recipe.strategy.handed_over.name!r} trains cannot become part of the model.",
            where="strategy",
            fix=recipe.strategy.advice,
        )
    if recipe.data.eval is None:  # rows held out of `train` would be seen by the pruning
        raise RecipeError("There is no file of held-out rows to judge the three models by.",
                          where="data.eval", fix="data.eval: FILE")  # fmt: skip
    for format in recipe.export:
        require_known(format)


def _begin(folder: Path, recipe: Recipe, overwrite: bool) -> None:
    """Makes the folder, or finds the same chain in it."""
    path = folder / "recipe.yaml"
    if path.is_file() and not overwrite:
        then, now = load_recipe(path).to_dict(), recipe.to_dict()
        changed = [key for key in now if then.get(key) != now[key] and key != "output"]
        if changed:
            raise OutputExistsError(
                "The output folder holds a chain of another recipe.",
                where=folder,
                found=f"changed: {', '.join(changed)}",
                fix="--overwrite to replace it, or another output",
            )
        return
    require_absent(folder, overwrite=overwrite)
    with new_folder(folder, overwrite=True) as temporary:
        write_text(temporary / "recipe.yaml", recipe.to_yaml())


def _prune(recipe: Recipe, out: Path, reporter: Reporter) -> None:
    assert recipe.prune is not None
    columns = recipe.data.columns.model_dump(exclude_none=True)
    settings = recipe.prune.model_dump(exclude_none=True)
    prune(
        recipe.model,
        out,
        data=recipe.data.train,
        task=recipe.task,
        columns=columns or None,
        max_length=recipe.train.max_length,
        seed=recipe.train.seed,
        dtype=recipe.dtype,
        report=False,  # the chain judges all three models by the recipe's own held-out rows
        reporter=reporter,
        **settings,
    )


def _training(recipe: Recipe, pruned: Path, run: Path) -> Recipe:
    """The training within the chain."""
    changes = {"model": str(pruned), "output": str(run), "prune": None, "export": ()}
    return recipe.model_copy(update=changes)


def _worth(recipe: Recipe, reporter: Reporter, name: str) -> dict[str, Any]:
    """Size and metrics of a recipe's model as it is, on its held-out rows."""
    inputs = open_inputs(recipe)
    assert inputs.held_out is not None
    model = models.open_model(inputs.base, spec_of(recipe, inputs.train))
    with reporter.bar(f"evaluate the {name} model", len(inputs.held_out.examples)) as bar:
        metrics = evaluate(
            model,
            inputs.held_out.examples,
            inputs.task,
            pad_token_id=pad_id(inputs.tokenizer),
            labels=inputs.held_out.labels,
            progress=bar.advance,
        )
    return {**_size(inputs.base), "metrics": metrics}


def _size(folder: Path) -> dict[str, int]:
    checkpoint = ShardedCheckpoint(folder)
    count = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    checkpoint.close()
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"parameters": count, "bytes": stored}


def _once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result that is made if it is not there."""
    if not path.is_file():
        write_json(path, make())
    found: dict[str, Any] = read_json(path)
    return found


def table(result: dict[str, Any]) -> list[str]:
    """The three models side by side, a line each."""
    lines = []
    for name in ("unpruned", "pruned", "healed"):
        row = result[name]
        measures = "  ".join(f"{key} {value:.4f}" for key, value in row["metrics"].items())
        lines.append(
            f"{name:<9} {row['parameters']:>14,} parameters  {human_bytes(row['bytes']):>10}  "
            f"{measures}"
        )
    return lines
