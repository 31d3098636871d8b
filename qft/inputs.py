"""What a recipe's training begins with, before a weight is loaded: tokenizer, examples, checks.

`qft check` stops here and shows what it found; `train` goes on with the very same objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qft import hardware, models
from qft.data.packing import PACKABLE
from qft.data.preflight import preflight
from qft.data.tasks import TASKS, ExampleSet, Task, load_train_eval
from qft.errors import RecipeError
from qft.progress import QUIET, Reporter
from qft.recipe import Recipe


@dataclass(frozen=True)
class Inputs:
    """A recipe's data, ready to train on.

    Attributes:
        base: folder of the base model, checked.
        train: the training examples, past the preflight.
        held_out: to judge by; None where the recipe has none.
        notes: what a person should know, a sentence each.
    """

    base: Path
    tokenizer: Any
    task: Task
    train: ExampleSet
    held_out: ExampleSet | None
    notes: list[str]


def open_inputs(recipe: Recipe, reporter: Reporter = QUIET) -> Inputs:
    """Opens the tokenizer, encodes the data and runs the preflight on it.

    Raises:
        RecipeError: the strategy cannot train the task, or the model's positions do not suffice.
        ModelError: the base is missing, broken or not to be trusted.
        DataError: the data cannot be read, does not fit the task, or would train the wrong tokens.
    """
    require_possible(recipe)
    trust = models.Trust(recipe.allow_pickle, recipe.trust_remote_code)
    base = models.resolve_folder(recipe.model, trust)
    models.check_folder(base, trust)
    tokenizer = models.open_tokenizer(base, trust)
    require_positions(recipe, base)
    training, held_out = load_train_eval(recipe, tokenizer)
    notes = []
    for part, name in ((training, "train"), (held_out, "eval")):
        if part is not None:
            reporter.say(f"{name}: {len(part.examples)} examples")
            notes += [f"{name}: {note}" for note in part.notes]
    notes += preflight(recipe.task, training, held_out, tokenizer, recipe.data)
    for note in notes:
        reporter.say(note)
    return Inputs(base, tokenizer, TASKS[recipe.task], training, held_out, notes)


def spec_of(recipe: Recipe, training: ExampleSet | None = None) -> models.ModelSpec:
    """How a recipe wants its model opened; its head is as wide as the training rows ask."""
    chosen = hardware.choose(recipe.device, recipe.dtype)
    return models.ModelSpec(
        source=recipe.model,
        task=recipe.task,
        labels=training.labels if training else None,
        labels_are=training.labels_are if training else "one",
        pooling=recipe.pooling,
        quantize=recipe.quantize,
        dtype=chosen.dtype,
        dropout=recipe.train.dropout,
        device=chosen.device,
        trust=models.Trust(recipe.allow_pickle, recipe.trust_remote_code),
    )


def require_possible(recipe: Recipe) -> None:
    """Refuses what the recipe alone shows to be impossible.

    Raises:
        RecipeError: the strategy cannot train the task; early stopping without held-out rows.
    """
    strategy = recipe.strategy
    if recipe.task not in strategy.tasks:
        raise RecipeError(
            f"The strategy {strategy.name!r} cannot train the task {recipe.task!r}.",
            where="task",
            fix=f"it can: {', '.join(sorted(strategy.tasks))}",
        )
    if recipe.train.early_stopping and not recipe.data.has_held_out:
        raise RecipeError(
            "Early stopping needs held-out rows to judge by.",
            where="train.early_stopping",
            fix="data.eval: FILE, or data.eval_share: 0.05",
        )
    _require_fitting_knobs(recipe)
    kind = strategy.objective.kind
    if kind not in ("task", "distill"):
        raise RecipeError(f"The objective {kind!r} is not known.", where="strategy",
                          fix="task, or distill")  # fmt: skip
    if kind == "distill" and recipe.train.class_weights != "none":
        raise RecipeError(
            "With a teacher every row counts the same.",
            where="train.class_weights",
            found=recipe.train.class_weights,
            fix="leave it out; a teacher trained with class weights passes them on",
        )


def require_no_chain(recipe: Recipe) -> None:
    """Refuses a recipe that asks for more than a training.

    Raises:
        RecipeError: it prunes or exports.
    """
    for key in ("prune", "export"):
        if getattr(recipe, key):
            raise RecipeError("This recipe does more than train.", where=key,
                              fix="qft heal RECIPE; or leave it out")  # fmt: skip


def _require_fitting_knobs(recipe: Recipe) -> None:
    """Knobs that mean something for some tasks only."""
    train, labelled = recipe.train, ("classify", "token")
    for asked, where, tasks in (
        (train.packing, "train.packing", PACKABLE),
        (train.label_smoothing > 0, "train.label_smoothing",
         ("text", "instruct", "chat", "seq2seq", *labelled)),
        (train.class_weights != "none", "train.class_weights", labelled),
        (recipe.data.augment.copies > 0, "data.augment.copies", ("classify",)),
    ):  # fmt: skip
        if asked and recipe.task not in tasks:
            raise RecipeError(
                "This knob is not for this task.",
                where=where,
                found=f"task: {recipe.task}",
                fix=f"leave it out; it is for {', '.join(tasks)}",
            )


def require_positions(recipe: Recipe, base: Path, taken: int = 0) -> None:
    """Refuses sequences that the model has not enough positions for.

    Args:
        taken: positions that the strategy needs for itself.

    Raises:
        RecipeError: `train.max_length` is too large.
    """
    limit = models.longest_input(base, spec_of(recipe))
    if limit is not None and recipe.train.max_length > limit - taken:
        used = f", of which the strategy takes {taken}" if taken else ""
        raise RecipeError(
            "Sequences would be longer than the model takes.",
            where="train.max_length",
            found=f"{recipe.train.max_length}; the model takes {limit} tokens{used}",
            fix=f"train.max_length: {limit - taken}",
        )
