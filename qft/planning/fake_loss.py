"""What a training minimises, over fake tensors: its own loss, told what fake tensors cannot say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qft.data.encoding import UNSUPERVISED
from qft.data.packing import Row
from qft.data.tasks import Example, Task
from qft.distillation.distilled_loss import DistilledLoss
from qft.distillation.lessons import Source
from qft.distillation.supply import settings_in, teacher_layers
from qft.inputs import Inputs
from qft.preparation import prepared
from qft.recipe import Recipe
from qft.step import StepLoss
from qft.task_loss import TaskLoss, balanced_weights


def planned_loss(
    recipe: Recipe, inputs: Inputs, model: nn.Module, source: Source | None
) -> StepLoss:
    """As the training's; texts that a student writes itself are taken to be as long as the data's.

    Args:
        source: of a teacher's lessons, where there is one.
    """
    train, weights = recipe.train, None
    if train.class_weights == "balanced" and inputs.train.labels is not None:
        weights = balanced_weights(inputs.train.examples, len(inputs.train.labels))
    own = TaskLoss(train.label_smoothing, weights)
    settings = settings_in(recipe)
    if settings is None or source is None:
        return CountedLabels(model, own)
    pairs = teacher_layers(recipe, settings, inputs)
    distilled = DistilledLoss(
        own, settings, source, inputs.task, model, pairs, inputs.train.labels_are
    )
    return CountedLabels(model, distilled)


class CountedLabels:
    """A step's loss that tells the engine how many labels a fake batch has."""

    def __init__(self, model: nn.Module, loss: StepLoss) -> None:
        state = prepared(model)
        assert state is not None
        self._engine, self._loss = state.engine, loss

    def examples(
        self, model: nn.Module, examples: Sequence[Example], step: int
    ) -> Sequence[Example]:
        """See `qft.step.StepLoss`."""
        return self._loss.examples(model, examples, step)

    def items(self, task: Task, batch: Mapping[str, Tensor]) -> float:
        """See `qft.step.StepLoss`."""
        return self._loss.items(task, batch)

    def arguments(self, rows: Sequence[Row], *, chunked: bool) -> dict[str, Any]:
        """See `qft.step.StepLoss`."""
        if self._engine.loss is not None:
            skipped = 1 if self._engine.loss.shifted else 0
            self._engine.loss.fake_labels = sum(
                label != UNSUPERVISED
                for row in rows
                for example in row
                for label in example.inputs["labels"][skipped:]
            )
        return self._loss.arguments(rows, chunked=chunked)

    def of(self, output: Any, batch: Mapping[str, Tensor], *, shifted: bool) -> Tensor:
        """See `qft.step.StepLoss`."""
        return self._loss.of(output, batch, shifted=shifted)
