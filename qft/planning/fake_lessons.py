"""What a teacher says, without a word of it: its model on fake tensors, or lessons of that size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qft.data.tasks import TASKS, Example
from qft.distillation.lessons import Lesson, label_rows, layer_key
from qft.distillation.live import LiveTeacher, half_of, supervised_alone
from qft.distillation.matching import Pairs
from qft.distillation.objective import DistillSettings
from qft.distillation.teachers import OpenTeacher, plan_teacher, teacher_shape
from qft.errors import RecipeError
from qft.inputs import Inputs
from qft.lean.label_loss import Head
from qft.lean.model_loss import install_model_loss
from qft.lean.model_parts import encoder_layers, is_encoder_decoder
from qft.planning.skeletons import open_held_skeleton
from qft.preparation import inner_model
from qft.recipe import Recipe
from qft.strategy import Context


def open_teacher_skeleton(recipe: Recipe, settings: DistillSettings, inputs: Inputs) -> OpenTeacher:
    """As `qft.distillation.teachers.open_teacher`, without weights.

    Raises:
        QftError: it is not there, or does not fit the student.
    """
    plan = plan_teacher(recipe, settings, inputs)
    if plan.adapter is None:
        model = open_held_skeleton(plan.folder, plan.spec)
    else:
        strategy = plan.adapter.strategy
        bare = open_held_skeleton(plan.adapter.base, plan.spec)
        keep = strategy.needs(bare).full_precision
        bare = open_held_skeleton(plan.adapter.base, plan.spec, keep)
        model = strategy.attach(bare, Context(task=plan.adapter.task))
    model.requires_grad_(False).eval()
    loss = None
    if TASKS[recipe.task].predicts == "tokens":
        loss = install_model_loss(inner_model(model), _no_weight)
    return OpenTeacher(model, plan.tokenizer, loss, plan.shared, plan.class_order)


def _no_weight(layer: nn.Module) -> Tensor:
    raise RecipeError("The teacher's output layer is quantized, and cannot be planned.",
                      where="strategy.teacher", found=type(layer).__name__)  # fmt: skip


class FakeLive(LiveTeacher):
    """A teacher in memory whose tensors are fake: it is told how many labels there are."""

    def _own_lessons(self, examples: Sequence[Example]) -> list[Lesson]:
        if self.teacher.loss is not None:
            self.teacher.loss.fake_labels = sum(
                label_rows(example, shifted=self._shifted) for example in examples
            )
        return super()._own_lessons(examples)


class FakeLessons:
    """Lessons as a cache gives them; see `qft.distillation.lessons.Source`.

    Args:
        mode: whose the fake tensors are.
        model: the student.
        pairs: its layers with the teacher's.
    """

    head: tuple[Head, int] | None = None

    def __init__(
        self, mode: FakeTensorMode, recipe: Recipe, settings: DistillSettings, inputs: Inputs,
        model: nn.Module, pairs: Pairs,
    ) -> None:  # fmt: skip
        self._mode, self._settings, self._pairs = mode, settings, pairs
        self._task, self._labels = TASKS[recipe.task], inputs.train.labels
        inner = inner_model(model)
        self._shifted = self._task.predicts == "tokens" and not is_encoder_decoder(inner)
        self._encoder_layers = encoder_layers(inner)
        plan = plan_teacher(recipe, settings, inputs)
        self.shared = plan.shared
        self._precision = plan.spec.dtype or torch.float32
        self._width = teacher_shape(settings.teacher, recipe.task).width if pairs else 0

    def lessons(self, examples: Sequence[Example]) -> list[Lesson]:
        """One an example."""
        with self._mode:
            return [self._lesson(example) for example in examples]

    def _lesson(self, example: Example) -> Lesson:
        rows = label_rows(example, shifted=self._shifted)
        made: dict[str, Tensor] = {}
        if self._settings.loss != "none":
            made |= self._words(rows) if self._task.predicts == "tokens" else self._logits(example)
        for student, teacher in self._pairs.items():
            made[layer_key(teacher)] = torch.empty(
                self._positions(example, student), self._width, dtype=self._held_type()
            )
        return made

    def _words(self, rows: int) -> dict[str, Tensor]:
        if self._settings.keeps == "samples":
            shape = (rows, self._settings.draws)
            return {
                "samples": torch.empty(shape, dtype=torch.int64),
                "weights": torch.empty(shape),
                "entropy": torch.empty(rows),
            }
        count = min(self._settings.top_k, self.shared or self._settings.top_k)
        return {
            "tokens": torch.empty(rows, count, dtype=torch.int64),
            "log_probabilities": torch.empty(rows, count),
        }

    def _logits(self, example: Example) -> dict[str, Tensor]:
        if self._task.predicts == "span":
            shape = (len(example.inputs["input_ids"]), 2)
        else:
            shape = (label_rows(example, shifted=False), len(self._labels or ()) or 1)
        return {"logits": torch.empty(shape, dtype=self._precision)}

    def _positions(self, example: Example, layer: int) -> int:
        """See `qft.distillation.live.hidden_positions`."""
        half = half_of(layer, self._encoder_layers)
        alone = supervised_alone(self._settings, self._task)
        if half == "decoder" or (alone and half == "only"):
            return label_rows(example, shifted=self._shifted)
        return len(example.inputs["input_ids"])

    def _held_type(self) -> torch.dtype:
        wide = self._precision == torch.float32
        return torch.float16 if wide and self._settings.cache_precision == "float16" else (
            self._precision
        )  # fmt: skip
