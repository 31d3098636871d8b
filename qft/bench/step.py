"""What a training step holds and computes, metered on fake tensors: no weights, no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from qft import models
from qft.bench.fake_model import DEVICE, fake_step
from qft.bench.shapes import TASKS, shape_config
from qft.errors import RecipeError, first_line
from qft.lean.divergence import Divergence, LiveRows, Teacher, TopK
from qft.lean.engine import Savers
from qft.lean.label_loss import CrossEntropy, LogitLoss, Mixed
from qft.lean.meter import CATEGORIES, Reading, meter
from qft.lean.model_loss import install_model_loss, vocabulary_of
from qft.lean.model_parts import is_encoder_decoder, writes_text
from qft.lean.standins import BitsAndBytesAdam, quantize_skeleton
from qft.preparation import Checkpointing, Offload, inner_model, prepare, prepared
from qft.quantization import unquantized_modules
from qft.strategy import Context, Strategy

Optimizer = Literal["adamw", "adamw-8bit", "sgd"]
ALL = Savers()
PLAIN = Savers(label_loss=False, lora=False, gated_mlp=False, norms=False, attention=False)


@dataclass(frozen=True)
class StepSettings:
    """One step to meter.

    Attributes:
        shape: a built-in one (`qft.bench.shapes`), or a folder or file with a config.json.
        length: tokens a sequence.
        batch: sequences, all in one forward pass.
        label_share: of the tokens have a label.
        quantize: how the frozen linear layers are held.
    """

    shape: str
    length: int = 2048
    batch: int = 1
    quantize: Literal["none", "nf4", "fp4", "int8"] = "none"
    checkpointing: Checkpointing = "full"
    offload: Offload = "none"
    savers: Savers = ALL
    optimizer: Optimizer = "adamw"
    label_share: float = 1.0
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class TeacherSettings:
    """Whose word a metered student hears; see `qft.distillation`.

    Attributes:
        shape: of the teacher; its vocabulary is the student's.
        quantize: how its linear layers are held.
        top_k: tokens a position, out of a cache; None is a teacher in memory.
        weight: share of the distillation in the loss.
    """

    shape: str
    quantize: Literal["none", "nf4", "fp4", "int8"] = "none"
    top_k: int | None = None
    weight: float = 0.5


def meter_step(
    settings: StepSettings, strategy: Strategy, teacher: TeacherSettings | None = None
) -> Reading:
    """The second training step of a model of this shape: forward, backward, optimizer.

    Args:
        teacher: with one, the student is distilled by it.

    Raises:
        RecipeError: there is no such shape, or the strategy does not fit it.
    """
    model, task = skeleton_of(settings, strategy)
    model = prepare(
        model,
        strategy,
        checkpointing=settings.checkpointing,
        offload=settings.offload,
        savers=settings.savers,
        context=Context(task=task, total_steps=1000),
    )
    beside = None
    if teacher is not None and teacher.top_k is None:
        beside, _ = skeleton_of(replace(settings, shape=teacher.shape, quantize=teacher.quantize),
                              strategy)  # fmt: skip
        beside.requires_grad_(False)
    with fake_step(model, *([beside] if beside is not None else [])):
        optimizer = optimizer_of(model, settings.optimizer)
        batch = batch_of(model, settings)
        source = None if teacher is None else FakeTeacher(beside, teacher.top_k, settings, batch)

        def step() -> None:
            extra = {}
            if source is not None and teacher is not None:
                extra = {"teaching": source.teaching(teacher.weight)}
            model(**batch, **extra).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        held = model if beside is None else nn.ModuleList([model, beside])
        return meter(step, model=held, optimizer=optimizer, device=DEVICE)


class FakeTeacher:
    """Says nothing, in as many bytes as a teacher would need for it.

    Args:
        model: the teacher, on fake tensors; None where its word comes from a cache.
        top_k: tokens a position, of a cache.
        batch: the student's.
    """

    def __init__(
        self, model: nn.Module | None, top_k: int | None, settings: StepSettings, batch: Any
    ) -> None:
        self._model, self._top_k, self._batch = model, top_k, batch
        self._labels = round(settings.label_share * batch["input_ids"].numel())
        self._loss = None
        if model is not None:
            self._loss = install_model_loss(model.eval(), _dense_stand_in)
            assert self._loss is not None
            self._loss.fake_labels = self._labels

    def teaching(self, weight: float) -> Callable[[CrossEntropy, int], LogitLoss]:
        """A new lesson on the batch; a live teacher runs for it."""
        teacher: Teacher
        if self._loss is None:
            assert self._top_k is not None
            shape = (self._labels, self._top_k)
            tokens = torch.zeros(shape, dtype=torch.int32, device=DEVICE)
            teacher = TopK(tokens, torch.zeros(shape, dtype=torch.float16, device=DEVICE))
        else:
            with torch.no_grad():
                states, head = self._loss.label_states(self._loss.model, dict(self._batch))
            rows = vocabulary_of(self._loss.head)
            teacher = LiveRows(states, head, rows, rows)
        towards = Divergence(teacher)
        return lambda labels, count: (
            towards if weight == 1 else Mixed(labels, towards, (1 - weight, weight))
        )


def _dense_stand_in(layer: nn.Module) -> torch.Tensor:
    raise NotImplementedError("an output layer is not quantized")


def skeleton_of(settings: StepSettings, strategy: Strategy) -> tuple[nn.Module, str]:
    """The model of a shape on the meta device, its linear layers quantized; and its task."""
    import transformers

    config = shape_config(settings.shape)
    task = TASKS.get(config.model_type, "text")
    auto: Any = getattr(transformers, models.AUTO_CLASSES[task])
    try:
        with torch.device("meta"):
            model: nn.Module = auto.from_config(config, dtype=settings.dtype)
    except Exception as error:  # of many kinds, as its sizes may be odd in many ways
        raise RecipeError(
            f"transformers makes no model for the task {task!r} of this shape.",
            where="--shape",
            found=first_line(error),
        ) from error
    limit = getattr(config, "max_position_embeddings", None)
    learned = any("position_embedding" in name for name, _ in model.named_parameters())
    if learned and limit is not None and settings.length > limit:
        raise RecipeError("The model has no positions for so many tokens.", where="--seq",
                          found=settings.length, fix=f"at most {limit}")  # fmt: skip
    model.tie_weights()  # type: ignore[operator]
    if settings.quantize != "none":
        keep = unquantized_modules(model, strategy.needs(model).full_precision)
        quantize_skeleton(model, settings.quantize, tuple(keep))
    return model, task


def optimizer_of(model: nn.Module, name: Optimizer) -> torch.optim.Optimizer:
    """For what of the model trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    match name:
        case "adamw-8bit":
            return BitsAndBytesAdam(trained)
        case "sgd":
            return torch.optim.SGD(trained, momentum=0.9, foreach=False)
    return torch.optim.AdamW(trained, foreach=False)


