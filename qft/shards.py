"""Safetensors read: untrusted headers checked before use, tensors streamed one at a time.

A header is read as what it is: a claim by a stranger. Its length, its offsets and its shapes are
checked against the file's real size before a byte is allocated for what they promise.

The format (https://huggingface.co/docs/safetensors): eight bytes of header length (little endian),
a JSON header, then the tensors' bytes without holes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from qft.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 * 2**20  # what the reference implementation allows
_MAX_INDEX_BYTES = 100 * 2**20
_LENGTH_BYTES = 8
_HEAD_BYTES = 4096  # of each tensor, for a fingerprint
BLOCK_NUMBERS = 4 * 2**20  # of a tensor, held at a time by whatever streams it: 16 MiB of float32

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class Fingerprint:
    """Tells one model from another: a hash of every tensor's name, shape, dtype and first bytes."""

    def __init__(self) -> None:
        self._parts: dict[str, bytes] = {}

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, head: bytes) -> None:
        """One tensor, in any order; ``head`` is its first 4 KiB."""
        self._parts[name] = f"{name} {shape} {dtype}".encode() + head

    def add_tensor(self, name: str, tensor: Tensor, shape: tuple[int, ...] | None = None) -> None:
        """One tensor, on the CPU; or its first rows, and the ``shape`` of all of it."""
        first = tensor.detach().reshape(-1)[:_HEAD_BYTES].contiguous()
        head = first.view(torch.uint8)[:_HEAD_BYTES].numpy().tobytes()
        self.add(name, tuple(tensor.shape) if shape is None else shape, tensor.dtype, head)

    def text(self) -> str:
        """The hash over all that was added."""
        parts = b"".join(self._parts[name] for name in sorted(self._parts))
        return hashlib.sha256(parts).hexdigest()[:32]


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # bytes from the start of the file
    bytes: int


class _File:
    """A file that is opened when it is first read, and can be closed in between."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: BinaryIO | None = None

    def fill(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Reads as many bytes as ``buffer`` holds."""
        try:
            if self._stream is None:
                self._stream = self.path.open("rb")
            self._stream.seek(offset)
            count = self._stream.readinto(buffer)  # type: ignore[attr-defined]
        except OSError as error:
            raise ModelError(
                "A shard cannot be read.",
                where=self.path,
                found=error.strerror,
                fix="mend its permissions or its disk, or get the file again",
            ) from None
        if count != len(buffer):
            raise ModelError("A shard became shorter while it was read.", where=self.path)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file, read by rows or columns; its header entry has been checked.

    ``stored[a:b]`` are some of its rows, on the CPU, in memory of their own.
    """

    name: str
    file: _File
    entry: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        """From the header."""
        return self.entry.shape

    @property
    def dtype(self) -> torch.dtype:
        """From the header."""
        return self.entry.dtype

    def read(self) -> Tensor:
        """All of it."""
        buffer = bytearray(self.entry.bytes)
        self.file.fill(self.entry.offset, buffer)
        return self._tensor(buffer, self.shape)

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows of a slice without a step; a tensor without rows is one."""
        if not self.shape:
            return self.read()
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise IndexError("rows are read without a step")
        stop = max(start, stop)
        buffer = bytearray((stop - start) * self._row_bytes)
        self.file.fill(self.entry.offset + start * self._row_bytes, buffer)
        return self._tensor(buffer, (stop - start, *self.shape[1:]))

    def rows(self, rows: Sequence[int]) -> Tensor:
        """Some rows, in the order asked for.

        Raises:
            IndexError: there is no such row.
        """
        missing = next((row for row in rows if not 0 <= row < self.shape[0]), None)
        if missing is not None:
            raise IndexError(f"{self.name} has no row {missing}")
        if isinstance(rows, range) and rows.step == 1:
            return self[rows.start : rows.stop]
        buffer = bytearray(len(rows) * self._row_bytes)
        view = memoryview(buffer)
        for place, row in enumerate(rows):
            part = view[place * self._row_bytes : (place + 1) * self._row_bytes]
            self.file.fill(self.entry.offset + row * self._row_bytes, part)
        return self._tensor(buffer, (len(rows), *self.shape[1:]))

    def columns(self, columns: range) -> Tensor:
        """Neighbouring columns of a matrix, ``[rows, len(columns)]``."""
        height, width = self.shape
        begin, end, step = slice(columns.start, columns.stop, columns.step).indices(width)
        if step != 1 or end - begin != len(columns):
            raise IndexError(f"{self.name} has no columns {columns}")
        part_bytes = len(columns) * self.dtype.itemsize
        buffer = bytearray(height * part_bytes)
        view = memoryview(buffer)
        first = self.entry.offset + begin * self.dtype.itemsize
        for row in range(height):
            part = view[row * part_bytes : (row + 1) * part_bytes]
            self.file.fill(first + row * self._row_bytes, part)
        return self._tensor(buffer, (height, len(columns)))

    def head(self, count: int) -> bytes:
        """The first ``count`` bytes (or fewer) of the data."""
        buffer = bytearray(min(count, self.entry.bytes))
        self.file.fill(self.entry.offset, buffer)
        return bytes(buffer)

    @property
    def _row_bytes(self) -> int:
        return self.entry.bytes // self.shape[0] if self.shape[0] else 0

    def _tensor(self, buffer: bytearray, shape: tuple[int, ...]) -> Tensor:
        if not buffer:
            return torch.empty(shape, dtype=self.dtype)
        return torch.frombuffer(buffer, dtype=torch.uint8).view(self.dtype).reshape(shape)


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by name; none is read.

    Raises:
        ModelError: see :func:`read_header`.
    """
    file = _File(path)
    return {name: StoredTensor(name, file, entry) for name, entry in read_header(path).items()}


def tensor_bytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    """Bytes a tensor of this shape takes on disk."""
    return math.prod(shape) * dtype.itemsize


def row_blocks(shape: Sequence[int], numbers: int = BLOCK_NUMBERS) -> Iterator[slice]:
    """Cuts a tensor into blocks of whole rows, of about so many ``numbers``, in order.

    Blocks of more than 64 rows have a multiple of 64, so that whatever groups weights by 64 (4-bit
    formats) finds the same groups in a block as in the whole.
    """
    if len(shape) < 2:
        yield slice(0, shape[0] if shape else 1)
        return
    rows = max(1, numbers // max(1, math.prod(shape[1:])))
    rows -= rows % 64 if rows > 64 else 0
    yield from (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, every claim of its header checked.

    Raises:
        ModelError: the file is cut short, or its header is broken, absurd or inconsistent.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            header, start = _header_values(path, stream, size)
    except OSError as error:
        raise ModelError("A shard cannot be read.", where=path, found=error.strerror) from None
    header.pop("__metadata__", None)
    spans = {name: _span(path, name, value) for name, value in header.items()}
    _check_layout(path, spans, size - start)
    return {
        name: Entry(shape, dtype, start + begin, end - begin)
        for name, (shape, dtype, begin, end) in spans.items()
    }


_Span = tuple[tuple[int, ...], torch.dtype, int, int]


def _header_values(path: Path, stream: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header's JSON and the position where the data begins."""
    head = stream.read(_LENGTH_BYTES)
    length = int.from_bytes(head, "little")
    if len(head) < _LENGTH_BYTES or length > size - _LENGTH_BYTES or length > _MAX_HEADER_BYTES:
        raise ModelError(
            "This is no whole safetensors file: its header cannot be as long as it says.",
            where=path,
            found=f"a header of {length:,} bytes in a file of {size:,}",
            fix="get the file again; it is cut short or something else",
        )
    try:
        values = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is no JSON: {str(error)[:120]}") from None
    if not isinstance(values, dict):
        raise _broken(path, "its header is no JSON object")
    return values, _LENGTH_BYTES + length


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name appears twice")
    return values


