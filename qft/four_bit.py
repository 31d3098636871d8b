"""bitsandbytes' 4-bit weights, read and computed with rightly on every CPU.

bitsandbytes 0.50.2 on a CPU with AVX512 takes the wrong scales from the second row on where a
layer's rows are a multiple of 16 weights and not of a whole group (64): 96, 208, 1200. What is
stored is right, and one long row of the same bytes is read rightly; so here every weight is read as
one. Layers whose own ``forward`` would go wrong get another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from qft.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

BLOCK = 64  # weights a scale, unless a layer says otherwise


def unpack_rows(
    packed: Tensor,
    scales: Tensor,
    kind: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    block: int = BLOCK,
) -> Tensor:
    """What 4-bit rows stand for.

    Args:
        packed: uint8, or what else bitsandbytes stores bytes as.
        scales: float32, of their groups.
        kind: ``nf4`` or ``fp4``.
        shape: of the rows.
        dtype: of the result.
    """
    import bitsandbytes.functional  # noqa: F401  registers the operation

    operation: Any = torch.ops.bitsandbytes.dequantize_4bit.default
    count = math.prod(shape)
    full: Tensor = operation(packed.reshape(-1, 1), scales, block, kind, (count,), dtype)
    return full.view(*shape)


def unpack(
    packed: Tensor, state: Any, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """The full weight, ``[out, in]``, of bitsandbytes' bytes and their ``QuantState``.

    Args:
        packed: as it lies in the parameter.
        state: the parameter's.
        dtype: of the result; None is what was quantized.
        out: where to write on a GPU, in the type that was quantized; a CPU makes its own result.

    Raises:
        ModelError: a forward in ``eval()`` has repacked the weight, and lost bits of its scales.
    """
    import bitsandbytes.functional as bitsandbytes

    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError(
            "bitsandbytes has repacked this model's 4-bit weights for inference, which loses bits "
            "of their scales.",
            found="a forward in eval() on a CPU with AVX512-BF16",
            fix="load the model again; qft.prepare it before its first forward",
        )
    if packed.device.type != "cpu":
        full: Tensor = bitsandbytes.dequantize_4bit(packed.view(-1, 1), state, out=out)
        return full if dtype is None else full.to(dtype)
    scales = state.absmax
    if state.nested:
        scales = bitsandbytes.dequantize_blockwise(scales, state.state2) + state.offset
    return unpack_rows(
        packed, scales.float(), state.quant_type, state.shape, dtype or state.dtype, state.blocksize
    )


def guard_forward(layer: nn.Module) -> None:
    """Gives a ``Linear4bit`` a forward of its own where bitsandbytes' may go wrong.

    It is for CPUs; on another device, and where the width does no harm, it is bitsandbytes'. A
    layer on the meta device gets it too: what will be put in is not known. PEFT reads the weight of
    such a layer, for DoRA's norms, by bitsandbytes' function as well, unless the layer has
    ``W_q``: then it asks its ``dequantize``.
    """
    known: Any = layer
    held = known.weight
    cut = known.in_features % getattr(held, "blocksize", BLOCK) != 0
    if not held.is_meta and not (held.device.type == "cpu" and cut):
        return
    hooked = hasattr(layer, "_hf_hook")  # accelerate keeps the forward that it wraps elsewhere
    own = layer.__dict__
    own["_old_forward" if hooked else "forward"] = partial(_forward, layer)
    own["W_q"] = _WeightDevice(layer)
    own["dequantize"] = partial(_dequantize, layer)


@dataclass(frozen=True)
class _WeightDevice:
    """What PEFT asks of a layer's ``W_q``: where the adapter belongs."""

    layer: Any

    @property
    def device(self) -> torch.device:
        device: torch.device = self.layer.weight.device
        return device


def _dequantize(layer: Any) -> Tensor:
    return unpack(layer.weight.data, _state_of(layer))


def _state_of(layer: Any) -> Any:
    """FSDP and others lose the parameter's own."""
    return getattr(layer.weight, "quant_state", None) or layer.quant_state


def _forward(layer: Any, x: Tensor) -> Tensor:
    """``[…, in]`` to ``[…, out]``: ``Linear4bit.forward``, step by step, with the right weight."""
    state = _state_of(layer)
    harmless = state is None or state.shape[-1] % state.blocksize == 0
    if x.device.type != "cpu" or harmless or len(state.shape) != 2:
        result: Tensor = type(layer).forward(layer, x)
        return result
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    inner = x if layer.compute_dtype is None else x.to(layer.compute_dtype)
    bias = layer.bias
    if bias is not None and bias.dtype != inner.dtype:
        bias.data = bias.data.to(inner.dtype)
    product: Tensor = _Product.apply(inner, bias, layer.weight.data, state)  # type: ignore[no-untyped-call]
    return product.to(x.dtype)


class _Product(torch.autograd.Function):
    """``W x + bias``; W is read again in the backward pass, as bitsandbytes does it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, bias: Tensor | None, packed: Tensor, state: Any
    ) -> Tensor:
        ctx.packed, ctx.state = packed, state
        return functional.linear(x, unpack(packed, state, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ unpack(ctx.packed, ctx.state).to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return to_x, to_bias, None, None
