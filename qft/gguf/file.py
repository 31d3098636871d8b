"""A GGUF file, written as a stream: header, settings, names, then tensor by tensor.

The layout is version 3 of the format (ggml's docs/gguf.md): little-endian, every tensor begins at a
multiple of the alignment, axes are told from the fastest to the slowest.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from qft.errors import SaveError
from qft.gguf.types import TYPES, stored_bytes

Value = bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]

ALIGNMENT = 32
_VERSION = 3
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64 = 4, 5, 6, 7, 8, 9, 10


@dataclass(frozen=True)
class StoredAs:
    """One tensor of a file.

    Attributes:
        name: in the file.
        shape: as torch says it; the last axis is a row.
        kind: a key of :data:`qft.gguf.types.TYPES`.
    """

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def bytes(self) -> int:
        """Bytes of its data, without padding."""
        return stored_bytes(self.kind, self.shape)


class _Sink(Protocol):
    def write(self, data: Any, /) -> object: ...


def write_file(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[StoredAs],
    produce: Callable[[str], Iterable[Tensor]],
    progress: Callable[[int], None] | None = None,
) -> int:
    """Writes a file; at most one block of rows is in memory.

    Args:
        path: the file to make.
        metadata: key → value; whole numbers become uint32 (in lists int32), others float32.
        tensors: in the order they lie in the file.
        produce: gives a tensor's bytes, uint8 ``[rows, row bytes]``, in blocks of rows.
        progress: called with the bytes of tensors just written.

    Returns:
        Bytes of the file.

    Raises:
        SaveError: ``produce`` gave more or fewer bytes than were announced.
    """
    with path.open("wb") as stream:
        stream.write(header(metadata, tensors))
        for tensor in tensors:
            _write_tensor(stream, tensor, produce(tensor.name), progress)
        return stream.tell()


def header(metadata: Mapping[str, Value], tensors: Sequence[StoredAs]) -> bytes:
    """Everything before the data, padded to the alignment."""
    parts = [b"GGUF", struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind, data = _packed(value)
        parts += [_text(key), struct.pack("<I", kind), data]
    offset = 0
    for tensor in tensors:
        axes = tensor.shape[::-1]
        parts += [_text(tensor.name), struct.pack(f"<I{len(axes)}Q", len(axes), *axes)]
        parts.append(struct.pack("<IQ", TYPES[tensor.kind].number, offset))
        offset += _padded(tensor.bytes)
    text = b"".join(parts)
    return text.ljust(_padded(len(text)), b"\0")


def file_bytes(metadata: Mapping[str, Value], tensors: Sequence[StoredAs]) -> int:
    """Bytes the file will have."""
    return len(header(metadata, tensors)) + sum(_padded(tensor.bytes) for tensor in tensors)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _packed(value: Value) -> tuple[int, bytes]:
    """A value's type and bytes."""
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        if value < 0:
            return _INT32, struct.pack("<i", value)
        return (_UINT32, struct.pack("<I", value)) if value < 2**32 else (
            _UINT64, struct.pack("<Q", value))  # fmt: skip
    if isinstance(value, float):
        return _FLOAT32, struct.pack("<f", value)
    if isinstance(value, str):
        return _STRING, _text(value)
    return _ARRAY, _array(value)


def _array(values: Sequence[Any]) -> bytes:
    first = values[0] if values else 0
    if isinstance(first, str):
        kind, data = _STRING, b"".join(_text(value) for value in values)
    elif isinstance(first, bool):
        kind, data = _BOOL, struct.pack(f"<{len(values)}?", *values)
    elif isinstance(first, float):
        kind, data = _FLOAT32, struct.pack(f"<{len(values)}f", *values)
    else:
        kind, data = _INT32, struct.pack(f"<{len(values)}i", *values)
    return struct.pack("<IQ", kind, len(values)) + data


def _write_tensor(
    sink: _Sink, tensor: StoredAs, blocks: Iterable[Tensor], progress: Callable[[int], None] | None
) -> None:
    written = 0
    for block in blocks:
        flat = block.contiguous().reshape(-1)
        sink.write(flat.numpy().data)  # no copy
        written += flat.numel()
        if progress:
            progress(flat.numel())
    if written != tensor.bytes:
        raise SaveError("A tensor to be saved is not what was announced.", where=tensor.name,
                        found=f"{written} bytes, announced {tensor.bytes}")  # fmt: skip
    sink.write(b"\0" * (_padded(written) - written))
