"""The merged model as a source of tensors that have shapes and types, and no values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qft import models
from qft.merging.side_files import side_files
from qft.planning.job import PlannedJob
from qft.planning.stored_weights import StoredTensors, stored_dtype, stored_tensors
from qft.shards import tensor_bytes


class ShapeSource:
    """What `qft.merging.merge.open_source` will give once the training is over, without a value.

    Args:
        job: its base may be a folder with a config.json alone.
        dtype: of every floating tensor; None keeps each one's own.
    """

    def __init__(self, job: PlannedJob, dtype: torch.dtype | None = None) -> None:
        folder, skeleton = job.inputs.base, job.ready.skeleton
        config = models.read_config(folder)
        stored = stored_tensors(folder, skeleton)
        if config.get("quantization_config"):  # it is read dequantized
            stored = _plain(skeleton, stored_dtype(folder))
        self._shapes = dict(stored.shapes)
        self._dtypes = {name: _cast(own, dtype) for name, own in stored.dtypes.items()}
        tied = _tied(skeleton)
        for name, parameter in skeleton.named_parameters():  # a new head trains in float32
            if name not in self._shapes and not tied.get(name, set()) & set(self._shapes):
                self._shapes[name] = tuple(parameter.shape)
                self._dtypes[name] = dtype or torch.float32
        kept = {k: v for k, v in config.items() if k != "quantization_config"}
        self.config: Mapping[str, Any] = {
            **kept, "architectures": [type(skeleton).__name__], models.TASK_KEY: job.recipe.task,
        }  # fmt: skip
        self.files: Mapping[str, Path] = side_files(folder)

    def names(self) -> list[str]:
        """Module names: there are no others here."""
        return list(self._shapes)

    def module(self, name: str) -> str:
        """The same."""
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the merged tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """What it is stored in."""
        return self._dtypes[name]

    def read(self, name: str) -> Tensor:
        """There is nothing to read."""
        raise NotImplementedError

    def blocks(self, name: str) -> Iterator[Tensor]:
        """There is nothing to read."""
        raise NotImplementedError

    def made_from(self) -> list[tuple[str, int, int]]:
        """There are no files."""
        return []

    def fingerprint(self) -> str:
        """There are no values."""
        return ""

    def bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor_bytes(self.shape(name), self.dtype(name)) for name in self.names())


def _cast(own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and own.is_floating_point else own


def _plain(skeleton: torch.nn.Module, dtype: torch.dtype) -> StoredTensors:
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    return StoredTensors(shapes, dict.fromkeys(shapes, dtype), 0, there=True)


def _tied(skeleton: torch.nn.Module) -> dict[str, set[str]]:
    """Each parameter's other names."""
    by_id: dict[int, set[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), set()).add(name)
    return {name: names for names in by_id.values() for name in names}
