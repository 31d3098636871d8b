"""What `qft plan` is told, a recipe or a model's name, as a job: no weight is needed, nor a row."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qft import models
from qft.bench.shapes import SHAPES, TASKS, shape_config
from qft.errors import ModelError, first_line
from qft.inputs import open_inputs
from qft.planning.job import PlannedJob, imagined_inputs, planned_job
from qft.recipe import Recipe, apply_overrides, build_recipe, load_recipe

# whose models have the built-in shapes; another's of the same name may be of another shape
_MAKERS = {"meta-llama", "qwen", "google", "mistralai", "google-bert", "google-t5"}
_ENDINGS = re.compile(r"(-(instruct|it|pt|uncased|cased|v0\.[123]))+$")
_NOWHERE = "imagined rows"  # stands for data.train where a plan is made from a model alone


@contextlib.contextmanager
def opened_job(
    recipe: Recipe, device: str = "auto", label_share: float = 1.0
) -> Iterator[tuple[PlannedJob, list[str]]]:
    """The job of a recipe, and what a person should know of it, a sentence each.

    Its real rows where its data and its model are here; else rows of `train.max_length`.

    Args:
        device: where it will run: ``auto`` (what the recipe and this machine say), ``cpu``,
            ``cuda``.
        label_share: of imagined rows' tokens.

    Raises:
        QftError: there is no such model, or the training would be refused.
    """
    recipe = _for_device(recipe, device)
    where = None if device == "auto" else device
    with config_folder(recipe.model) as (folder, notes):
        named = recipe.data.train
        rows_are_here = Path(named).expanduser().exists()
        if models.is_here(recipe.model) and rows_are_here:
            inputs = open_inputs(recipe)
            yield planned_job(recipe, inputs, where), [*notes, *inputs.notes]
            return
        if named != _NOWHERE:
            missing = "the model" if rows_are_here else f"data.train ({named})"
            notes.append(
                f"{missing} is not here: planned for rows of train.max_length, all labelled"
            )
        inputs = imagined_inputs(recipe, folder, label_share=label_share)
        yield planned_job(recipe, inputs, where), notes


def recipe_of(source: str, overrides: Sequence[str], flags: Mapping[str, Any]) -> Recipe:
    """The recipe in a file, or one for a model that is merely named.

    Args:
        source: a YAML file, else a folder, a hub id or a built-in shape.
        overrides: ``key.sub=value``.
        flags: values by dotted key that were given on the command line.

    Raises:
        RecipeError: a value is wrong.
    """
    words = [*(f"{key}={value}" for key, value in flags.items()), *overrides]
    if source.endswith((".yaml", ".yml")):
        return load_recipe(source, words)
    values: dict[str, Any] = {
        "model": source, "data": {"train": _NOWHERE}, "strategy": "lora", "output": "runs/plan",
    }  # fmt: skip
    apply_overrides(values, words)
    if "task" not in values:
        with config_folder(source) as (folder, _):
            values["task"] = models.task_to_train(models.read_config(folder))
    return build_recipe(values, where="command line")


@contextlib.contextmanager
def config_folder(model: str) -> Iterator[tuple[Path, list[str]]]:
    """A folder with a model's config.json, and a note where it is not the model's own.

    Raises:
        ModelError: nobody knows this model.
    """
    path = Path(model).expanduser()
    shape = None if path.exists() else built_in_shape(model)
    if shape is None:
        yield (path if path.exists() else _fetched(model)), []
        return
    with tempfile.TemporaryDirectory(prefix="qft-shape-") as folder:
        config = shape_config(shape)
        if config.model_type not in TASKS:  # decoders of this kind come in 16 bits
            config.dtype = "bfloat16"
        config.save_pretrained(folder)
        named = [] if model == shape else [f"the built-in shape {shape} stands for {model}"]
        yield Path(folder), named


def built_in_shape(model: str) -> str | None:
    """The built-in shape of a model's name or hub id, if there is one."""
    if model in SHAPES:
        return model
    maker, _, name = model.lower().rpartition("/")
    name = _ENDINGS.sub("", name)
    return name if maker in _MAKERS and name in SHAPES else None


def _fetched(model: str) -> Path:
    """The folder of a hub model's config.json, which alone is fetched."""
    import huggingface_hub

    if not models.is_hub_id(model):
        return models.resolve_folder(model)  # raises, and says what is there
    try:
        return Path(huggingface_hub.hf_hub_download(model, "config.json")).parent
    except Exception as error:  # the hub's client raises many kinds, all meaning: not to be had
        raise ModelError(
            "The model is no local folder and no built-in shape, and the hub did not give its "
            "config.json.",
            where=model,
            found=f"{type(error).__name__}: {first_line(error)}",
            fix=f"a folder with a config.json, or a shape: {', '.join(SHAPES)}",
        ) from error


def _for_device(recipe: Recipe, device: str) -> Recipe:
    """A GPU that is not here computes in bfloat16; the recipe must not ask this machine for it."""
    if device == "auto":
        return recipe
    changes: dict[str, Any] = {"device": "auto"}
    if device == "cuda" and recipe.dtype == "auto":
        changes["dtype"] = "bfloat16"
    return recipe.model_copy(update=changes)
