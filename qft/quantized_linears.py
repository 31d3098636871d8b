"""bitsandbytes' linear layers in a model on the meta device, filled one at a time.

Layers are bitsandbytes' own, put in by transformers, and quantized or opened as transformers does
on loading; only the whole model is never there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Protocol

from qft import quantization

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class _Tensors(Protocol):
    def read(self, name: str) -> Tensor:
        """One tensor."""


def put_in(
    skeleton: nn.Module, kind: str, dtype: torch.dtype, keep: Collection[str], *, stored: bool
) -> None:
    """Replaces linear layers of a model on the meta device.

    Args:
        kind: ``int8``, ``nf4`` or ``fp4``.
        dtype: of the arithmetic.
        keep: names of modules that stay as they are.
        stored: whether the files hold the weights quantized.
    """
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    config: Any = quantization.loading_config(kind, dtype, keep)
    model: Any = replace_with_bnb_linear(
        skeleton, modules_to_not_convert=list(keep), quantization_config=config,
        pre_quantized=stored,
    )  # fmt: skip
    for module in model.modules():
        bias: Any = getattr(module, "bias", None)
        if hasattr(module, "source_cls") and bias is not None:
            bias.data = bias.data.to(dtype)
    model.is_loaded_in_8bit = kind == "int8"  # what PEFT chooses its layers by
    model.is_loaded_in_4bit = kind != "int8"
    quantization.guard_cpu_kernels(model)


def stored_linears(skeleton: nn.Module, names: Collection[str]) -> set[str]:
    """Names of the linear layers that a folder holds quantized."""
    return {
        name
        for name, _ in skeleton.named_modules()
        if f"{name}.weight.absmax" in names or f"{name}.SCB" in names
    }


def load(
    module: Any, parameter: Any, name: str, tensors: _Tensors, stored: Collection[str], device: str
) -> Any | None:
    """A bitsandbytes parameter with its value; None where ``parameter`` is an ordinary one.

    Args:
        name: of the parameter, in ``tensors``.
        stored: all names there are.
    """
    kind = type(parameter).__name__
    if kind == "Params4bit":
        return _load_four_bit(module, parameter, name, tensors, stored, device)
    return _load_int8(module, name, tensors, stored, device) if kind == "Int8Params" else None


def _load_four_bit(
    module: Any, parameter: Any, name: str, tensors: _Tensors, stored: Collection[str], device: str
) -> Any:
    from bitsandbytes.nn import Params4bit

    value = tensors.read(name)
    if f"{name}.absmax" in stored:
        state = {key: tensors.read(key) for key in stored if key.startswith(f"{name}.")}
        return Params4bit.from_prequantized(
            value, {key.removeprefix(f"{name}."): part for key, part in state.items()},
            device=device, module=module,
        )  # fmt: skip
    settings = {
        key: getattr(parameter, key)
        for key in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    }
    return Params4bit(
        value.to(module.compute_dtype), requires_grad=False, module=module, **settings
    ).to(device)


def _load_int8(
    module: Any, name: str, tensors: _Tensors, stored: Collection[str], device: str
) -> Any:
    from bitsandbytes.nn import Int8Params

    value = tensors.read(name)
    scales = f"{name.removesuffix('.weight')}.SCB"
    if scales in stored:
        return Int8Params(value, requires_grad=False, has_fp16_weights=False,
                          SCB=tensors.read(scales)).to(device)  # fmt: skip
    return Int8Params(value, requires_grad=False, has_fp16_weights=False).to(device)


def release(module: Any) -> None:
    """Lets go of what a bitsandbytes layer keeps beside its parameters."""
    if type(module).__name__ == "Linear4bit":
        module.quant_state = None
    elif type(module).__name__ == "Linear8bitLt":
        module.state.CB = module.state.SCB = None
