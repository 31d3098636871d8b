"""What a training step holds and computes, metered on fake tensors: no weights, no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from qft import models
from qft.bench.fake_model import DEVICE, fake_step
from qft.bench.shapes import TASKS, shape_config
from qft.errors import RecipeError, first_line
from qft.lean.engine import Savers
from qft.lean.meter import CATEGORIES, Reading, meter
from qft.lean.model_parts import is_encoder_decoder, writes_text
from qft.lean.standins import EightBitAdam, quantize_skeleton
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


def meter_step(settings: StepSettings, strategy: Strategy) -> Reading:
    """The second training step of a model of this shape: forward, backward, optimizer.

    Raises:
        RecipeError: there is no such shape, or the strategy does not fit it.
    """
    model, task = _skeleton(settings, strategy)
    model = prepare(
        model,
        strategy,
        checkpointing=settings.checkpointing,
        offload=settings.offload,
        savers=settings.savers,
        context=Context(task=task, total_steps=1000),
    )
    with fake_step(model):
        optimizer = _optimizer(model, settings.optimizer)
        batch = _batch(model, settings)

        def step() -> None:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return meter(step, model=model, optimizer=optimizer, device=DEVICE)


def _skeleton(settings: StepSettings, strategy: Strategy) -> tuple[nn.Module, str]:
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


def _optimizer(model: nn.Module, name: Optimizer) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    match name:
        case "adamw-8bit":
            return EightBitAdam(trained)
        case "sgd":
            return torch.optim.SGD(trained, momentum=0.9, foreach=False)
    return torch.optim.AdamW(trained, foreach=False)


def _batch(model: nn.Module, settings: StepSettings) -> dict[str, Any]:
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
