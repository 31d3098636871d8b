"""Shapes of 16-bit matrix products: a CPU's library makes a kernel for each one, and keeps it.

oneDNN does so for products of bfloat16 and float16, from a size on. How many shapes a training has
decides how much of a process is kernels (`qft.planning.resident`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ATEN = torch.ops.aten
_LINEAR = (_ATEN.mm, _ATEN.addmm, _ATEN.addmm_)
_BATCHED = (_ATEN.bmm, _ATEN.baddbmm, _ATEN.baddbmm_)
_SMALLEST = 16**3  # multiplications from which on torch asks oneDNN


@dataclass(frozen=True)
class Product:
    """Two matrices, or two stacks of them, and how they lie in memory.

    Attributes:
        operation: of torch.
        batched: stacks, as attention multiplies them; else a linear layer's.
        shapes: and strides, of both.
    """

    operation: str
    batched: bool
    shapes: tuple[tuple[int, ...], ...]


def product_of(func: Any, args: tuple[Any, ...]) -> Product | None:
    """What an operation multiplies; None where no kernel is kept for it."""
    packet = getattr(func, "_overloadpacket", None)
    if packet not in _LINEAR and packet not in _BATCHED:
        return None
    left, right = [value for value in args if isinstance(value, Tensor)][-2:]
    if left.dtype.itemsize != 2 or left.numel() * right.shape[-1] <= _SMALLEST:
        return None
    shapes = tuple((*x.shape, *x.stride()) for x in (left, right))
    return Product(str(packet), packet in _BATCHED, shapes)
