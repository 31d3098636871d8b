"""What each layer does with its activations: keep them, recompute them, or recompute from offload.

*keep* is plain autograd. *recompute* keeps a layer's input alone and runs the layer again in the
backward pass (Chen et al. 2016, https://arxiv.org/abs/1604.06174). *offload* moves that input away
as well, to the host or to a file, until the backward pass comes for it. A layer below which nothing
trains does none of it: it is no part of the backward pass.

The seam is transformers' own: each layer asks its ``_gradient_checkpointing_func``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
    keeps_random_state: bool = True,
) -> None:
    """Tells every layer of ``checkpointed_layers`` what to do.

    Args:
        choices: one a layer.
        place: where *offload* puts a layer's input.
        keeps_random_state: whether a layer draws from the ordinary generator, so that the second
            run must begin with the state of the first.
    """
    layers = checkpointed_layers(model)
    if len(choices) != len(layers):
        raise ValueError(f"{len(choices)} choices for {len(layers)} layers")
    store = _Store() if place == "disk" else None
    for layer, choice in zip(layers, choices, strict=True):
        layer.gradient_checkpointing = choice != "keep"  # type: ignore[assignment]
        run = _Run(layer, choice, store, keeps_random_state)
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
    keeps_random_state: bool

    def __call__(self, forward: Any, hidden: Tensor, *rest: Any) -> Any:
        if not torch.is_grad_enabled() or not self._differentiated(forward, hidden, rest):
            return forward(hidden, *rest)
        settings: dict[str, Any] = {
            "use_reentrant": False,
            "preserve_rng_state": self.keeps_random_state,
        }
        if self.choice == "recompute":
            return checkpoint(forward, hidden, *rest, **settings)
        away = _Away(hidden, self.store)
        result = checkpoint(lambda: forward(away.take(), *rest), **settings)
        away.leave()
        return result

    def _differentiated(self, forward: Any, hidden: Tensor, rest: tuple[Any, ...]) -> bool:
        if hidden.requires_grad or any(p.requires_grad for p in self.layer.parameters()):
            return True
        others = tree_leaves((rest, getattr(forward, "keywords", {})))
        return any(isinstance(value, Tensor) and value.requires_grad for value in others)


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


@dataclass
class _Store:
    """Tensors in files of a scratch folder, which goes with the process."""

    folder: Any = field(default_factory=lambda: tempfile.TemporaryDirectory(prefix="qft-offload-"))
    names: Iterator[int] = field(default_factory=lambda: iter(range(2**62)))

    def put(self, hidden: Tensor) -> Callable[[], Tensor]:
        """Writes a tensor; the function it returns reads it back, once, and removes the file."""
        path = Path(self.folder.name) / str(next(self.names))
        dtype, shape = hidden.dtype, hidden.shape
        raw = hidden.contiguous().cpu().view(torch.uint8) if hidden.numel() else hidden.cpu()
        raw.numpy().tofile(path)

        def read() -> Tensor:
            data = bytearray(path.read_bytes())
            path.unlink()
            return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)

        return read
