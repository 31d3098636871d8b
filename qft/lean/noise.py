"""Noise on the input embeddings while training (NEFTune), a function of sample and step.

Source: Jain et al. 2023, https://arxiv.org/abs/2310.05914.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qft.lean.dropout import DropoutClock, segment_seeds


def install_noise(embeddings: nn.Module, clock: DropoutClock, alpha: float) -> RemovableHandle:
    """Adds uniform noise of size ``alpha / sqrt(tokens · width)`` to what the module returns.

    Only while training with a clock that knows the samples: neither the split into micro-batches
    nor packing nor padding changes it.
    """

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        moment = clock.moment
        if not module.training or moment is None or output.dim() != 3:
            return output
        noise = torch.zeros_like(output)
        if output.is_meta:  # which no generator fills
            return output + noise
        generator = torch.Generator(device=output.device)
        for row, segments in zip(noise, moment.segments_of(output), strict=True):
            start = 0
            for sample, length in segments:
                generator.manual_seed(segment_seeds(clock.seed, moment, "embeddings", sample))
                size = alpha / (length * output.shape[-1]) ** 0.5
                row[start : start + length].uniform_(-size, size, generator=generator)
                start += length
        return output + noise

    return embeddings.register_forward_hook(add)
