"""What each layer does with its activations: keep them, recompute them, or recompute from offload.

*keep* is plain autograd. *recompute* keeps a layer's input alone and runs the layer again in the
backward pass (Chen et al. 2016, https://arxiv.org/abs/1604.06174). *offload* moves that input away
as well until the backward pass comes for it (`qft.lean.offload`). A layer below which nothing
trains does none of it: it is no part of the backward pass.

The seam is transformers' own: each layer asks its ``_gradient_checkpointing_func``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from qft.lean.model_parts import layer_stacks
from qft.lean.offload import Offload, Place

Choice = Literal["keep", "recompute", "offload"]


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that can choose, in the order data passes them; of two halves both."""
    return [
        layer
        for stack in layer_stacks(model).values()
        for layer in stack
        if hasattr(layer, "gradient_checkpointing")
    ]


def install_checkpointing(
    model: nn.Module,
    choices: Sequence[Choice],
    *,
    place: Place = "host",
) -> None:
    """Tells every layer of ``checkpointed_layers`` what to do.

    Args:
        choices: one a layer.
        place: where *offload* puts a layer's input.
    """
    layers = checkpointed_layers(model)
    if len(choices) != len(layers):
        raise ValueError(f"{len(choices)} choices for {len(layers)} layers")
    offload = Offload(place)
    for layer, choice in zip(layers, choices, strict=True):
        layer.gradient_checkpointing = choice != "keep"  # type: ignore[assignment]
        run = _Run(layer, choice, offload)
        layer._gradient_checkpointing_func = run  # type: ignore[assignment]


def remove_checkpointing(model: nn.Module) -> None:
    """Back to plain autograd."""
    for layer in checkpointed_layers(model):
        layer.__dict__.pop("gradient_checkpointing", None)
        layer.__dict__.pop("_gradient_checkpointing_func", None)


@dataclass(frozen=True)
class _Run:
    """Runs one layer; transformers hands it the layer's forward and its inputs."""

    layer: nn.Module
    choice: Choice
    offload: Offload

    def __call__(self, forward: Any, *inputs: Any) -> Any:
        if not torch.is_grad_enabled() or not self._differentiated(forward, inputs):
            return forward(*inputs)
        if self.choice == "recompute" or not inputs:  # a family may name all of its inputs
            return checkpoint(forward, *inputs, use_reentrant=False)
        hidden, *rest = inputs
        away = self.offload.send(hidden)

        def run(device: Tensor, *rest: Any) -> Any:
            return forward(away.take(), *rest)

        # an empty tensor tells torch whose random state to keep
        result = checkpoint(run, hidden.new_empty(0), *rest, use_reentrant=False)
        away.leave()
        return result

    def _differentiated(self, forward: Any, inputs: tuple[Any, ...]) -> bool:
        if any(p.requires_grad for p in self.layer.parameters()):
            return True
        values = tree_leaves((inputs, getattr(forward, "keywords", {})))
        return any(isinstance(value, Tensor) and value.requires_grad for value in values)


@contextlib.contextmanager
def paused(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within it these layers recompute nothing, and keep the cache that generating text needs."""
    flags = [layer.gradient_checkpointing for layer in layers]
    for layer in layers:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, flag in zip(layers, flags, strict=True):
            layer.gradient_checkpointing = flag
