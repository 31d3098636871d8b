"""Safetensors written: headers planned up front, tensors streamed one at a time.

The reference library wants every tensor of a file at once. Here a file's header is known before its
first tensor is computed, and a tensor comes in blocks of rows, so that neither the largest shard
nor the largest tensor bounds the memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qft.errors import SaveError
from qft.shards import DTYPES, INDEX, SINGLE, tensor_bytes
from qft.write_journal import WriteJournal

MAX_SHARD_BYTES = 5 * 2**30
_MODE = 0o644  # the reference writer's 0600 surprises whoever shares a folder
_CODES = {dtype: code for code, dtype in DTYPES.items()}

Spec = tuple[str, tuple[int, ...], torch.dtype]
Produce = Callable[[str], Iterable[Tensor]]


class _Sink(Protocol):
    """What bytes are appended to."""

    def write(self, data: Any, /) -> object: ...


def write_shards(
    folder: Path,
    specs: Sequence[Spec],
    produce: Produce,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
    journal: WriteJournal | None = None,
) -> int:
    """Writes a checkpoint tensor by tensor; at most one block of rows is in memory.

    Args:
        folder: an existing folder; see :func:`qft.files.new_folder` for the atomic frame.
        specs: name, shape and dtype of every tensor, in the order they are wanted on disk.
        produce: gives the tensor of a name when its turn has come, in blocks of rows.
        max_shard_bytes: a new file begins before one grows past this (one tensor may).
        metadata: the header's free text; by default what transformers expects.
        progress: called with the bytes just written, or found written.
        journal: of the same folder; the write goes on where a former one was cut off.

    Returns:
        Bytes of all tensors.

    Raises:
        SaveError: ``produce`` gave another shape or dtype than was planned.
    """
    shards = list(_split(specs, max_shard_bytes))
    files = [_shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        header = _header(shard, metadata or {"format": "pt"})
        path = folder / file
        if journal is None:
            with path.open("wb") as stream:
                stream.write(header)
                for spec in shard:
                    _write_tensor(stream, spec, produce(spec[0]), progress)
        else:
            _go_on(journal, path, header, shard, produce, progress)
        path.chmod(_MODE)
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


def _header(specs: Sequence[Spec], metadata: Mapping[str, str]) -> bytes:
    """A file's length and header."""
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
    return len(text).to_bytes(8, "little") + text


def _go_on(
    journal: WriteJournal,
    path: Path,
    header: bytes,
    specs: Sequence[Spec],
    produce: Produce,
    progress: Callable[[int], None] | None,
) -> None:
    """Writes what is missing of a file, and notes what may be relied on."""
    with journal.file(path) as file:
        if not file.kept:
            file.write(header)
        position = len(header)
        for spec in specs:
            size = tensor_bytes(spec[1], spec[2])
            position += size
            if position > file.kept:
                _write_tensor(file, spec, produce(spec[0]), progress)
                file.note()
            elif progress:
                progress(size)


def _write_tensor(
    sink: _Sink, spec: Spec, blocks: Iterable[Tensor], progress: Callable[[int], None] | None
) -> None:
    _, shape, dtype = spec
    rows = 0
    for block in blocks:
        rows += block.shape[0] if shape else 1
        fits = block.dim() == len(shape) and tuple(block.shape[1:]) == shape[1:]
        if not fits or block.dtype != dtype or rows > (shape[0] if shape else 1):
            raise _not_announced(spec, f"{list(block.shape)} {block.dtype}")
        flat = block.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        sink.write(flat.numpy().data)  # no copy
        if progress:
            progress(flat.numel())
    if rows != (shape[0] if shape else 1):
        raise _not_announced(spec, f"{rows} rows")


def _not_announced(spec: Spec, found: str) -> SaveError:
    return SaveError(
        "A tensor to be saved is not what was announced.",
        where=spec[0],
        found=f"{found}, announced {list(spec[1])} {spec[2]}",
    )
