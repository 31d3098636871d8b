"""Distillation: any other strategy, trained towards a teacher as well as towards the labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from qft.distillation.objective import WRITING_TASKS, Distillation, DistillSettings
from qft.strategy import BaseTensors, Context, Merge, Needs, Objective, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn

_STATE = "projections."


class Distill(DistillSettings, Strategy):
    """Trains what the student's strategy trains, towards a teacher's distribution or layers.

    What is saved is the student's own: its folder, its merge, its format.
    """

    name: ClassVar[str] = "distill"
    paper: ClassVar[str] = "https://arxiv.org/abs/1503.02531"

    student: Strategy = Field(description="what trains, as a strategy's entry: {name: lora}")

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        if isinstance(self.student, Distill):
            raise ValueError("a student has one teacher")
        return self

    @property
    def mergeable(self) -> bool:
        """If the student is."""
        return self.student.mergeable

    @property
    def advice(self) -> str:
        """The student's."""
        return self.student.advice

    @property
    def tasks(self) -> frozenset[str]:
        """The student's; answers are written only where rows ask for them."""
        return self.student.tasks & frozenset(WRITING_TASKS) if self.writes else self.student.tasks

    @property
    def handed_over(self) -> Strategy:
        """The student's: nothing of the teacher is in it."""
        return self.student.handed_over

    @property
    def objective(self) -> Objective:
        """The teacher, and what is learned from it."""
        whole = self.hidden is not None or self.on_policy > 0
        return Distillation(whole_model=whole, settings=self)

    def needs(self, skeleton: nn.Module) -> Needs:
        """What the student needs."""
        return self.student.needs(skeleton)

    def attach(self, model: nn.Module, context: Context) -> nn.Module:
        """Attaches the student; beside it what turns its hidden states into the teacher's size."""
        from qft.distillation.matching import add_projections

        attached = self.student.attach(model, context)
        if self.hidden is not None:
            add_projections(attached, self, context)
        return attached

    def after_step(self, model: nn.Module, step: int) -> None:
        """The student's."""
        self.student.after_step(model, step)

    def penalty(self, model: nn.Module) -> Tensor | None:
        """The student's."""
        return self.student.penalty(model)

    def state(self, model: nn.Module) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """The student's, and the projections that train."""
        from qft.distillation.matching import projections_of

        tensors, values = self.student.state(model)
        learned = projections_of(model)
        own = {} if learned is None else learned.state_dict()
        return {**tensors, **{f"{_STATE}{name}": value for name, value in own.items()}}, values

    def load_state(
        self, model: nn.Module, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Both."""
        from qft.distillation.matching import projections_of

        own = {n.removeprefix(_STATE): t for n, t in tensors.items() if n.startswith(_STATE)}
        learned = projections_of(model)
        if learned is not None:
            learned.load_state_dict(own)
        others = {n: t for n, t in tensors.items() if not n.startswith(_STATE)}
        self.student.load_state(model, others, values)

    def save(self, model: nn.Module, folder: Path) -> None:
        """The student's folder."""
        with _student_alone(model):
            self.student.save(model, folder)

    def load(self, model: nn.Module, folder: Path) -> None:
        """The student's folder."""
        with _student_alone(model):
            self.student.load(model, folder)

    def open_merge(self, folder: Path, base: BaseTensors) -> Merge:
        """The student's."""
        return self.student.open_merge(folder, base)


@contextmanager
def _student_alone(model: nn.Module) -> Iterator[None]:
    """Within it the model holds no projections, which are no part of what is handed over."""
    from qft.distillation.matching import taken_off

    with taken_off(model):
        yield
