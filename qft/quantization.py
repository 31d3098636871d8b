"""4- and 8-bit loading through bitsandbytes: what stays unquantized, and its traps guarded."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qft.errors import ModelError, RecipeError
from qft.lean.model_parts import head_names, output_embeddings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qft.lean.lora_linear import Frozen

KINDS = ("none", "int8", "nf4", "fp4")


def loading_config(kind: str, dtype: torch.dtype, keep: Collection[str]) -> Any | None:
    """The transformers quantization config for one of KINDS, or None for ``none``.

    Args:
        kind: ``none``, ``int8``, ``nf4`` or ``fp4``; 4 bits use double quantization (QLoRA, 2023).
        dtype: what the products are computed in.
        keep: names of modules that stay unquantized; see :func:`unquantized_modules`.
    """
    if kind == "none":
        return None
    from transformers import BitsAndBytesConfig

    require_bitsandbytes()
    skip = sorted(keep)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def require_bitsandbytes() -> None:
    """Raises a clear error where bitsandbytes is missing."""
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            "Quantized loading needs bitsandbytes, which is not installed.",
            where="quantize",
            fix="pip install bitsandbytes, or quantize: none",
        )


def require_library(kind: str, where: object) -> None:
    """Raises a clear error where the library that opens a stored quantization is missing.

    Args:
        kind: ``quant_method`` of a config.json.
    """
    import importlib.util

    extras = {"compressed-tensors": "compressed_tensors", "torchao": "torchao"}
    if kind in extras and importlib.util.find_spec(extras[kind]) is None:
        raise ModelError(
            f"The model is stored in the format {kind}, whose library is missing.",
            where=where,
            fix=f"pip install 'qft-toolkit[{kind}]'",
        )


def decompress_(model: Any) -> None:
    """Puts full weights into a model that compressed-tensors has opened.

    The library does it within the first forward; until then the layers have no ``weight``, which
    whoever looks at a model misses.
    """
    model.hf_quantizer.compressor.decompress_model(model)


def unquantized_modules(skeleton: nn.Module, also: Collection[str] = ()) -> list[str]:
    """Names of the linear modules that keep full precision: heads, output embeddings, ``also``.

    A head is whatever hangs beside the base model (``classifier``, ``score``, ``lm_head``): it is
    new or decides every logit, and rounding it costs the most for the fewest bytes.
    """
    output = output_embeddings(skeleton)
    kept = set(head_names(skeleton))
    # and what the family wants in float32 (T5's ``wo``), which transformers leaves as it is
    precise = set(getattr(skeleton, "_keep_in_fp32_modules", None) or ())
    kept |= {
        name
        for name, module in skeleton.named_modules()
        if module is output or name.rpartition(".")[2] in precise
    }
    return sorted(kept | set(also))


def require_something_left(skeleton: nn.Module, kept: Sequence[str]) -> None:
    """Refuses a quantization that would touch no weight, because the strategy trains them all.

    Raises:
        RecipeError: every linear layer is to stay in full precision.
    """
    from torch import nn

    inside = tuple(f"{name}." for name in kept)
    if not any(
        isinstance(module, nn.Linear) and name not in kept and not name.startswith(inside)
        for name, module in skeleton.named_modules()
    ):
        raise RecipeError(
            "Nothing is left to quantize: the strategy trains every weight.",
            where="quantize",
            fix="quantize: none, or a strategy that adds to frozen weights, such as lora",
        )


def guard_cpu_kernels(model: nn.Module) -> int:
    """Keeps bitsandbytes' CPU kernels from harm; returns how many layers were guarded.

    On a CPU with AVX512-BF16 a forward in ``eval()`` repacks 4-bit weights, and the next training
    forward runs a kernel without autograd: the loss looks right, LoRA gradients are mostly wrong,
    and a save can write a corrupt checkpoint (bitsandbytes 0.50.2). With the flag off neither
    happens. Layers of some widths compute with the wrong scales: see
    :func:`qft.four_bit.guard_forward`.
    """
    guarded = 0
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            from qft.four_bit import guard_forward

            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            guard_forward(module)
            guarded += 1
    return guarded


def leave_files(model: nn.Module) -> None:
    """Lets go of the files that a model was quantized from on a CPU, and of what that left free.

    A tensor that nothing converted lies in the files' own pages. While one does, all pages that
    were read stay resident, those of every quantized layer too: 600 of 950 MB in one case.
    """
    import torch

    from qft.lean.trunk import give_back

    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in (torch.Tensor, torch.nn.Parameter):  # not bitsandbytes' own
            tensor.data = tensor.data.clone()
    give_back()


def dequantized(module: nn.Module) -> Tensor:
    """The full weight of a linear module, shape ``[out, in]``, whatever holds it."""
    weight: Any = module.weight
    kind = type(weight).__name__
    full: Tensor = weight.data
    if kind == "Params4bit":
        from qft.four_bit import unpack

        full = unpack(weight.data, weight.quant_state)
    if kind == "Int8Params":
        state: Any = getattr(module, "state", None)
        scale = weight.SCB if weight.SCB is not None else state.SCB
        full = weight.data.float() * (scale.float() / 127.0)[:, None]
    return full


class Scratch:
    """One buffer that weights are dequantized into, over and over; it is never kept by a graph.

    A fresh one each time would leave holes between the activations that are kept.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor to write into; what was taken before is overwritten."""
        import torch

        size = math.prod(shape) * dtype.itemsize
        if self._buffer is None or self._buffer.numel() < size or self._buffer.device != device:
            self._buffer = None
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        return self._buffer[:size].view(dtype).view(*shape)


@dataclass(frozen=True)
class FourBit:
    """A bitsandbytes 4-bit layer; see `qft.lean.lora_linear.Frozen`."""

    layer: Any
    scratch: Scratch

    def product(self, x: Tensor) -> Tensor:
        """As bitsandbytes computes it."""
        from torch.nn import functional

        bias = self.layer.bias
        import torch

        exact = x.dtype in (torch.float32, torch.bfloat16)
        inner = x if exact else x.to(self.layer.compute_dtype or x.dtype)
        bias = None if bias is None else bias.to(inner.dtype)
        result: Tensor = functional.linear(inner, self._weight(inner.dtype), bias).to(x.dtype)
        return result

    def transposed(self, gradient: Tensor) -> Tensor:
        """As bitsandbytes computes it."""
        return gradient @ self._weight(gradient.dtype)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        from qft.four_bit import unpack

        weight = self.layer.weight
        state = weight.quant_state or self.layer.quant_state
        # bitsandbytes' CPU kernel makes its own result
        cuda = weight.device.type == "cuda"
        buffer = self.scratch.take(state.shape, state.dtype, weight.device) if cuda else None
        return unpack(weight.data, state, out=buffer).to(dtype)


@dataclass(frozen=True)
class EightBit:
    """A bitsandbytes int8 layer; see `qft.lean.lora_linear.Frozen`."""

    layer: Any

    def product(self, x: Tensor) -> Tensor:
        """As bitsandbytes computes it: the inputs are rounded too."""
        result: Tensor = self.layer.forward(x)
        return result

    def transposed(self, gradient: Tensor) -> Tensor:
        """As bitsandbytes computes it, from the weight alone."""
        state = self.layer.state
        weight = state.CB.to(gradient.dtype, copy=True).mul_(state.SCB[:, None] / 127.0)
        product: Tensor = gradient @ weight
        return product


def frozen_maker() -> Callable[[nn.Module], Frozen | None]:
    """How the lean engine computes with a frozen linear layer, whatever holds its weight.

    The function it returns gives None for a layer it does not know.
    """
    from torch import nn

    from qft.lean.lora_linear import Dense

    scratch = Scratch()

    def make(layer: nn.Module) -> Frozen | None:

        match type(layer).__name__:
            case "Linear4bit":
                return FourBit(layer, scratch)
            case "Linear8bitLt":
                return EightBit(layer)
            case "QuantizedLinear":  # the meter's stand-in answers for itself
                return layer  # type: ignore[return-value]
        return Dense(layer) if type(layer) is nn.Linear else None

    return make
