"""Token embeddings that stay on the host: a step looks up a few rows of a very large table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qft.lean.model_parts import ON_HOST


@dataclass(frozen=True)
class HostLookup:
    """The ``forward`` of an embedding whose table is on the host."""

    module: nn.Module
    device: torch.device
    plain: Callable[..., Tensor]

    def __call__(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Ids, wherever they are, to rows on the model's device."""
        place = next(self.module.parameters()).device  # a trainer may have moved the whole model
        rows = self.plain(ids.to(place), *args, **kwargs)
        return rows.to(self.device, non_blocking=True)


def move_to_host(module: nn.Module) -> None:
    """Moves the table; on a meta skeleton it is only noted where it will be."""
    module.__dict__[ON_HOST] = True
    if not any(p.is_meta for p in module.parameters()):
        module.to("cpu")


def move_back(module: nn.Module, device: torch.device) -> None:
    """Undoes `move_to_host`."""
    module.__dict__.pop(ON_HOST, None)
    if not any(p.is_meta for p in module.parameters()):
        module.to(device)
