"""A GGUF file from elsewhere, looked through before any reader opens it.

Readers take counts and lengths as the file says them and set memory aside for them. Here every one
is first held against the bytes that are left, the tensors' places against the file's end and
against each other. Nothing is read but the header; no number in it makes this allocate.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

from qft.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # by value type
_KEY_BYTES, _AXES, _ALIGNMENT, _LARGEST_ALIGNMENT = 65535, 4, 32, 1 << 20
_SMALLEST = 24  # magic, version and two counts
_SMALLEST_VALUE, _SMALLEST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
_COPY = "copy or download the file again"


def check_file(path: Path) -> None:
    """Raises ModelError where a file's header is not what the file can hold.

    Raises:
        ModelError: cut off, not GGUF, absurd counts or lengths, a tensor outside the file or over
            another one, or of a type that is not known.
    """
    try:
        size = path.stat().st_size
        if size < _SMALLEST:
            raise _Broken("it is cut off", f"{size} bytes", _COPY)
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            _Header(data, size).check()
    except OSError as error:
        raise ModelError("The file cannot be read.", where=path, found=str(error)) from error
    except _Broken as error:
        raise ModelError(f"The GGUF file is broken: {error.reason}.", where=path,
                         found=error.found, fix=error.fix) from None  # fmt: skip


class _Broken(Exception):
    def __init__(self, reason: str, found: object, fix: str | None = None) -> None:
        self.reason, self.found, self.fix = reason, str(found)[:120], fix
        super().__init__(reason)


class _Header:
    """A position in a file's bytes, and what may be read from there."""

    def __init__(self, data: Any, size: int) -> None:
        self.data, self.size, self.at = data, size, 0
        self.alignment = _ALIGNMENT

    def check(self) -> None:
        """Goes through the whole header."""
        if bytes(self.data[:4]) != _MAGIC:
            raise _Broken("it does not begin as one", repr(bytes(self.data[:4])))
        self.at = 4
        (version,) = self.take("<I")
        if version not in _VERSIONS:
            raise _Broken("its version is not known", version, "a little-endian file, version 3")
        tensors, values = self.take("<QQ")
        left = self.size - self.at
        if tensors * _SMALLEST_TENSOR + values * _SMALLEST_VALUE > left:
            raise _Broken("it names more tensors and settings than fit", f"{tensors} tensors, "
                          f"{values} settings in {left} bytes", _COPY)  # fmt: skip
        keys = {self.setting() for _ in range(values)}
        if len(keys) != values:
            raise _Broken("it has two settings of one name", f"{values - len(keys)} of {values}")
        if b"general.architecture" not in keys:
            raise _Broken("it names no architecture", f"{values} settings")
        places = [self.tensor() for _ in range(tensors)]
        self.check_places(places)

    def take(self, format: str) -> tuple[int, ...]:
        """Numbers at this position."""
        self.skip(struct.calcsize(format))
        return struct.unpack_from(format, self.data, self.at - struct.calcsize(format))

    def skip(self, count: int) -> None:
        """Goes on, if the file does."""
        if count > self.size - self.at:
            raise _Broken("it is cut off, or a length in it is absurd",
                          f"{count} bytes at {self.at} of {self.size}", _COPY)  # fmt: skip
        self.at += count

    def text(self, longest: int | None = None) -> bytes:
        """A name."""
        (length,) = self.take("<Q")
        if longest is not None and length > longest:
            raise _Broken("a name in it is absurdly long", f"{length} bytes at {self.at}", _COPY)
        self.skip(length)
        return bytes(self.data[self.at - length : self.at])

    def setting(self) -> bytes:
        """One key and its value; returns the key."""
        key = self.text(_KEY_BYTES)
        (kind,) = self.take("<I")
        if key == b"general.alignment":
            self.align(kind)
        elif kind == _ARRAY:
            self.array(key)
        else:
            self.value(kind, key, 1)
        return key

    def array(self, key: bytes) -> None:
        kind, count = *self.take("<I"), *self.take("<Q")
        if kind == _STRING and count * 8 > self.size - self.at:
            raise _Broken("a list in it is longer than the file", f"{_shown(key)}: {count}", _COPY)
        self.value(kind, key, count)

    def value(self, kind: int, key: bytes, count: int) -> None:
        if kind == _STRING:
            for _ in range(count):
                (length,) = self.take("<Q")
                self.skip(length)
        elif kind in _SIZES:
            self.skip(count * _SIZES[kind])
        else:
            raise _Broken("a setting has a type that is not known", f"{_shown(key)}: {kind}")

    def align(self, kind: int) -> None:
        (value,) = self.take("<I")
        whole = kind == _UINT32 and 0 < value <= _LARGEST_ALIGNMENT and value & (value - 1) == 0
        if not whole:
            raise _Broken("its alignment is no power of two", value)
        self.alignment = value

    def tensor(self) -> tuple[int, int, bytes]:
        """One tensor's first byte, its number of bytes, and its name."""
        import gguf

        name = self.text(_KEY_BYTES)
        (axes,) = self.take("<I")
        if not 0 < axes <= _AXES:
            raise _Broken("a tensor has an absurd number of axes", f"{_shown(name)}: {axes}")
        shape = self.take(f"<{axes}Q")
        (kind,) = self.take("<I")
        (offset,) = self.take("<Q")
        known = {int(number): sizes for number, sizes in gguf.GGML_QUANT_SIZES.items()}
        if kind not in known:
            raise _Broken("a tensor has a type that is not known", f"{_shown(name)}: {kind}")
        block, stored = known[kind]
        if shape[0] % block or not all(shape):
            raise _Broken("a tensor's shape does not fit its type", f"{_shown(name)}: {shape}")
        if offset % self.alignment:
            raise _Broken("a tensor lies off the file's alignment", f"{_shown(name)}: {offset}")
        return offset, math.prod(shape) // block * stored, name

    def check_places(self, places: list[tuple[int, int, bytes]]) -> None:
        """Within the file, and none over another."""
        if len({name for _, _, name in places}) != len(places):
            raise _Broken("it has two tensors of one name", f"{len(places)} tensors")
        begin = -(-self.at // self.alignment) * self.alignment
        before, free = b"", 0
        for offset, size, name in sorted(places):
            if begin + offset + size > self.size:
                raise _Broken(
                    "it is cut off, or a tensor lies outside it",
                    f"{_shown(name)}: to byte {begin + offset + size} of {self.size}", _COPY,
                )  # fmt: skip
            if offset < free:
                raise _Broken("two tensors lie over one another",
                              f"{_shown(before)}, {_shown(name)}")  # fmt: skip
            before, free = name, offset + size


def _shown(name: bytes) -> str:
    return name[:60].decode("utf-8", "replace")
