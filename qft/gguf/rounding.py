"""`encode`: rows of numbers as the bytes of a ggml type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qft.errors import ModelError
from qft.gguf import plain_blocks, super_layouts
from qft.gguf.types import TYPES

_LARGEST_F16 = 65504.0
_CHUNK = 2**16  # numbers: a chunk and what the search needs beside it fit a core's cache
_LEAST_WEIGHT = 1e-9  # of the largest in a block


def encode(rows: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """Rounds rows to a type.

    Args:
        rows: ``[rows, width]``, floating; the width fills whole blocks of the type.
        kind: a key of :data:`qft.gguf.types.TYPES`.
        importance: ``[width]``, how much a squared error in each column weighs; None is all alike.
            Columns of importance 0 are still rounded sensibly, as far as it costs the others
            nothing. Types without blocks do not look at it.

    Returns:
        uint8 ``[rows, row bytes]``, as they lie in a file.

    Raises:
        ModelError: a number is not finite, or too large for the type's float16 scales; the
            importance is not one finite number of at least 0 a column.
    """
    if kind in _PLAIN:
        values = rows.float()
        _check(values, kind)
        return _PLAIN[kind](values).contiguous().view(torch.uint8).flatten(1)
    block, width = TYPES[kind].block, rows.shape[-1]
    weights = None if importance is None else _weights(importance, width, block)
    encoded = torch.empty(rows.shape[0], TYPES[kind].row_bytes(width), dtype=torch.uint8)
    for part in _chunks(*rows.shape):
        values = rows[part].float()
        _check(values, kind)
        beside = None if weights is None else weights.expand(len(values), -1, -1).flatten(0, 1)
        found = _SEARCHED[kind](values.reshape(-1, block), beside)
        encoded[part] = found.t().reshape(len(values), -1)
    return encoded


def _chunks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _check(values: Tensor, kind: str) -> None:
    if not values.numel():
        return
    largest = max(abs(float(end)) for end in torch.aminmax(values))
    if not math.isfinite(largest):
        raise ModelError("A weight is not a finite number.", found="NaN or infinity")
    if largest > _LARGEST_F16 * _REACH.get(kind, math.inf):
        held = "float16" if kind == "f16" else f"the float16 scales of {kind}"
        raise ModelError(f"A weight is too large for {held}.", found=f"{largest:.3g}",
                         fix="export to gguf:bf16 or gguf:f32")  # fmt: skip


def _weights(importance: Tensor, width: int, block: int) -> Tensor | None:
    """``[1, blocks, block]``, positive, the largest of each block 1: only ratios count.

    None where all columns are alike.
    """
    values = importance.float()
    if values.shape != (width,) or not torch.isfinite(values).all() or (values < 0).any():
        raise ModelError(
            "An importance must be one finite number of at least 0 a column.",
            found=f"{list(values.shape)} for {width} columns, least {float(values.min()):.3g}",
        )
    if float(values.min()) == float(values.max()):
        return None
    blocks = values.reshape(1, -1, block)
    largest = blocks.amax(-1, keepdim=True)
    return torch.where(largest > 0, blocks / largest, 1.0).clamp_min(_LEAST_WEIGHT)


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "f32": lambda rows: rows,
    "f16": Tensor.half,
    "bf16": Tensor.bfloat16,
}
_SEARCHED: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "q4_0": plain_blocks.encode_q4_0,
    "q4_1": plain_blocks.encode_q4_1,
    "q5_0": plain_blocks.encode_q5_0,
    "q5_1": plain_blocks.encode_q5_1,
    "q8_0": plain_blocks.encode_q8_0,
    "iq4_nl": plain_blocks.encode_iq4_nl,
    "q2_k": super_layouts.encode_q2_k,
    "q3_k": super_layouts.encode_q3_k,
    "q4_k": super_layouts.encode_q4_k,
    "q5_k": super_layouts.encode_q5_k,
    "q6_k": super_layouts.encode_q6_k,
}
# How many times float16's largest number a weight may be: the largest whole number it multiplies.
_REACH = {"f16": 1, "q4_0": 8, "q4_1": 1, "q5_0": 16, "q5_1": 1, "q8_0": 127, "iq4_nl": 113,
          "q2_k": 15, "q3_k": 96, "q4_k": 63, "q5_k": 63, "q6_k": 31 * 127}  # fmt: skip