def _broken(path: Path, found: str) -> ModelError:
    return ModelError(
        "A safetensors file is broken or not to be trusted.",
        where=path,
        found=found,
        fix="get the file again from a source you trust",
    )


def _span(path: Path, name: str, value: Any) -> _Span:
    """Shape, dtype, begin and end of one header entry, consistent in themselves."""
    if not isinstance(value, dict):
        raise _broken(path, f"tensor {name!r} has no description")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value.get("dtype"), str) else None
    if dtype is None:
        raise _broken(path, f"tensor {name!r} has the dtype {value.get('dtype')!r}")
    shape, offsets = value.get("shape"), value.get("data_offsets")
    if not (isinstance(shape, list) and all(_is_count(n) for n in shape)):
        raise _broken(path, f"tensor {name!r} has the shape {str(shape)[:80]}")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(_is_count(n) for n in offsets)):
        raise _broken(path, f"tensor {name!r} has the offsets {str(offsets)[:80]}")
    begin, end = offsets
    if end - begin != tensor_bytes(shape, dtype):
        raise _broken(
            path,
            f"tensor {name!r} of shape {str(shape)[:80]} and dtype {value['dtype']} claims "
            f"{end - begin} bytes, which is not its size",
        )
    return tuple(shape), dtype, begin, end


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check_layout(path: Path, spans: Mapping[str, _Span], data_bytes: int) -> None:
    """The tensors fill the data exactly: no overlap, no hole, nothing beyond the end."""
    position = 0
    for name, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != position:
            kind = "overlaps the one before it" if begin < position else "follows a hole"
            raise _broken(path, f"tensor {name!r} {kind}")
        position = end
    if position > data_bytes:
        raise ModelError(
            "A shard is cut short.",
            where=path,
            found=f"{position - data_bytes:,} of {position:,} bytes are missing",
            fix="get the file again; the download or copy was not complete",
        )
    if position < data_bytes:
        raise _broken(path, f"{data_bytes - position:,} bytes belong to no tensor")


