"""bitsandbytes' rounding of one linear layer, a block of its rows at a time and bit for bit.

4 bits: every 64 weights, counted along the rows, share a scale. The scales, less their mean, are
rounded too, 256 of them by one scale of their own (double quantization, QLoRA,
https://arxiv.org/abs/2305.14314), so that all scales of a layer must be known before its first
weight is what it will be: they are collected first, 4 bytes for 64 weights. int8: each row has its
own scale (LLM.int8, https://arxiv.org/abs/2208.07339).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qft.errors import ModelError
from qft.four_bit import BLOCK
from qft.shards import BLOCK_NUMBERS, row_blocks

if TYPE_CHECKING:
    from torch import nn

NESTED_BLOCK = 256  # scales a second scale
_NUMBERS = BLOCK_NUMBERS // 4  # weights at a time: rounding holds several copies of them
_LEAST = 1e-38  # what bitsandbytes takes for the scale of a last, incomplete group of zeros


def quantized_linears(skeleton: nn.Module, keep: Sequence[str]) -> dict[str, bool]:
    """Names of the layers transformers would quantize → whether their weight lies transposed.

    Args:
        skeleton: the model on the meta device.
        keep: names of modules that stay unquantized.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*keep, *(getattr(skeleton, "_keep_in_fp32_modules", None) or [])]
    return {
        name: isinstance(module, Conv1D)
        for name, module in skeleton.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and should_convert_module(name, kept)
    }


def rows_together(width: int, block: int = BLOCK) -> int:
    """The fewest rows of so many columns that hold whole groups of ``block`` weights."""
    return block // math.gcd(width, block)


def blocks_of_groups(shape: Sequence[int], together: int) -> Iterator[range]:
    """Cuts a matrix into blocks of rows that begin, and but for the last end, with a group."""
    first = next(iter(row_blocks(shape, _NUMBERS)), slice(0, 0))
    step = max(1, (first.stop - first.start) // together) * together
    for start in range(0, shape[0], step):
        yield range(start, min(start + step, shape[0]))


def scales_of(rows: Tensor, block: int = BLOCK) -> Tensor:
    """The float32 scale of each group: what bitsandbytes finds when it quantizes these rows."""
    flat = rows.reshape(-1)
    whole = flat.numel() - flat.numel() % block
    scales = flat[:whole].view(-1, block).abs().amax(1).float()
    if whole == flat.numel():
        return scales
    rest = flat[whole:].abs().amax().float().clamp(min=_LEAST)
    return torch.cat([scales, rest[None]])


def empty_scales(size: tuple[int, int]) -> Tensor:
    """Room for the scales of a layer: many small tensors would leave holes in the memory."""
    return torch.empty(-(-size[0] * size[1] // BLOCK))


@dataclass(frozen=True)
class Scales:
    """All scales of one 4-bit layer, rounded as they are stored.

    Attributes:
        codes: uint8, one a group.
        nested: float32, one for 256 groups.
        nested_map: float32 [256], what a code means.
        offset: float32, the mean that was taken off.
        values: float32, the scales that dequantizing uses.
    """

    codes: Tensor
    nested: Tensor
    nested_map: Tensor
    offset: Tensor
    values: Tensor


def round_scales(scales: Tensor) -> Scales:
    """Double quantization of a layer's scales, in the order of their groups."""
    import bitsandbytes.functional as functional

    offset = scales.mean()
    codes, state = functional.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
    values: Tensor = functional.dequantize_blockwise(codes, state)
    values += offset
    return Scales(codes, state.absmax, state.code, offset, values)


def pack_rows(rows: Tensor, kind: str) -> Tensor:
    """Rows in 4 bits, two weights a byte: ``[bytes, 1]``."""
    import bitsandbytes.functional as functional

    packed: Tensor
    packed, _ = functional.quantize_4bit(rows.contiguous(), blocksize=BLOCK, quant_type=kind)
    return packed


def groups(part: range, width: int, block: int = BLOCK) -> slice:
    """Which of a layer's scales belong to rows that begin with a whole group."""
    return slice(part.start * width // block, -(-part.stop * width // block))


def round_int8(rows: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits and their float32 scales; they pass float16, as transformers does it.

    Raises:
        ModelError: a weight is too large for float16.
    """
    import bitsandbytes.functional as functional

    half = rows.to(torch.float16)
    if not torch.isfinite(half).all():
        raise ModelError("A weight is too large for int8 quantization, which passes float16.",
                         where=name, fix="export to bnb:nf4 or safetensors:bf16")  # fmt: skip
    values, scales, _ = functional.int8_vectorwise_quant(half)
    return values, scales


def unround_int8(values: Tensor, scales: Tensor) -> Tensor:
    """What 8-bit rows stand for, in float32."""
    import bitsandbytes.functional as functional

    full: Tensor = functional.int8_vectorwise_dequant(values, scales)
    return full
