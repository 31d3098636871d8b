"""A frozen trunk's output for a set of samples, on disk: complete shards under one identity.

feature-cache/
  3f8a…/                 named by its identity: everything that decides the numbers in it
    identity.json        that identity in words, to say what has changed
    lock                 held while somebody writes or reads here
    00000/               a shard: there and whole, or not there
      features.safetensors   `rows` of its samples, one after another: [tokens, width]
      manifest.json          size and SHA-256

A cache made for anything else has another name, so that a stale one is never read. A shard that was
cut off has no name yet; one that was damaged since is made anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import torch
from torch import Tensor

from qft.files import (
    manifest_problem,
    new_folder,
    read_json,
    remove_unfinished,
    write_json,
    write_manifest,
)

SHARD_BYTES = 64 * 2**20  # what a kill can cost at most
_IDENTITY, _LOCK, _FILE, _ROWS = "identity.json", "lock", "features.safetensors", "rows"


@dataclass(frozen=True)
class Rows:
    """Which rows a store holds.

    Attributes:
        samples: the samples' numbers in the order in which they are stored, each once.
        lengths: rows of each.
        width: numbers a row.
        dtype: of the rows.
    """

    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    width: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of all rows."""
        return sum(self.lengths) * self.width * self.dtype.itemsize

    def shards(self) -> list[range]:
        """The positions of each shard's samples."""
        found, start, held = [], 0, 0
        for position, length in enumerate(self.lengths):
            size = length * self.width * self.dtype.itemsize
            if position > start and held + size > SHARD_BYTES:
                found.append(range(start, position))
                start, held = position, 0
            held += size
        return [*found, range(start, len(self.samples))]


class FeatureStore:
    """The shards of one identity.

    Args:
        root: the folder of all caches.
        identity: what decides the rows' values, by name.
        rows: which rows there are to be; part of what the identity must tell.
    """

    def __init__(self, root: Path, identity: Mapping[str, str], rows: Rows) -> None:
        text = json.dumps(dict(identity), sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.root, self.identity, self.rows = root, dict(identity), rows
        self.folder = root / self.key
        self._lock: IO[str] | None = None
        self._missing: list[int] | None = None  # reading every byte is done once

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there, or not as they were written."""
        if self._missing is None:
            shards = enumerate(self.rows.shards())
            self._missing = [number for number, part in shards if self._problem(number, part)]
        return list(self._missing)

    def bytes_missing(self) -> int:
        """Bytes of the rows that are still to be written."""
        row, shards = self.rows.width * self.rows.dtype.itemsize, self.rows.shards()
        parts = [shards[number] for number in self.missing()]
        return sum(sum(self.rows.lengths[part.start : part.stop]) * row for part in parts)

    def lock(self) -> Literal["write", "read", "no"]:
        """Takes hold of the folder, so that no other run writes in it or removes it.

        Returns:
            What may be done here: where another run reads, no more; where it writes, nothing.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder, fcntl.LOCK_EX)
        alone = self._lock is not None
        self._lock = self._lock or _locked(self.folder, fcntl.LOCK_SH)
        if self._lock is None:
            return "no"
        if alone:
            if not (self.folder / _IDENTITY).is_file():
                write_json(self.folder / _IDENTITY, self.identity)
            remove_unfinished(self.folder)
        else:
            self._missing = None  # the other may have written since
        os.utime(self.folder / _IDENTITY)  # when it was last of use
        return "write" if alone else "read"

    def share(self) -> None:
        """From now on others may read here too; nobody may write or remove."""
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_SH)

    def release(self) -> None:
        """Lets go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write(self, number: int, rows: Tensor) -> None:
        """Writes a shard; it is there as a whole or not at all.

        Args:
            rows: ``[tokens, width]`` of its samples, on the CPU.

        Raises:
            SaveError: the disk is full or not writable.
        """
        from safetensors.torch import save_file

        with new_folder(self._shard(number), overwrite=True) as temporary:
            save_file({_ROWS: rows.contiguous()}, temporary / _FILE, self._marks(number))
            write_manifest(temporary)
        self._missing = [other for other in self.missing() if other != number]

    def open(self) -> FeatureReader:
        """The rows, mapped into memory; every shard must be there."""
        from safetensors.torch import load_file

        shards = self.rows.shards()
        parts = [load_file(self._shard(n) / _FILE)[_ROWS] for n in range(len(shards))]
        return FeatureReader(self.rows, shards, parts)

    def _shard(self, number: int) -> Path:
        return self.folder / f"{number:05d}"

    def _marks(self, number: int) -> dict[str, str]:
        return {"shard": f"{self.key}/{number}"}

    def _problem(self, number: int, part: range) -> str | None:
        from safetensors import SafetensorError, safe_open

        problem = manifest_problem(self._shard(number))
        if problem is not None:
            return problem
        shape = [sum(self.rows.lengths[part.start : part.stop]), self.rows.width]
        try:
            with safe_open(self._shard(number) / _FILE, "pt") as file:
                rows = file.get_tensor(_ROWS)
                same = file.metadata() == self._marks(number)
        except (SafetensorError, OSError) as error:
            return str(error)
        same = same and list(rows.shape) == shape and rows.dtype == self.rows.dtype
        return None if same else "it belongs to another cache"


class FeatureReader:
    """Rows by their sample's number, out of files that are mapped into memory."""

    def __init__(self, rows: Rows, shards: Sequence[range], parts: Sequence[Tensor]) -> None:
        self._places: dict[int, tuple[Tensor, int, int]] = {}
        for part, tensor in zip(shards, parts, strict=True):
            start = 0
            for position in part:
                length = rows.lengths[position]
                self._places[rows.samples[position]] = (tensor, start, length)
                start += length

    def __call__(self, samples: Sequence[int]) -> Tensor:
        """The samples' rows, one after another: ``[tokens, width]``."""
        places = [self._places[sample] for sample in samples]
        return torch.cat([tensor[start : start + length] for tensor, start, length in places])


def differences(root: Path, identity: Mapping[str, str]) -> list[str]:
    """In what the most alike of the caches there are differs; empty where there is none."""
    found: list[list[str]] = []
    for path in root.glob(f"*/{_IDENTITY}"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            other = read_json(path)
            found.append([name for name in identity if other.get(name) != identity[name]])
    return min(found, key=len, default=[])


def make_room(root: Path, needed_bytes: int, bound: int, keep: Sequence[str]) -> int:
    """Removes caches that nobody uses, the longest unused first, until ``bound`` is kept.

    Args:
        needed_bytes: what will be written, and what is kept of it already.
        keep: keys of caches that stay and count among ``needed_bytes``.

    Returns:
        Bytes of other caches that are still there.
    """
    others = [p for p in root.glob(f"*/{_IDENTITY}") if p.parent.name not in keep]
    others.sort(key=lambda path: path.stat().st_mtime)
    sizes = {path.parent: _size(path.parent) for path in others}
    for folder in list(sizes):
        if needed_bytes + sum(sizes.values()) <= bound:
            break
        with _held(folder) as free:
            if free:
                shutil.rmtree(folder, ignore_errors=True)
                del sizes[folder]
    return sum(sizes.values())


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    lock = _locked(folder, fcntl.LOCK_EX)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.close()


def _locked(folder: Path, kind: int) -> IO[str] | None:
    """The folder's lock, which the system lets go of when the process ends; None if it is taken."""
    stream = (folder / _LOCK).open("a", encoding="utf-8")
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        return None
    return stream


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
