"""Where a training's lessons come from: the cache, or a teacher in memory; and the loss of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qft import models
from qft.data.examples import Example
from qft.data.tasks import load_train_eval, pad_id
from qft.distillation.live import LiveTeacher
from qft.distillation.matching import Pairs, layer_pairs
from qft.distillation.objective import WRITING_TASKS, Distillation, DistillSettings
from qft.distillation.teachers import open_teacher, teacher_shape
from qft.errors import RecipeError
from qft.inputs import Inputs
from qft.lean.taps import numbered_layers
from qft.progress import Reporter, human_bytes
from qft.recipe import Recipe


def settings_in(recipe: Recipe) -> DistillSettings | None:
    """What the recipe says of a teacher; None without one."""
    objective = recipe.strategy.objective
    return objective.of if isinstance(objective, Distillation) else None


def cache_root(recipe: Recipe, settings: DistillSettings) -> Path:
    """The folder of all that is kept of teachers."""
    chosen = settings.cache_folder
    beside = Path(recipe.output).parent / "teacher-cache"
    return Path(chosen).expanduser() if chosen else beside


def teacher_layers(recipe: Recipe, settings: DistillSettings, inputs: Inputs) -> Pairs:
    """The student's layers with the teacher's that they learn from; empty without any."""
    if settings.hidden is None:
        return {}
    skeleton = models.open_skeleton(inputs.base, models.ModelSpec(recipe.model, recipe.task))
    shape = teacher_shape(settings.teacher, recipe.task)
    return layer_pairs(settings.hidden.layers, len(numbered_layers(skeleton)), shape.layers)


def live_source(
    recipe: Recipe,
    settings: DistillSettings,
    inputs: Inputs,
    reporter: Reporter,
    layers: Sequence[int] = (),
) -> LiveTeacher:
    """Opens the teacher beside whatever is in memory already.

    Raises:
        ModelError: it cannot be opened.
        RecipeError: it does not fit the student.
    """
    teacher = open_teacher(recipe, settings, inputs)
    size = sum(p.nbytes for p in teacher.model.parameters())
    held = "" if settings.teacher_quantize == "none" else f", {settings.teacher_quantize}"
    reporter.say(f"teacher: {human_bytes(size)} of weights{held}")
    paired = None
    if settings.loss == "uld":
        paired = paired_examples(recipe, inputs, teacher.tokenizer)
    return LiveTeacher(
        teacher,
        inputs.task,
        pad_id(inputs.tokenizer if paired is None else teacher.tokenizer),
        settings,
        layers,
        paired,
    )


def paired_examples(recipe: Recipe, inputs: Inputs, tokenizer: object) -> dict[int, Example]:
    """The same rows in the teacher's own tokens and template, by the examples' numbers.

    Raises:
        RecipeError: this task's examples are no rows.
    """
    if recipe.task not in WRITING_TASKS:
        raise RecipeError(
            "With another tokenizer the texts are cut into other examples.",
            where="strategy.loss",
            found=f"uld, task: {recipe.task}",
            fix=f"uld is for {', '.join(WRITING_TASKS)}",
        )
    longer = recipe.data.model_copy(update={"too_long": "truncate", "eval": None, "eval_limit": 1})
    theirs, _ = load_train_eval(recipe.model_copy(update={"data": longer}), tokenizer)  # type: ignore[arg-type]
    found = {example.index: example for example in theirs.examples}
    missing = [example.index for example in inputs.train.examples if example.index not in found]
    if missing:
        raise RecipeError(
            "Some rows have nothing to learn from in the teacher's tokens.",
            where="strategy.teacher",
            found=f"{len(missing)} rows, first {missing[0]}",
            fix="a longer train.max_length",
        )
    return found
