"""Held-out rows to judge a model on: those a run kept aside, or a file the user names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qft.data.tasks import ExampleSet, load_examples, load_train_eval
from qft.errors import RecipeError
from qft.recipe import Columns, Data, Recipe, load_recipe


def recipe_of(path: Path) -> Recipe | None:
    """The recipe of the run that ``path`` is or lies in (its adapter, a checkpoint), or None."""
    path = path.absolute()
    places = [path]
    if path.name == "adapter":
        places.append(path.parent)
    if "checkpoints" in (path.parent.name, path.parent.parent.name):
        places += [path.parents[1], path.parents[2]]
    for folder in places:
        file = folder / "recipe.yaml"
        if file.is_file():
            # the strategy is of no account here, and another's must not import code
            return load_recipe(file, ["strategy=lora"])
    return None


def held_out_examples(
    source: Path,
    tokenizer: Any,
    *,
    task: str,
    labels: tuple[str, ...] | None,
    labels_are: str = "one",
    data: str | None = None,
    columns: dict[str, str | int] | None = None,
    max_length: int | None = None,
    longest: int | None = None,
    limit: int | None = None,
    too_long: str | None = None,
) -> ExampleSet:
    """Encoded held-out examples for a model.

    Args:
        source: what the user named; a run knows its own rows and settings.
        data: rows instead of the run's own.
        columns: ``{role: name}`` overrides.
        longest: the most tokens the model has positions for; None where it sets no limit.
        limit: at most so many rows.

    Raises:
        RecipeError: there are no rows: no run, and no ``data``.
        DataError: the rows do not fit the task.
    """
    recipe = recipe_of(source)
    changes: dict[str, Any] = {"labels_are": labels_are}
    changes |= {"columns": Columns(**columns)} if columns else {}
    changes |= {"too_long": too_long} if too_long else {}
    known = recipe.data.model_copy(update=changes) if recipe is not None else None
    if recipe is not None and data is None and recipe.task == task:
        length = max_length or recipe.train.max_length
        train = recipe.train.model_copy(update={"max_length": length})
        asked = recipe.model_copy(update={"data": known, "train": train})
        _, held_out = load_train_eval(asked, tokenizer)
        if held_out is not None:
            return held_out.first(limit)
    if data is None:
        raise RecipeError(
            "There are no held-out rows to judge the model on.",
            where=source,
            fix="add --data FILE",
        )
    settings = known or Data(train=data, **changes)
    length = max_length or (recipe.train.max_length if recipe is not None else 512)
    length = min(length, longest or length)
    return load_examples(
        task,
        data,
        tokenizer,
        data=settings,
        max_length=length,
        labels=labels,
        limit=limit,
        packed=recipe is not None and recipe.train.packing,
    )
