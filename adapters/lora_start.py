"""How a LoRA's matrices begin: at random, or from the weight, the data, the rounding error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapters.eva_start import require_tokens, start_eva
from adapters.peft_backed import stored_tensors
from qft.errors import AdapterError, RecipeError
from qft.strategy import Context

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qft.shards import StoredTensor

Start = Literal["default", "gaussian", "pissa", "olora", "orthogonal", "eva", "loftq"]
CALIBRATION_BATCHES = 8
CHANGES_BASE = ("pissa", "olora")  # what the first update says is taken out of the weight
_NEEDS_WEIGHT = (*CHANGES_BASE, "orthogonal")
_FIRST = "_qft_first_update"  # on each layer: what its matrices began with
# LoftQ's first update makes up for a quantization; upon the original weights it is too much
FIRST_FILE = "first_update.safetensors"
FIRST_MARK = {"loftq_bits": 4, "loftq_iter": 1}  # PEFT's loftq_config: the file must be there


def peft_start(start: Start, model: nn.Module, quantized: bool | None) -> bool | str:
    """PEFT's ``init_lora_weights``; on a meta skeleton nothing is computed.

    Args:
        quantized: what the run says of the base, which a skeleton cannot tell.

    Raises:
        RecipeError: the base is quantized and the start needs its weights, or the other way round.
    """
    meta = next(model.parameters()).is_meta
    if not meta:
        quantized = any(_is_quantized(module) for module in model.modules())
    if start in _NEEDS_WEIGHT and quantized:
        raise RecipeError(
            f"The start {start!r} needs weights that are not quantized.",
            where="strategy.initialisation",
            fix="initialisation: loftq or eva, or quantize: none",
        )
    if start == "loftq" and quantized is False:
        raise RecipeError(
            "LoftQ starts from the error of a quantization, and the base is not quantized.",
            where="strategy.initialisation",
            fix="quantize: nf4, or initialisation: pissa",
        )
    return True if meta else {"default": True, "loftq": True}.get(start, start)


def finish_start(start: Start, model: nn.Module, context: Context) -> None:
    """What follows once PEFT's layers are there.

    Raises:
        RecipeError: the start needs data or weights that are not given.
    """
    if start == "eva":
        _start_eva(model, context)
    if next(model.parameters()).is_meta:
        return
    if start in CHANGES_BASE:
        for _, layer in lora_layers(model):
            _remember_first(layer)
    elif start == "loftq":
        _start_loftq(model, context)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's LoRA layers by the name their module has in the base."""
    for name, module in model.named_modules():
        if "default" in getattr(module, "lora_A", {}):
            yield name.removeprefix("base_model.model."), module


def _remember_first(layer: Any) -> None:
    first = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    layer.__dict__[_FIRST] = tuple(tensor.detach().clone() for tensor in first)


def first_update(model: nn.Module) -> dict[str, Tensor]:
    """What LoftQ began with, under PEFT's names; empty for every other start."""
    first = {}
    for name, layer in lora_layers(model):
        for side, tensor in zip("AB", layer.__dict__.get(_FIRST, ()), strict=False):
            first[f"base_model.model.{name}.lora_{side}.weight"] = tensor.cpu().contiguous()
    return first


def read_first(folder: Path, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The first update saved in an adapter folder; empty where none belongs to it.

    Args:
        values: the folder's adapter_config.json.

    Raises:
        AdapterError: the config says that there is one, and it is gone or broken.
    """
    return {name: tensor.read() for name, tensor in open_first(folder, values).items()}


def open_first(folder: Path, values: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The same, read only when it is asked for."""
    if (folder / FIRST_FILE).is_file():
        return stored_tensors(folder, FIRST_FILE)
    if values.get("loftq_config"):
        raise AdapterError(
            "The adapter began with LoftQ, and what it began with is missing.",
            where=folder,
            found=f"no {FIRST_FILE}",
            fix="copy the whole folder that the training has saved",
        )
    return {}


def begin_where_saved(model: nn.Module, first: Mapping[str, Tensor]) -> None:
    """Makes a base that is not quantized what a LoftQ adapter adds to: ``W - s B0 A0``."""
    import torch

    for name, layer in lora_layers(model):
        a, b = (f"base_model.model.{name}.lora_{side}.weight" for side in "AB")
        if a not in first or b not in first:
            continue
        base = layer.get_base_layer()
        done = _FIRST in layer.__dict__
        layer.__dict__[_FIRST] = down, up = tuple(
            first[n].to(layer.lora_A["default"].weight) for n in (a, b)
        )
        if not done and not _is_quantized(base):
            with torch.no_grad():
                weight = base.weight
                weight.copy_(weight.float() - layer.scaling["default"] * up.float() @ down.float())


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
    layers = dict(lora_layers(model))
    meta = next(model.parameters()).is_meta
    if not context.calibration:
        if meta:
            return
        raise RecipeError(
            "EVA starts from the data, and none is given.",
            where="strategy.initialisation",
            fix="train from a recipe, or pass Context(calibration=…) to prepare",
        )
    require_tokens(context.calibration, next(iter(layers.values())).r["default"])
    if not meta:
        named = {f"base_model.model.{name}": layer for name, layer in layers.items()}
        start_eva(model, named, context.calibration)


def _start_loftq(model: nn.Module, context: Context) -> None:
    """The best low-rank answer to what quantization lost (Li et al. 2023, one iteration)."""
    import torch
    from peft.utils.integrations import dequantize_module_weight

    if context.original_weight is None:
        raise RecipeError("LoftQ needs the original weights.",
                          where="strategy.initialisation",
                          fix="train from a recipe that names the original model")  # fmt: skip
    for name, layer in lora_layers(model):
        if not _is_quantized(layer.get_base_layer()):
            continue  # nothing is lost there; two empty matrices would never learn
        held = dequantize_module_weight(layer.get_base_layer()).float()
        original = context.original_weight(f"{name}.weight").to(held)
        lost = original - held
        up, size, down = torch.linalg.svd(lost, full_matrices=False)
        rank = layer.r["default"]
        root = (size[:rank] / layer.scaling["default"]).sqrt()
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(root[:, None] * down[:rank])
            layer.lora_B["default"].weight.copy_(up[:, :rank] * root)
            lengths = getattr(layer, "lora_magnitude_vector", None) or {}
            if "default" in lengths:  # DoRA's
                lengths["default"].weight.copy_(original.norm(dim=1))
        _remember_first(layer)


def _is_quantized(module: nn.Module) -> bool:
    return type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params")
