"""How a LoRA's matrices begin: at random, or from the weight, the data, the rounding error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from qft.errors import RecipeError
from qft.strategy import Context

if TYPE_CHECKING:
    from torch import Tensor, nn

Start = Literal["default", "gaussian", "pissa", "olora", "orthogonal", "eva", "loftq"]
CALIBRATION_BATCHES = 8
CHANGES_BASE = ("pissa", "olora")  # what the first update says is taken out of the weight
_NEEDS_WEIGHT = (*CHANGES_BASE, "orthogonal")
_FIRST = "_qft_first_update"  # on each layer: what its matrices began with


def peft_start(start: Start, model: nn.Module) -> bool | str:
    """PEFT's ``init_lora_weights``; on a meta skeleton nothing is computed.

    Raises:
        RecipeError: the base is quantized and the start needs its weights.
    """
    if next(model.parameters()).is_meta:
        return True
    quantized = any(_is_quantized(module) for module in model.modules())
    if start in _NEEDS_WEIGHT and quantized:
        raise RecipeError(
            f"The start {start!r} needs weights that are not quantized.",
            where="strategy.initialisation",
            fix="initialisation: loftq or eva, or quantize: none",
        )
    if start == "loftq" and not quantized:
        raise RecipeError(
            "LoftQ starts from the error of a quantization, and the base is not quantized.",
            where="strategy.initialisation",
            fix="quantize: nf4, or initialisation: pissa",
        )
    return {"default": True, "loftq": True}.get(start, start)


def finish_start(start: Start, model: nn.Module, context: Context) -> None:
    """What follows once PEFT's layers are there.

    Raises:
        RecipeError: the start needs data or weights that are not given.
    """
    if next(model.parameters()).is_meta:
        return
    if start in CHANGES_BASE:
        for _, layer in lora_layers(model):
            first = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            layer.__dict__[_FIRST] = tuple(tensor.detach().clone() for tensor in first)
    elif start == "eva":
        _start_eva(model, context)
    elif start == "loftq":
        _start_loftq(model, context)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's LoRA layers by the name their module has in the base."""
    for name, module in model.named_modules():
        if "default" in getattr(module, "lora_A", {}):
            yield name.removeprefix("base_model.model."), module


def against_original(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The update against the original base, where the start took its first value out of it.

    ``W - s B0 A0 + s B A`` is ``W + s [B, -B0] [A; A0]``: twice the rank, exactly the same.
    """
    import torch

    changed = dict(tensors)
    for name, layer in lora_layers(model):
        down, up = layer.__dict__[_FIRST]
        a, b = (f"base_model.model.{name}.lora_{side}.weight" for side in "AB")
        changed[a] = torch.cat([tensors[a], down.to(tensors[a])], dim=0).contiguous()
        changed[b] = torch.cat([tensors[b], -up.to(tensors[b])], dim=1).contiguous()
    return changed


def trained_half(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Undoes `against_original`, for a training that goes on."""
    halved = dict(tensors)
    for name, _ in lora_layers(model):
        a, b = (f"base_model.model.{name}.lora_{side}.weight" for side in "AB")
        rank = tensors[a].shape[0] // 2
        halved[a], halved[b] = tensors[a][:rank].contiguous(), tensors[b][:, :rank].contiguous()
    return halved


def _start_eva(model: nn.Module, context: Context) -> None:
    """The directions in which each layer's inputs vary most (Paischer et al. 2024)."""
    from peft import initialize_lora_eva_weights

    if not context.calibration:
        raise RecipeError(
            "EVA starts from the data, and none is given.",
            where="strategy.initialisation",
            fix="train from a recipe, or pass Context(calibration=…) to prepare",
        )
    device = next(model.parameters()).device
    batches = [{k: v.to(device) for k, v in batch.items()} for batch in context.calibration]
    training = model.training
    model.eval()
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    model.train(training)


def _start_loftq(model: nn.Module, context: Context) -> None:
    """The best low-rank answer to what quantization lost (Li et al. 2023, one iteration)."""
    import torch
    from peft.utils.integrations import dequantize_module_weight

    if context.original_weight is None:
        raise RecipeError("LoftQ needs the original weights.",
                          where="strategy.initialisation",
                          fix="train from a recipe that names the original model")  # fmt: skip
    for name, layer in lora_layers(model):
        held = dequantize_module_weight(layer.get_base_layer()).float()
        lost = context.original_weight(f"{name}.weight").to(held) - held
        up, size, down = torch.linalg.svd(lost, full_matrices=False)
        rank = layer.r["default"]
        root = (size[:rank] / layer.scaling["default"]).sqrt()
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(root[:, None] * down[:rank])
            layer.lora_B["default"].weight.copy_(up[:, :rank] * root)


def _is_quantized(module: nn.Module) -> bool:
    return type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params")
