"""What is planned: a recipe, the shape of its model, and its rows or imagined ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qft.data.encoding import UNSUPERVISED
from qft.data.packing import PACKABLE
from qft.data.tasks import TASKS, Example, ExampleSet, Task
from qft.inputs import Inputs
from qft.planning.flat_rows import would_keep_apart
from qft.readiness import DEFAULT_MICRO_BATCH, Ready, make_ready
from qft.recipe import Recipe


@dataclass(frozen=True)
class PlannedJob:
    """A training that nothing speaks against but, perhaps, memory.

    Attributes:
        recipe: what was asked.
        inputs: its data, or imagined rows; `base` holds a config.json at least.
        ready: what `qft.readiness` found.
        device: where it will run: ``cpu`` or ``cuda``; this machine may be another.
    """

    recipe: Recipe
    inputs: Inputs
    ready: Ready
    device: str

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and arithmetic."""
        assert self.ready.spec.dtype is not None
        return self.ready.spec.dtype

    @property
    def flat(self) -> bool:
        """Whether a micro-batch is expected to be one long row; the loaded model has the word."""
        shares = self.recipe.task in PACKABLE and not self.ready.needs.extends_sequence
        engine = self.device == "cpu" and self.recipe.memory.savers.attention
        if not (shares and engine and len(self.inputs.train.examples) > 1):
            return False
        return would_keep_apart(self.ready.skeleton, self.recipe.strategy, self.ready.context)

    @property
    def micro_batch(self) -> int:
        """Examples a forward pass, to begin with."""
        return first_micro_batch(self.recipe)

    @property
    def notes(self) -> list[str]:
        """What the fake step leaves out, a sentence each; the training takes no more for it."""
        recipe, needs = self.recipe, self.ready.needs
        objective = recipe.strategy.objective
        found = []
        cached = recipe.memory.feature_cache != "off" and not objective.whole_model
        if cached and needs.lowest_trainable_layer and not recipe.train.embedding_noise:
            found.append(
                f"Planned without the feature cache: with it the {needs.lowest_trainable_layer} "
                "lowest layers may leave memory after the first pass."
            )
        if getattr(getattr(objective, "settings", None), "on_policy", 0):
            found.append("What the student writes is taken to be as long as the data's answers.")
        if self.ready.held not in ("none", "int8", "nf4", "fp4", "compressed-tensors"):
            found.append(f"Weights stored as {self.ready.held} are planned as if unquantized.")
        return found

    def longest(self) -> list[Example]:
        """The examples of the optimizer step that needs most, in its order.

        They are the two longest micro-batches where a step has several: what the first one leaves
        behind, its gradients, is there while the second runs. More of them add nothing.
        """
        train, count = self.recipe.train, self.micro_batch
        pack_to = train.max_length if train.packing else None
        both = min(2 * count, max(count, train.batch_size))
        chosen = longest_examples(self.inputs.train.examples, both, pack_to)
        if train.group_by_length or train.packing:  # the longest run first, whatever the order
            return chosen
        return [*chosen[count:], *chosen[:count]]

    def longest_micro_batch(self) -> list[Example]:
        """The examples of the one forward pass that needs most."""
        packing = self.recipe.train.packing
        pack_to = self.recipe.train.max_length if packing else None
        return longest_examples(self.inputs.train.examples, self.micro_batch, pack_to)

    def changed(self, recipe: Recipe) -> PlannedJob:
        """The same rows under another recipe, cut where it allows fewer tokens."""
        inputs = self.inputs
        if recipe.train.max_length < self.recipe.train.max_length:
            inputs = replace(inputs, train=_cut(inputs.train, recipe.train.max_length))
        other = {"memory": recipe.memory, "train": recipe.train}
        same_model = self.recipe.model_copy(update=other) == recipe
        ready = make_ready(recipe, inputs, self.ready if same_model else None)
        return PlannedJob(recipe, inputs, ready, self.device)


def planned_job(recipe: Recipe, inputs: Inputs, device: str | None = None) -> PlannedJob:
    """A job of real rows (`qft.inputs.open_inputs`) or imagined ones (`imagined_inputs`).

    Args:
        device: where it will run; None is what the recipe and this machine say.

    Raises:
        QftError: the training is refused.
    """
    ready = make_ready(recipe, inputs)
    return PlannedJob(recipe, inputs, ready, device or ready.spec.device or "cpu")


def first_micro_batch(recipe: Recipe, pooled: bool = False) -> int:
    """Examples a forward pass, to begin with: all of a step where each is but one cached row."""
    size = recipe.train.batch_size
    return recipe.memory.micro_batch or (size if pooled else min(size, DEFAULT_MICRO_BATCH))


def longest_examples(
    examples: Sequence[Example], rows: int, pack_to: int | None = None
) -> list[Example]:
    """The longest examples: one a row, or as many as fill the rows."""
    ordered = sorted(examples, key=lambda e: -len(e.inputs["input_ids"]))
    if pack_to is None:
        return ordered[:rows]
    filled = itertools.accumulate(len(e.inputs["input_ids"]) for e in ordered)
    return ordered[: 1 + sum(tokens < rows * pack_to for tokens in filled)]


def imagined_examples(
    task: Task, length: int, count: int, *, label_share: float = 1.0, target_length: int = 0
) -> list[Example]:
    """Rows of one length, as a task's own would be.

    Args:
        length: tokens a row.
        label_share: of the tokens have a label, the last ones (tasks that predict tokens).
        target_length: of an encoder-decoder's answers; 0 is ``length``.
    """
    return [Example(n, _imagined(task, length, label_share, target_length)) for n in range(count)]


def _imagined(task: Task, length: int, share: float, target_length: int) -> dict[str, Any]:
    ids = [0] * length
    if task.name == "seq2seq":
        return {"input_ids": ids, "labels": [0] * (target_length or length)}
    match task.predicts:
        case "class":
            return {"input_ids": ids, "labels": 0}
        case "span":
            return {"input_ids": ids, "labels": (0, 0)}
    kept = max(1, round(share * length))
    return {"input_ids": ids, "labels": [UNSUPERVISED] * (length - kept) + [0] * kept}


def _cut(rows: ExampleSet, length: int) -> ExampleSet:
    return replace(rows, examples=[_cut_example(e, length) for e in rows.examples])


def _cut_example(example: Example, length: int) -> Example:
    if len(example.inputs["input_ids"]) <= length:
        return example
    whole = len(example.inputs["input_ids"])
    inputs = {
        name: value[:length] if isinstance(value, list) and len(value) == whole else value
        for name, value in example.inputs.items()
    }
    return replace(example, inputs=inputs)


class _NoTokenizer:
    """Stands where a tokenizer would, for rows that were never text."""

    pad_token_id = eos_token_id = 0

    def __call__(self, text: str, **settings: Any) -> dict[str, list[int]]:
        """About as many tokens as a text would have."""
        return {"input_ids": [0] * max(1, len(text) // 4)}


def imagined_inputs(
    recipe: Recipe, folder: Path, *, label_share: float = 1.0, rows: int | None = None
) -> Inputs:
    """Rows that are all as long as the recipe allows, for a folder with a config.json at least.

    Args:
        rows: how many; None is as many as one optimizer step takes.
    """
    task, train = TASKS[recipe.task], recipe.train
    made = imagined_examples(
        task, train.max_length, rows or train.batch_size, label_share=label_share
    )
    labels = recipe.data.labels
    if labels is None and task.predicts in ("class", "tags"):
        labels = ("0", "1")
    return Inputs(folder, _NoTokenizer(), task, ExampleSet(made, labels), None, [])