def batch_of(model: nn.Module, settings: StepSettings) -> dict[str, Any]:
    """One batch, on the fake device."""
    inner: Any = inner_model(model)
    ids = torch.zeros(settings.batch, settings.length, dtype=torch.long, device=DEVICE)
    labels = ids
    if not writes_text(inner):
        labels = torch.zeros(settings.batch, dtype=torch.long, device=DEVICE)
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if writes_text(inner):
        batch["use_cache"] = False  # as a Trainer has it
    if is_encoder_decoder(inner) or not writes_text(inner):
        batch["attention_mask"] = torch.ones_like(ids)
    state = prepared(model)
    if state is not None and state.engine.loss is not None:
        state.engine.loss.fake_labels = round(settings.label_share * ids.numel())
    elif settings.label_share != 1.0:
        raise RecipeError("Only the chunked loss knows labels from other tokens.",
                          where="--labels", found=settings.label_share,
                          fix="leave --plain out, or take a model that writes text")  # fmt: skip
    return batch


def as_row(settings: StepSettings, strategy: Strategy, reading: Reading) -> dict[str, Any]:
    """A reading as one record: bytes by category and phase, FLOPs, bytes a token."""
    tokens = settings.length * settings.batch
    above = reading.peak_bytes - reading.resident_bytes
    return {
        "shape": settings.shape,
        "strategy": strategy.name,
        "length": settings.length,
        "batch": settings.batch,
        "quantize": settings.quantize,
        "checkpointing": settings.checkpointing,
        "offload": settings.offload,
        "savers": {k: v for k, v in vars(settings.savers).items() if v},
        "optimizer": settings.optimizer,
        "label_share": settings.label_share,
        "static_bytes": reading.static_bytes,
        "resident_bytes": reading.resident_bytes,
        "peak_bytes": reading.peak_bytes,
        "peak_phase": reading.peak.phase,
        "peak_by_category": {name: reading.peak.by_category[name] for name in CATEGORIES},
        "activation_bytes": reading.activation_bytes,
        "bytes_per_token_above_resident": above / tokens,
        "host_peak_bytes": reading.host_peak.total,
        "flops": sum(reading.flops.values()),
    }
