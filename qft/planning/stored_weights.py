"""The weights of a model's folder, as they lie in its files or would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qft import models
from qft.errors import ModelError
from qft.models import DTYPES
from qft.shards import ShardedCheckpoint, tensor_bytes


@dataclass(frozen=True)
class StoredTensors:
    """What loading a model reads.

    Attributes:
        shapes: of the tensors that the model has a place for, by module name.
        dtypes: what they are stored in, by module name.
        whole_bytes: of all tensors in the files, also of those that are not read.
        there: whether the files are there; else they are imagined from the config.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    whole_bytes: int
    there: bool

    @property
    def bytes(self) -> int:
        """Of the tensors that are read."""
        return sum(tensor_bytes(shape, self.dtypes[name]) for name, shape in self.shapes.items())

    def need_no_conversion(self, dtype: torch.dtype) -> bool:
        """Whether every floating tensor is stored in the type that it is wanted in."""
        return all(held in (dtype, None) for held in self._floating())

    def _floating(self) -> Iterator[torch.dtype]:
        return (dtype for dtype in self.dtypes.values() if dtype.is_floating_point)


def stored_tensors(folder: Path, skeleton: nn.Module) -> StoredTensors:
    """Read off the files' headers; without files, one tensor a parameter in the config's type.

    Args:
        skeleton: the model on the meta device, from `qft.models.open_skeleton`.

    Raises:
        ModelError: the files are broken.
    """
    if any(folder.glob("*.safetensors")):
        return _in_headers(folder, skeleton)
    pickles = sum(path.stat().st_size for path in folder.glob("*.bin"))
    dtype = stored_dtype(folder)
    named = dict(skeleton.named_parameters())  # what is tied is stored once
    kept = {name: b for name, b in skeleton.named_buffers() if name in skeleton.state_dict()}
    shapes = {name: tuple(tensor.shape) for name, tensor in {**named, **kept}.items()}
    dtypes = dict.fromkeys(named, dtype) | {name: b.dtype for name, b in kept.items()}
    size = sum(tensor_bytes(shape, dtypes[name]) for name, shape in shapes.items())
    return StoredTensors(shapes, dtypes, pickles or size, there=bool(pickles))


def _in_headers(folder: Path, skeleton: nn.Module) -> StoredTensors:
    with ShardedCheckpoint(folder) as checkpoint:
        try:
            names = models.module_names(folder, skeleton)
        except ModelError:  # it is rearranged on loading: all of it is read
            names = {name: name for name in checkpoint.names()}
            known = set(names)
        else:
            known = set(skeleton.state_dict())
        read = {module: name for name, module in names.items() if _belongs(module, known)}
        return StoredTensors(
            {module: checkpoint.shape(name) for module, name in read.items()},
            {module: checkpoint.dtype(name) for module, name in read.items()},
            checkpoint.total_bytes(),
            there=True,
        )


def _belongs(module: str, known: set[str]) -> bool:
    """A quantized weight's scales have names of their own beside it."""
    parts = module.split(".")
    return any(".".join(parts[:end]) in known for end in range(len(parts), 0, -1)) or (
        f"{module.rpartition('.')[0]}.weight" in known
    )


def stored_dtype(folder: Path) -> torch.dtype:
    """What a config.json says its weights are stored in; float32 where it does not."""
    config = models.read_config(folder)
    inner = config.get("text_config")
    named = config.get("dtype") or config.get("torch_dtype")
    if named is None and isinstance(inner, dict):
        named = inner.get("dtype") or inner.get("torch_dtype")
    return DTYPES.get(str(named).removeprefix("torch."), torch.float32)


def held_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, each once."""
    sizes = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(sizes.values())
