"""Opens a teacher, and finds out what it and its student have in common."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qft import hardware, models
from qft.adapter_folder import AdapterFolder, adapter_in, locate_adapter, open_adapter_model
from qft.data.tasks import TASKS
from qft.distillation.objective import DistillSettings
from qft.errors import ModelError, RecipeError
from qft.inputs import Inputs
from qft.lean.model_loss import ModelLoss, install_model_loss, vocabulary_of
from qft.lean.model_parts import hidden_width, layer_stacks, output_embeddings
from qft.lean.taps import numbered_layers
from qft.preparation import inner_model
from qft.quantization import dequantized
from qft.recipe import Recipe


@dataclass(frozen=True)
class TeacherShape:
    """What is known of a teacher before its weights are."""

    layers: int
    width: int
    stacks: int


@dataclass(frozen=True)
class OpenTeacher:
    """A teacher in memory, frozen, in eval mode.

    Attributes:
        loss: what runs it without making logits; None where it has a head of its task.
        shared: tokens that the student has too; None where there are none to share.
        class_order: the teacher's class for each of the student's; None where they agree.
    """

    model: nn.Module
    tokenizer: Any
    loss: ModelLoss | None
    shared: int | None
    class_order: tuple[int, ...] | None


def teacher_folder(source: str, trust: models.Trust | None = None) -> Path | AdapterFolder:
    """The teacher's own folder; where it is a run or an adapter, that.

    Raises:
        ModelError: it is not there.
    """
    path = Path(source).expanduser()
    if path.is_dir() and (adapter_in(path) is not None or (path / "checkpoints").is_dir()):
        return locate_adapter(path, trust=trust)
    return models.resolve_folder(source, trust)


@functools.lru_cache(maxsize=4)
def teacher_shape(source: str, task: str) -> TeacherShape:
    """Read off a skeleton on the meta device."""
    found = teacher_folder(source)
    folder = found.base if isinstance(found, AdapterFolder) else found
    labels = ("no", "yes") if task in ("classify", "token") else None
    skeleton = models.open_skeleton(folder, models.ModelSpec(source, task, labels))
    return TeacherShape(
        len(numbered_layers(skeleton)), hidden_width(skeleton), len(layer_stacks(skeleton))
    )


@dataclass(frozen=True)
class TeacherPlan:
    """A teacher before its weights are loaded, found to fit the student.

    Attributes:
        adapter: where the teacher is a run or an adapter.
        shared: see `OpenTeacher`, like `class_order`.
    """

    spec: models.ModelSpec
    folder: Path
    adapter: AdapterFolder | None
    tokenizer: Any
    shared: int | None
    class_order: tuple[int, ...] | None


def plan_teacher(recipe: Recipe, settings: DistillSettings, inputs: Inputs) -> TeacherPlan:
    """Finds the teacher, and what it and the student have in common.

    Raises:
        ModelError: it is not there, or not for the task.
        RecipeError: student and teacher have different tokens or classes.
    """
    trust = models.Trust(recipe.allow_pickle, recipe.trust_remote_code)
    chosen = hardware.choose(recipe.device, recipe.dtype)
    found = teacher_folder(settings.teacher, trust)
    adapter = found if isinstance(found, AdapterFolder) else None
    folder = found.base if isinstance(found, AdapterFolder) else found
    if adapter is not None:
        _require_same_task(adapter, recipe.task)
        spec = adapter.spec(device=chosen.device, trust=trust)
        names: tuple[str, ...] | None = spec.labels
    else:
        names, _ = models.labels_in(models.read_config(folder))
        spec = models.ModelSpec(
            source=settings.teacher,
            task=recipe.task,
            quantize=settings.teacher_quantize,
            dtype=chosen.dtype,
            device=chosen.device,
            trust=trust,
        )
        _require_a_head(folder, recipe.task)
    tokenizer = models.open_tokenizer(folder, trust)
    predicts = TASKS[recipe.task].predicts
    order, shared = None, None
    if predicts in ("class", "tags") and inputs.train.labels is not None:
        order = class_order(inputs.train.labels, names or ())
    if settings.has_lessons and settings.loss != "uld":  # the teacher reads the student's tokens
        rows = (_rows(inputs.base, recipe.model, recipe.task), _rows(folder, "", recipe.task))
        shared = shared_tokens(inputs.tokenizer, tokenizer, rows)
    return TeacherPlan(
        spec, folder, adapter, tokenizer, shared if predicts == "tokens" else None, order
    )


def open_teacher(recipe: Recipe, settings: DistillSettings, inputs: Inputs) -> OpenTeacher:
    """Loads the teacher, quantized as asked.

    Raises:
        QftError: see `plan_teacher`; it cannot be loaded.
    """
    plan = plan_teacher(recipe, settings, inputs)
    model = (
        models.open_model(plan.folder, plan.spec)
        if plan.adapter is None
        else open_adapter_model(plan.adapter, plan.spec)
    )
    model.requires_grad_(False)
    loss = _loss_of(model) if TASKS[recipe.task].predicts == "tokens" else None
    return OpenTeacher(model, plan.tokenizer, loss, plan.shared, plan.class_order)


def _require_same_task(adapter: AdapterFolder, task: str) -> None:
    if adapter.task != task:
        raise RecipeError("The teacher was trained for another task.", where="strategy.teacher",
                          found=f"{adapter.task}; the recipe's is {task}")  # fmt: skip


def _rows(folder: Path, source: str, task: str) -> int:
    """Tokens a model has an output for; of one with a head, an input."""
    labels = ("no", "yes") if task in ("classify", "token") else None
    skeleton: Any = models.open_skeleton(folder, models.ModelSpec(source, task, labels))
    head = output_embeddings(skeleton)
    return vocabulary_of(head if head is not None else skeleton.get_input_embeddings())


def _loss_of(model: nn.Module) -> ModelLoss:
    inner = inner_model(model)
    loss = install_model_loss(inner, dequantized)
    if loss is None:
        raise ModelError(
            "This family's output layer cannot be run a few positions at a time.",
            where="strategy.teacher",
            found=type(inner).__name__,
            fix="another teacher",
        )
    return loss


def _require_a_head(folder: Path, task: str) -> None:
    """A head that the checkpoint does not hold would say nothing but noise."""
    if task not in ("classify", "extract", "token"):
        return
    stored = models.task_of(models.read_config(folder))
    if stored != task:
        raise ModelError(
            "The teacher has no trained head for this task.",
            where=folder,
            found=f"a model for {stored}",
            fix=f"train it for {task} first (`qft train`), and name that run as the teacher",
        )


def shared_tokens(student: Any, teacher: Any, rows: tuple[int, int]) -> int:
    """Of how many first tokens two models mean the same.

    Vocabularies that are padded to different sizes, or one of which has tokens added at its end,
    agree on what comes before.

    Args:
        student: its tokenizer.
        teacher: likewise.
        rows: of the two output layers, the student's first.

    Raises:
        RecipeError: a token has another number in the two.
    """
    own, other = student.get_vocab(), teacher.get_vocab()
    both = own.keys() & other.keys()
    wrong = sorted((own[token], token) for token in both if own[token] != other[token])
    last = min(max(own.values()), max(other.values()))
    # below the shorter one's end, each number must be the same token
    only = [t for vocabulary in (own, other) for t, n in vocabulary.items()
            if n <= last and t not in both]  # fmt: skip
    if wrong or only:
        example = f"{wrong[0][1]!r} is {own[wrong[0][1]]} and {other[wrong[0][1]]}" if wrong else (
            f"only one of them has {sorted(only)[0]!r}"
        )  # fmt: skip
        raise RecipeError(
            "Student and teacher do not have the same tokens.",
            where="strategy.teacher",
            found=f"{len(wrong) + len(only)} that differ; {example}",
            fix="loss: uld (for chat, instruct and seq2seq), texts: teacher with loss: none, or a "
            "teacher of the student's family",
        )
    return int(min(last + 1, *rows))


def class_order(student: Sequence[str], teacher: Sequence[str]) -> tuple[int, ...] | None:
    """Where the teacher has each of the student's classes.

    Raises:
        RecipeError: it has others.
    """
    if list(student) == list(teacher) or _unnamed(teacher, len(student)):
        return None
    place: Mapping[str, int] = {name: number for number, name in enumerate(teacher)}
    if set(place) != set(student):
        raise RecipeError(
            "Student and teacher have different classes.",
            where="strategy.teacher",
            found=f"{', '.join(teacher) or 'none'}; the data has {', '.join(student)}",
            fix="a teacher trained on the same classes, or data.labels with its names",
        )
    return tuple(place[name] for name in student)


def _unnamed(names: Sequence[str], count: int) -> bool:
    """Whether a config only counts its classes, as transformers does by default."""
    return list(names) == [f"LABEL_{number}" for number in range(count)]
