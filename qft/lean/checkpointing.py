"""What each layer does with its activations: keep them, recompute them, or recompute from offload.

*keep* is plain autograd. *recompute* keeps a layer's input alone and runs the layer again in the
backward pass (Chen et al. 2016, https://arxiv.org/abs/1604.06174). *offload* moves that input away
as well, to the host or to a file, until the backward pass comes for it. A layer below which nothing
trains does none of it: it is no part of the backward pass.

The seam is transformers' own: each layer asks its ``_gradient_checkpointing_func``.
"""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from qft.lean.model_parts import layer_stacks

Choice = Literal["keep", "recompute", "offload"]
Place = Literal["host", "disk"]


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
    store = _Store() if place == "disk" else None
    for layer, choice in zip(layers, choices, strict=True):
        layer.gradient_checkpointing = choice != "keep"  # type: ignore[assignment]
        run = _Run(layer, choice, store)
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
    store: _Store | None

    def __call__(self, forward: Any, *inputs: Any) -> Any:
        if not torch.is_grad_enabled() or not self._differentiated(forward, inputs):
            return forward(*inputs)
        if self.choice == "recompute" or not inputs:  # a family may name all of its inputs
            return checkpoint(forward, *inputs, use_reentrant=False)
        hidden, *rest = inputs
        away = _Away(hidden, self.store)

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


class _Away:
    """A layer's input: at hand until `leave`, fetched back by each `take` after it."""

    def __init__(self, hidden: Tensor, store: _Store | None) -> None:
        self._hidden: Tensor | None = hidden
        self._store = store
        self._trains, self._device = hidden.requires_grad, hidden.device
        self._kept: Callable[[], Tensor] | None = None

    def take(self) -> Tensor:
        if self._hidden is not None:
            return self._hidden
        assert self._kept is not None
        fetched = self._kept().to(self._device, non_blocking=True)
        return fetched.requires_grad_(self._trains)

    def leave(self) -> None:
        assert self._hidden is not None
        hidden, self._hidden = self._hidden.detach(), None
        if self._store is not None:
            self._kept = self._store.put(hidden)
            return
        if hidden.is_cuda:  # a copy into pinned memory need not be waited for
            host = torch.empty_like(hidden, device="cpu", pin_memory=True)
            host.copy_(hidden, non_blocking=True)
        else:
            host = hidden.to("cpu")
        self._kept = lambda: host


class _Store:
    """Tensors in files of a scratch folder, which goes with the process."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="qft-offload-")
        self._count = 0

    def put(self, hidden: Tensor) -> Callable[[], Tensor]:
        """Writes a tensor; the function it returns reads it back, and its file goes with it."""
        self._count += 1
        return _OnDisk(Path(self._folder.name) / str(self._count), hidden).read


class _OnDisk:
    """A tensor in a file that exists as long as this object."""

    def __init__(self, path: Path, hidden: Tensor) -> None:
        self._path, self._dtype, self._shape = path, hidden.dtype, hidden.shape
        hidden.contiguous().cpu().flatten().view(torch.uint8).numpy().tofile(path)
        weakref.finalize(self, path.unlink, missing_ok=True)

    def read(self) -> Tensor:
        """The tensor, on the host."""
        data = bytearray(self._path.read_bytes())
        return torch.frombuffer(data, dtype=torch.uint8).view(self._dtype).view(self._shape)


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