class ShardedCheckpoint:
    """A folder's weights, opened tensor by tensor.

    Args:
        folder: it holds ``model.safetensors`` or an index and the shards it names.

    Raises:
        ModelError: no weights, a broken shard, or an index that points out of the folder.
    """

    rounded = ""  # see qft.merging.rounded_base.BaseCheckpoint

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._places: dict[str, StoredTensor] = {}
        for file, wanted in self._files().items():
            held = open_tensors(inside(self.folder, file))
            for name in held if wanted is None else wanted:
                if name not in held:
                    raise ModelError(
                        "The index names a tensor that its shard does not hold.",
                        where=self.folder / file,
                        found=name,
                        fix="get the model again; index and shards do not belong together",
                    )
                self._places[name] = held[name]

    def _files(self) -> dict[str, list[str] | None]:
        """Each file's wanted tensors; None is all of them."""
        if (self.folder / INDEX).exists():
            return dict(_read_index(inside(self.folder, INDEX)))
        if (self.folder / SINGLE).exists() or (self.folder / SINGLE).is_symlink():
            return {SINGLE: None}
        raise ModelError(
            "The model folder holds no safetensors weights.",
            where=self.folder,
            fix=f"it needs {SINGLE}, or {INDEX} and the shards it names",
        )

    def names(self) -> list[str]:
        """Every tensor's name, in the order of the files."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._place(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header."""
        return self._place(name).dtype

    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.entry.bytes for stored in self._places.values())

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in memory of its own; nothing else is read."""
        return self._place(name).read()

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a tensor, in the order asked for; nothing else is read.

        Args:
            rows: positions along the first axis.
        """
        return self._place(name).rows(rows)

    def read_columns(self, name: str, columns: range) -> Tensor:
        """Neighbouring columns of a matrix, ``[rows, len(columns)]``; nothing else is read."""
        return self._place(name).columns(columns)

    def head(self, name: str, count: int) -> bytes:
        """The first ``count`` bytes (or fewer) of a tensor's data."""
        return self._place(name).head(count)

    def files(self) -> list[Path]:
        """The files the tensors lie in."""
        return list(dict.fromkeys(stored.file.path for stored in self._places.values()))

    def fingerprint(self) -> str:
        """See :class:`Fingerprint`; only headers and the heads of the tensors are read."""
        found = Fingerprint()
        for name in self.names():
            found.add(name, self.shape(name), self.dtype(name), self.head(name, _HEAD_BYTES))
        return found.text()

    def _place(self, name: str) -> StoredTensor:
        try:
            return self._places[name]
        except KeyError:
            raise ModelError(
                "The checkpoint has no such tensor.", where=self.folder, found=name
            ) from None

    def close(self) -> None:
        """Closes the files; reading opens them again."""
        for stored in self._places.values():
            stored.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


def inside(folder: Path, name: str) -> Path:
    """The path of a file that must lie in ``folder`` itself.

    A link is followed only in the hub cache's own layout, where
    ``snapshots/<revision>/file`` points to ``../../blobs/<hash>``.

    Raises:
        ModelError: the name is a path, or the link leads elsewhere.
    """
    plain = bool(name) and name not in (".", "..") and not re.search(r"[/\\\0:]", name)
    if not plain:
        raise ModelError(
            "A file of the model is named by a path; only plain names are followed.",
            where=folder,
            found=name[:200],
            fix="do not use this model, or get it again from a source you trust",
        )
    path = folder / name
    if path.is_symlink() and not _is_hub_link(folder, path):
        raise ModelError(
            "A file of the model is a link that leads out of its folder.",
            where=path,
            found=path.readlink(),
            fix="replace the link by the file itself",
        )
    return path


def _is_hub_link(folder: Path, path: Path) -> bool:
    """Whether ``path`` is a link inside one repository of the Hugging Face hub cache."""
    snapshot = folder.resolve()
    target = path.resolve()
    if target.parent == snapshot:
        return not target.is_symlink()
    blobs = snapshot.parent.parent / "blobs"
    return snapshot.parent.name == "snapshots" and target.parent == blobs.resolve()


def _read_index(path: Path) -> dict[str, list[str]]:
    """Shard name → names of the tensors the index places there."""
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise _broken(path, f"an index of {path.stat().st_size:,} bytes")
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        pairs = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(path, f"no readable index: {str(error)[:120]}") from None
    shards: dict[str, list[str]] = {}
    for name, file in pairs:
        if not isinstance(file, str):
            raise _broken(path, f"tensor {name!r} has no shard name")
        inside(path.parent, file)
        shards.setdefault(file, []).append(name)
    missing = [file for file in shards if not (path.parent / file).is_file()]
    if missing:
        raise ModelError(
            "Shards that the index names are missing.",
            where=path.parent,
            found=", ".join(missing[:5]),
            fix="get the missing files",
        )
    return shards
