"""A base as a training holds it, without weights: of what is quantized, as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from qft import models
from qft.lean.standins import quantize_skeleton
from qft.quantization import Scratch, unquantized_modules

BY_BITSANDBYTES = ("int8", "nf4", "fp4")


def open_held_skeleton(
    folder: Path, spec: models.ModelSpec, keep: Sequence[str] = (), *, shared_room: bool = False
) -> nn.Module:
    """The model of a folder on the meta device, held as `qft.models.open_model` holds it.

    Args:
        keep: names of modules that stay unquantized.
        shared_room: the engine's layers dequantize into one room, as they do on a GPU.
    """
    model = models.open_skeleton(folder, spec)
    stored = models.read_config(folder).get("quantization_config")
    held = models.stored_kind(stored) if stored else spec.quantize
    if held not in BY_BITSANDBYTES:  # compressed-tensors' weights are unpacked on loading
        return model
    asked = replace(spec, quantize=held)
    kept: Collection[str] = models.unquantized_in(folder, asked, keep)
    if stored:
        kept = _stored_unquantized(model, stored)
    quantize_skeleton(model, held, tuple(kept), Scratch() if shared_room else None)
    return model


def _stored_unquantized(model: nn.Module, stored: dict[str, Any]) -> list[str]:
    """What a quantized folder says to have left alone, by transformers' rules for names."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = stored.get("llm_int8_skip_modules")
    own = unquantized_modules(model)
    if skipped is None:
        return own
    precise = list(getattr(model, "_keep_in_fp32_modules", None) or ())
    convert: Callable[..., bool] = should_convert_module
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return [name for name in names if not convert(name, [*skipped, *precise])]
