"""A prepared model on fake tensors: every shape and type, no values, no memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qft.lean.model_parts import on_host
from qft.lean.standins import FusedKernel

DEVICE = "meta"  # what the planned device is called


@contextlib.contextmanager
def fake_step(*models: nn.Module, device: str = DEVICE, on_cuda: bool = False) -> Iterator[None]:
    """Within it the meta ``models`` are on fake tensors, and so is whatever is made.

    Args:
        models: prepared on the meta device; they stay fake afterwards.
        device: ``meta``, from which the host can be told, or ``cpu``.
        on_cuda: see `qft.lean.standins.FusedKernel`.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        for model in models:
            fill_with_fakes(model, device)
        with fused_attention(on_cuda):
            yield


def fill_with_fakes(model: nn.Module, device: str) -> None:
    """Every parameter and buffer by a fake one, of the mode at hand; what was shared stays so."""
    made: dict[int, Any] = {}
    for module in model.modules():
        place = "cpu" if on_host(module) else device
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=place)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in made:
                    made[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=place)
                module._buffers[name] = made[id(buffer)]


@dataclass
class Rows:
    """What nobody can see in a fake batch, and transformers makes its masks by.

    Attributes:
        padded: some row is shorter than the others.
        packed: rows hold several examples, told apart by their positions alone.
    """

    padded: bool = False
    packed: bool = False


@contextlib.contextmanager
def fused_attention(on_cuda: bool = False, rows: Rows | None = None) -> Iterator[None]:
    """Within it what transformers calls ``sdpa`` is the stand-in, for fake tensors alone.

    A mask of ones, or none where nothing is packed, makes transformers leave the mask out; it
    cannot see that in a fake tensor, and is told.

    Args:
        rows: of the batch at hand, which may change; None is rows all of one length.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain, plain_mask = ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    told = rows or Rows()

    def attend(*args: Any, **kwargs: Any) -> Any:
        with FusedKernel(on_cuda):
            return plain(*args, **kwargs)

    def mask(*args: Any, **kwargs: Any) -> Any:
        known = kwargs.get("attention_mask") is not None
        if told.padded if known else told.packed:
            return plain_mask(*args, **kwargs)
        kwargs["attention_mask"] = None
        if not kwargs.get("allow_is_bidirectional_skip"):
            kwargs["allow_is_causal_skip"] = True
        count = kwargs.pop("batch_size")
        made = plain_mask(*args, batch_size=1, **kwargs)
        return None if made is None else made.expand(count, -1, -1, -1)

    AttentionInterface.register("sdpa", attend)
    AttentionMaskInterface.register("sdpa", mask)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", plain)
        AttentionMaskInterface.register("sdpa", plain_mask)
