"""The tensors of a frozen trunk: their fingerprint, and their way out of memory and back.

Once what a trunk computes is known for every sample, its weights are of no use until the training
is over. They wait in a file without a name, which goes with the process however that ends. What
quantizers hang on a weight (scales, code tables) goes the same way.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from qft.lean.heap import trim_heap

_DEPTH = 3  # a weight's quantization state has a state of its own, and no deeper


def held_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's tensors by name: parameters, buffers, and what a quantizer hung on them."""
    for name, child in module.named_modules():
        for key, tensor in _own(child):
            yield f"{name}.{key}", tensor


def _within(value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield "", value
    if depth == 0 or isinstance(value, (nn.Module, type)) or callable(value):
        return
    for key, inner in getattr(value, "__dict__", {}).items():
        for path, tensor in _within(inner, depth - 1):
            yield f".{key}{path}", tensor


def tensors_hash(modules: Sequence[nn.Module]) -> str:
    """SHA-256 of every byte of the modules' tensors, with their names, shapes and types."""
    digest = hashlib.sha256()
    for number, module in enumerate(modules):
        for name, tensor in sorted(held_tensors(module), key=lambda part: part[0]):
            digest.update(f"{number}{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class _View:
    """How one tensor looks at a storage that left."""

    tensor: Tensor
    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Unloaded:
    """Tensors that have left memory; each keeps its shape, type and device, and reads as zero.

    Args:
        modules: whose tensors leave; what another module of ``model`` holds too (tied embeddings)
            stays.
        folder: on whose disk they wait; it exists.

    Raises:
        OSError: the disk is full; every tensor is where it was.
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], folder: Path) -> None:
        self.bytes = 0
        self._views: list[_View] = []
        self._sizes: list[int] = []
        places: dict[int, int] = {}
        self._file: BinaryIO = _nameless_file(folder)
        for tensor in _only_in(model, modules):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in places:
                places[storage.data_ptr()] = len(self._sizes)
                self._sizes.append(storage.nbytes())
                _write(self._file, storage)
            look = (tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
            self._views.append(_View(tensor, places[storage.data_ptr()], *look))
        self._file.flush()
        for view in self._views:
            nothing = torch.zeros((), dtype=view.tensor.dtype, device=view.tensor.device)
            view.tensor.data = nothing.expand(view.shape)
        self.bytes = sum(self._sizes)
        give_back()

    def restore(self) -> None:
        """Every tensor has its values again, in ordinary memory on its device; once."""
        self._file.seek(0)
        by_storage: dict[int, list[_View]] = {}
        for view in self._views:
            by_storage.setdefault(view.storage, []).append(view)
        for number, size in enumerate(self._sizes):
            flat = torch.empty(size, dtype=torch.uint8)
            if self._file.readinto(flat.numpy().data) != size:  # type: ignore[attr-defined]
                raise OSError("the file that weights waited in became shorter")
            for device in {view.tensor.device for view in by_storage[number]}:
                storage = flat.to(device).untyped_storage()
                for view in by_storage[number]:
                    empty = torch.empty(0, dtype=view.tensor.dtype, device=device)
                    view.tensor.data = empty.set_(storage, view.offset, view.shape, view.stride)
        self._file.close()
        self._views = []


def _nameless_file(folder: Path) -> BinaryIO:
    """The system removes it when it is closed, or the process ends."""
    return tempfile.TemporaryFile(dir=folder)  # type: ignore[return-value]


def has_left(tensor: Tensor) -> bool:
    """Whether a tensor only looks like itself: one zero, seen many times."""
    return tensor.numel() > 1 and not any(tensor.stride())


def give_back() -> None:
    """Allocators keep what was freed for later; here others are to have it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


def _only_in(model: nn.Module, modules: Sequence[nn.Module]) -> list[Tensor]:
    """The tensors that nothing outside of these modules holds, each object once."""
    inside = {child for module in modules for child in module.modules()}
    kept: set[int] = set()
    found: dict[int, Tensor] = {}
    for child in model.modules():
        for _, tensor in _own(child):
            if tensor.is_meta or tensor.untyped_storage().nbytes() == 0:
                continue
            if child in inside:
                found[id(tensor)] = tensor
            else:
                kept.add(tensor.untyped_storage().data_ptr())
    return [t for t in found.values() if t.untyped_storage().data_ptr() not in kept]


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module without its children's."""
    held: list[tuple[str, Any]] = [*module._parameters.items(), *module._buffers.items()]
    held += [(key, value) for key, value in vars(module).items() if key[0] != "_"]
    for key, value in held:
        for path, tensor in _within(value, _DEPTH):
            yield f"{key}{path}", tensor


def _write(file: BinaryIO, storage: torch.UntypedStorage) -> None:
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
    flat.set_(storage, 0, (storage.nbytes(),), (1,))
    file.write(flat.cpu().numpy().data)
