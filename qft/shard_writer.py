"""Safetensors written: headers planned up front, tensors streamed one at a time.

The reference library wants every tensor of a file at once. Here a file's header is known before its
first tensor is computed, so that the largest tensor, not the largest shard, bounds the memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qft.errors import SaveError
from qft.shards import DTYPES, INDEX, SINGLE, tensor_bytes

MAX_SHARD_BYTES = 5 * 2**30
_MODE = 0o644  # the reference writer's 0600 surprises whoever shares a folder
_CODES = {dtype: code for code, dtype in DTYPES.items()}

Spec = tuple[str, tuple[int, ...], torch.dtype]


def write_shards(
    folder: Path,
    specs: Sequence[Spec],
    produce: Callable[[str], Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Writes a checkpoint tensor by tensor; at most one tensor is in memory.

    Args:
        folder: an existing folder; see :func:`qft.files.new_folder` for the atomic frame.
        specs: name, shape and dtype of every tensor, in the order they are wanted on disk.
        produce: gives the tensor of a name when its turn has come.
        max_shard_bytes: a new file begins before one grows past this (one tensor may).
        metadata: the header's free text; by default what transformers expects.
        progress: called with the bytes of each tensor written.

    Returns:
        Bytes of all tensors.

    Raises:
        SaveError: ``produce`` gave another shape or dtype than was planned.
    """
    shards = list(_split(specs, max_shard_bytes))
    files = [_shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, produce, metadata or {"format": "pt"}, progress)
    total = sum(tensor_bytes(shape, dtype) for _, shape, dtype in specs)
    if len(shards) > 1:
        weight_map = {s[0]: f for f, shard in zip(files, shards, strict=True) for s in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _shard_name(number: int, count: int) -> str:
    """The file name of shard ``number`` (from 1) of ``count``."""
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _split(specs: Sequence[Spec], max_shard_bytes: int) -> Iterator[list[Spec]]:
    shard: list[Spec] = []
    held = 0
    for spec in specs:
        size = tensor_bytes(spec[1], spec[2])
        if shard and held + size > max_shard_bytes:
            yield shard
            shard, held = [], 0
        shard.append(spec)
        held += size
    yield shard


def _write_file(
    path: Path,
    specs: Sequence[Spec],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    progress: Callable[[int], None] | None,
) -> None:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, shape, dtype in specs:
        end = position + tensor_bytes(shape, dtype)
        header[name] = {
            "dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, end]
        }  # fmt: skip
        position = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight, as in the reference
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            written = _write_tensor(stream, spec, produce(spec[0]))
            if progress:
                progress(written)
    path.chmod(_MODE)


def _write_tensor(stream: BinaryIO, spec: Spec, tensor: Tensor) -> int:
    name, shape, dtype = spec
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise SaveError(
            "A tensor to be saved is not what was announced.",
            where=name,
            found=f"{list(tensor.shape)} {tensor.dtype}, announced {list(shape)} {dtype}",
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    stream.write(flat.numpy().data)  # no copy
    return flat.numel()
