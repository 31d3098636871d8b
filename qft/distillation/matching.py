"""Which layer of the student learns from which of the teacher, and how their states are compared.

Romero et al. 2014 (https://arxiv.org/abs/1412.6550); the even spread is that of Jiao et al. 2019
(https://arxiv.org/abs/1909.10351).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from qft.distillation.objective import DistillSettings, HiddenStates, LayerMap
from qft.distillation.teachers import teacher_shape
from qft.errors import RecipeError
from qft.lean.model_parts import device_of, hidden_width, layer_stacks
from qft.lean.taps import numbered_layers
from qft.strategy import Context

_ATTRIBUTE = "distillation_projections"
Pairs = dict[int, int]


def layer_pairs(layers: LayerMap, student: int, teacher: int) -> Pairs:
    """The student's layers with the teacher's that each learns from, both counted from 0.

    Args:
        layers: as the recipe says.
        student: layers the student has.
        teacher: layers the teacher has.

    Raises:
        RecipeError: a layer that is not there.
    """
    if layers == "last":
        return {student - 1: teacher - 1}
    if layers == "auto":
        last = [max(1, round(n * teacher / student)) for n in range(1, student + 1)]
        return {number: place - 1 for number, place in enumerate(last)}
    wrong = [f"{s}: {t}" for s, t in layers.items() if s >= student or t >= teacher]
    if wrong:
        raise RecipeError(
            "There is no such layer to learn or to learn from.",
            where="strategy.hidden.layers",
            found=f"{', '.join(wrong)}; the student has the layers 0 to {student - 1}, the "
            f"teacher 0 to {teacher - 1}",
        )
    return dict(layers)


class Projection(nn.Module):
    """From the student's width to the teacher's, for one pair of layers.

    It starts orthogonal; between equal widths it starts as no change at all, since such a student
    is most often cut out of its teacher.

    Args:
        student: width of its hidden states.
        teacher: width of its.
        learned: whether it trains; else it is orthogonal and stays.
        seed: of its values.
    """

    weight: Tensor

    def __init__(self, student: int, teacher: int, *, learned: bool, seed: int) -> None:
        super().__init__()
        basis = torch.eye(teacher) if student == teacher else _orthogonal(student, teacher, seed)
        # a fixed one is made of the seed again, so no checkpoint need hold it
        if learned:
            self.weight = nn.Parameter(basis.contiguous())
        else:
            self.register_buffer("weight", basis.contiguous(), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[rows, student]`` to ``[rows, teacher]``, in float32."""
        return functional.linear(hidden.to(self.weight.dtype), self.weight)


def _orthogonal(student: int, teacher: int, seed: int) -> Tensor:
    """``[teacher, student]``, with orthonormal rows or columns, whichever are fewer."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(max(student, teacher), min(student, teacher), generator=generator)
    basis: Tensor = torch.linalg.qr(start)[0]
    return basis if teacher >= student else basis.t()


def add_projections(model: nn.Module, settings: DistillSettings, context: Context) -> None:
    """Hangs a projection for each pair of layers on a model, where the widths call for one.

    Raises:
        RecipeError: no such layer; teacher and student are of two kinds.
        ModelError: the teacher is not there.
    """
    assert settings.hidden is not None
    shape = teacher_shape(settings.teacher, context.task)
    stacks = len(layer_stacks(model))
    if stacks != shape.stacks:
        raise RecipeError(
            "The layers of an encoder-decoder and of a model with one stack cannot be paired.",
            where="strategy.hidden",
            fix="leave hidden out, or a teacher of the student's kind",
        )
    pairs = layer_pairs(settings.hidden.layers, len(numbered_layers(model)), shape.layers)
    made = projections(settings.hidden, pairs, hidden_width(model), shape.width, context.seed)
    if made is not None:
        first = next(model.parameters())
        model.add_module(_ATTRIBUTE, made.to("meta" if first.is_meta else device_of(model)))


def projections(
    hidden: HiddenStates, pairs: Pairs, student: int, teacher: int, seed: int
) -> nn.ModuleDict | None:
    """One for each of the student's layers; None where states of one width are compared as such."""
    learned = hidden.projection == "learned"
    if student == teacher and not learned:
        return None
    return nn.ModuleDict({
        str(layer): Projection(student, teacher, learned=learned, seed=seed + layer)
        for layer in pairs
    })  # fmt: skip


def projections_of(model: nn.Module) -> nn.ModuleDict | None:
    """What `add_projections` left on a model."""
    found: nn.ModuleDict | None = getattr(model, "_modules", {}).get(_ATTRIBUTE)
    return found


@contextmanager
def taken_off(model: nn.Module) -> Iterator[None]:
    """Within it the model has no projections."""
    held = model._modules.pop(_ATTRIBUTE, None)
    try:
        yield
    finally:
        if held is not None:
            model._modules[_ATTRIBUTE] = held


def distances(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """How far states are apart, ``[rows]``, in float32.

    Args:
        student: ``[rows, width]``, projected.
        teacher: ``[rows, width]``.
        kind: mse is the mean of the squared differences, cosine is one minus the cosine.
    """
    teacher = teacher.to(student.device, student.dtype)
    if kind == "mse":
        return (student - teacher).square().mean(dim=1)
    return 1 - functional.cosine_similarity(student, teacher, dim=1)
