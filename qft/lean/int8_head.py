"""A frozen output layer in 8 bits: half the bytes of the largest matrix, dequantized by blocks.

Each row has its own scale, so a row's largest entry is exact and all others are off by at most half
a 127th of it. Logits change by that rounding; gradients are those of the rounded layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

BLOCK_BYTES = 2**25  # of the weight, dequantized at once


class Int8Head(nn.Module):
    """Takes the place of a linear output layer.

    Args:
        plain: the layer; its weight is read and not kept.
    """

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        weight = plain.weight.detach()
        self.dtype = weight.dtype
        largest = weight.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12)
        numbers = torch.empty_like(weight, dtype=torch.int8)
        for rows in self._blocks():
            numbers[rows] = (weight[rows].float() / largest[rows] * 127).round().to(torch.int8)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.scale = nn.Buffer(largest / 127)
        self.bias = plain.bias

    def _blocks(self) -> Iterator[slice]:
        size = max(1, BLOCK_BYTES // (self.in_features * self.dtype.itemsize))
        return (slice(at, at + size) for at in range(0, self.out_features, size))

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The weight's rows, some at a time, each block with the number of its first row."""
        for rows in self._blocks():
            yield rows.start, (self.weight[rows] * self.scale[rows]).to(self.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[…, width]`` to logits, ``[…, vocabulary]``."""
        parts = [functional.linear(hidden, block.to(hidden.dtype)) for _, block in self.blocks()]
        logits = torch.cat(parts, dim=-1)
        return logits if self.bias is None else logits + self.bias
