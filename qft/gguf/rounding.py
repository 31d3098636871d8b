"""`encode`: rows of numbers as the bytes of a ggml type."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qft.errors import ModelError
from qft.gguf.types import TYPES

_LARGEST_F16 = 65504.0


def encode(rows: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """Rounds rows to a type.

    Args:
        rows: ``[rows, width]``, floating; the width fills whole blocks of the type.
        kind: a key of :data:`qft.gguf.types.TYPES`.
        importance: ``[width]``, how much an error in each column weighs; None is all alike.

    Returns:
        uint8 ``[rows, row bytes]``, as they lie in a file.

    Raises:
        ModelError: a number is not finite, or too large for float16.
    """
    values = rows.float()
    if not torch.isfinite(values).all():
        raise ModelError("A weight is not a finite number.", found="NaN or infinity")
    return _ENCODERS[kind](values, importance).contiguous().view(torch.uint8).flatten(1)


def _f32(rows: Tensor, importance: Tensor | None) -> Tensor:
    return rows


def _f16(rows: Tensor, importance: Tensor | None) -> Tensor:
    if rows.numel() and rows.abs().max() > _LARGEST_F16:
        raise ModelError("A weight is too large for float16.",
                         fix="export to gguf:bf16 or gguf:f32")  # fmt: skip
    return rows.half()


def _bf16(rows: Tensor, importance: Tensor | None) -> Tensor:
    return rows.bfloat16()


def _q8_0(rows: Tensor, importance: Tensor | None) -> Tensor:
    """A float16 scale, then 32 signed bytes."""
    blocks = rows.unflatten(-1, (-1, TYPES["q8_0"].block))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    scaled = blocks * inverse
    codes = (scaled.abs() + 0.5).floor() * scaled.sign()  # halves away from zero, as ggml rounds
    return torch.cat([scales.half().view(torch.uint8), codes.to(torch.int8).view(torch.uint8)], -1)


_ENCODERS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "f32": _f32,
    "f16": _f16,
    "bf16": _bf16,
    "q8_0": _q8_0,
}
