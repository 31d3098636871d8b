"""A GGUF file, written as a stream: header, settings, names, then tensor by tensor.

The layout is version 3 of the format (ggml's docs/gguf.md): little-endian, every tensor begins at a
multiple of the alignment, axes are told from the fastest to the slowest. A model is one file of any
size; llama.cpp's split files are not written.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qft.errors import ModelError, SaveError
from qft.gguf.types import TYPES, holds, stored_bytes
from qft.write_journal import JournalledFile, WriteJournal

Value = bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]
Produce = Callable[[str, int], Iterable[Tensor]]

ALIGNMENT = 32
_VERSION = 3
_MODE = 0o644
_STRING, _ARRAY = 8, 9
_FLOAT32, _BOOL = (6, "f"), (7, "?")
# the first that holds all of them; llama.cpp reads settings as uint32 and lists as int32
_SETTINGS = ((4, "I", 0, 2**32), (5, "i", -(2**31), 2**31),
             (10, "Q", 0, 2**64), (11, "q", -(2**63), 2**63))  # fmt: skip
_LISTS = (_SETTINGS[1], *_SETTINGS[2:])
_LONGEST_NAME = 63  # bytes, of a tensor, as ggml keeps it
_MOST_AXES = 4


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


def write_file(
    path: Path,
    head: bytes,
    tensors: Sequence[StoredAs],
    produce: Produce,
    journal: WriteJournal,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Writes a file, or what is missing of it; at most one block of rows is in memory.

    Args:
        path: the file to make, or to go on with.
        head: from :func:`header`.
        tensors: the same as the header's, in their order.
        produce: gives a tensor's bytes from a byte on, uint8, in blocks of rows.
        journal: of the file's folder; what it knows to be written is not made again.
        progress: called with the bytes of tensors just written, or found written.

    Returns:
        Bytes of the file.

    Raises:
        SaveError: ``produce`` gave more or fewer bytes than were announced.
    """
    with journal.file(path) as file:
        if file.kept < len(head):
            file.write(head[file.kept :])
        position = len(head)
        for tensor in tensors:
            there = min(max(0, file.kept - position), _padded(tensor.bytes))
            if progress and there:
                progress(min(there, tensor.bytes))
            _write_tensor(file, tensor, there, produce, progress)
            position += _padded(tensor.bytes)
    path.chmod(_MODE)
    return position


def header(metadata: Mapping[str, Value], tensors: Sequence[StoredAs]) -> bytes:
    """Everything before the data, padded to the alignment.

    Args:
        metadata: key → value; whole numbers become uint32 where they fit (in lists int32), others
            float32.
        tensors: in the order they lie in the file.

    Raises:
        ModelError: GGUF cannot hold a value or a tensor, or llama.cpp would not read it.
    """
    _require_readable(tensors)
    text = bytearray(b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        _add_text(text, key)
        try:
            _add_value(text, value)
        except (TypeError, ValueError, OverflowError, struct.error) as error:
            raise ModelError("GGUF cannot hold a setting of this model.", where=key,
                             found=f"{str(value)[:60]!r}: {error}") from None  # fmt: skip
    offset = 0
    for tensor in tensors:
        axes = tensor.shape[::-1]
        _add_text(text, tensor.name)
        text += struct.pack(f"<I{len(axes)}Q", len(axes), *axes)
        text += struct.pack("<IQ", TYPES[tensor.kind].number, offset)
        offset += _padded(tensor.bytes)
    text += b"\0" * (_padded(len(text)) - len(text))
    return bytes(text)


def data_bytes(tensors: Sequence[StoredAs]) -> int:
    """Bytes a file has after its header."""
    return sum(_padded(tensor.bytes) for tensor in tensors)


def _require_readable(tensors: Sequence[StoredAs]) -> None:
    """Raises ModelError where ggml would not read a tensor."""
    seen: set[str] = set()
    for tensor in tensors:
        problems = {
            "two tensors have this name": tensor.name in seen,
            f"a name has {_LONGEST_NAME} bytes at most": len(tensor.name.encode()) > _LONGEST_NAME,
            f"a tensor has 1 to {_MOST_AXES} axes": not 1 <= len(tensor.shape) <= _MOST_AXES,
            "a tensor holds at least one number": min(tensor.shape, default=1) < 1,
            f"rows do not fill the blocks of {tensor.kind}": not holds(
                tensor.kind, tensor.shape[-1] if tensor.shape else 1
            ),
        }
        seen.add(tensor.name)
        found = [text for text, wrong in problems.items() if wrong]
        if found:
            raise ModelError("GGUF cannot hold a tensor of this model.", where=tensor.name,
                             found=f"{list(tensor.shape)}: {'; '.join(found)}")  # fmt: skip


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _add_text(text: bytearray, value: str) -> None:
    data = value.encode("utf-8")
    text += len(data).to_bytes(8, "little")
    text += data


def _add_value(text: bytearray, value: Value) -> None:
    """A value's type and bytes."""
    if isinstance(value, str):
        text += struct.pack("<I", _STRING)
        _add_text(text, value)
    elif isinstance(value, bool | int | float):
        number, code = _kind([value], _SETTINGS)
        text += struct.pack(f"<I{code}", number, value)
    elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        text += struct.pack("<I", _ARRAY)
        _add_list(text, value)
    else:
        raise TypeError(f"it is {type(value).__name__}")


def _add_list(text: bytearray, values: Sequence[Any]) -> None:
    if values and all(isinstance(value, str) for value in values):
        text += struct.pack("<IQ", _STRING, len(values))
        for value in values:
            _add_text(text, value)
        return
    number, code = _kind(values, _LISTS)
    text += struct.pack("<IQ", number, len(values))
    text += struct.pack(f"<{len(values)}{code}", *values)


def _kind(values: Sequence[Any], whole: Sequence[tuple[int, str, int, int]]) -> tuple[int, str]:
    """GGUF's number and struct's letter of the type that holds all values."""
    kinds = {type(value) for value in values}
    if kinds == {bool}:
        return _BOOL
    if not kinds <= {int}:
        if kinds <= {int, float}:
            return _FLOAT32
        raise TypeError(f"it holds {', '.join(sorted(kind.__name__ for kind in kinds))}")
    low, high = min(values, default=0), max(values, default=0)
    for number, code, least, above in whole:
        if least <= low and high < above:
            return number, code
    raise OverflowError("no type of GGUF holds such a number")


def _write_tensor(
    file: JournalledFile,
    tensor: StoredAs,
    there: int,
    produce: Produce,
    progress: Callable[[int], None] | None,
) -> None:
    """Writes what follows a tensor's first bytes, and its padding."""
    written = min(there, tensor.bytes)
    for block in produce(tensor.name, written) if written < tensor.bytes else ():
        flat = block.contiguous().reshape(-1)
        file.write(flat.numpy().data)  # no copy
        file.note()
        written += flat.numel()
        if progress:
            progress(flat.numel())
    if written != tensor.bytes:
        raise SaveError("A tensor to be saved is not what was announced.", where=tensor.name,
                        found=f"{written} bytes, announced {tensor.bytes}")  # fmt: skip
    file.write(b"\0" * (_padded(written) - max(written, there)))
