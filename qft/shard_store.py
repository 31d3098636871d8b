"""A cache of tensors on disk: complete shards under one identity.

ROOT/
  3f8a…/                 named by its identity: everything that decides the numbers in it
    identity.json        that identity in words, to say what has changed
    lock                 held while somebody writes or reads here
    00000/               a shard: there and whole, or not there
      ….safetensors
      manifest.json      size and SHA-256

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, ClassVar, Literal

from torch import Tensor

from qft.files import (
    manifest_problem,
    new_folder,
    read_json,
    remove_unfinished,
    write_json,
    write_manifest,
)

IDENTITY = "identity.json"
_LOCK = "lock"


def shard_ranges(sizes: Iterable[int], bound: int) -> list[range]:
    """The positions of each shard's samples: as many as stay within ``bound`` bytes, or one.

    Args:
        sizes: bytes of each sample, in the order in which they are stored.
    """
    found, start, held, count = [], 0, 0, 0
    for position, size in enumerate(sizes):
        if position > start and held + size > bound:
            found.append(range(start, position))
            start, held = position, 0
        held += size
        count = position + 1
    return [*found, range(start, count)]


class ShardStore:
    """The shards of one identity; what is in a shard, a subclass knows.

    Args:
        root: the folder of all caches.
        identity: what decides the tensors' values, by name.
        shards: the positions of each shard's samples; they follow from the identity.
    """

    file: ClassVar[str]  # a shard's only one beside its manifest

    def __init__(self, root: Path, identity: Mapping[str, str], shards: Sequence[range]) -> None:
        text = json.dumps(dict(identity), sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.root, self.identity, self.shards = root, dict(identity), list(shards)
        self.folder = root / self.key
        self._lock: IO[str] | None = None
        self._missing: list[int] | None = None  # reading every byte is done once

    def fits(self, number: int, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a shard's tensors are of the names, shapes and types that belong there."""
        raise NotImplementedError

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there, or not as they were written."""
        if self._missing is None:
            self._missing = [number for number in range(len(self.shards)) if self._problem(number)]
        return list(self._missing)

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
            if not (self.folder / IDENTITY).is_file():
                write_json(self.folder / IDENTITY, self.identity)
            remove_unfinished(self.folder)
        else:
            self._missing = None  # the other may have written since
        os.utime(self.folder / IDENTITY)  # when it was last of use
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

    def write_tensors(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes a shard; it is there as a whole or not at all.

        Args:
            tensors: on the CPU.

        Raises:
            SaveError: the disk is full or not writable.
        """
        from safetensors.torch import save_file

        ready = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with new_folder(self._shard(number), overwrite=True) as temporary:
            save_file(ready, temporary / self.file, self._marks(number))
            write_manifest(temporary)
        self._missing = [other for other in self.missing() if other != number]

    def tensors(self, number: int) -> dict[str, Tensor]:
        """A shard's tensors, mapped into memory; it must be there."""
        from safetensors.torch import load_file

        return load_file(self._shard(number) / self.file)

    def _shard(self, number: int) -> Path:
        return self.folder / f"{number:05d}"

    def _marks(self, number: int) -> dict[str, str]:
        return {"shard": f"{self.key}/{number}"}

    def _problem(self, number: int) -> str | None:
        from safetensors import SafetensorError, safe_open

        problem = manifest_problem(self._shard(number))
        if problem is not None:
            return problem
        try:
            with safe_open(self._shard(number) / self.file, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                same = file.metadata() == self._marks(number)
        except (SafetensorError, OSError) as error:
            return str(error)
        return None if same and self.fits(number, tensors) else "it belongs to another cache"


def identities(root: Path) -> dict[Path, dict[str, str]]:
    """The caches below ``root`` that say what they were made with, by folder."""
    found: dict[Path, dict[str, str]] = {}
    for path in sorted(root.glob(f"*/{IDENTITY}")):
        with contextlib.suppress(OSError, ValueError):
            values = read_json(path)
            if isinstance(values, dict):
                found[path.parent] = values
    return found


def differences(root: Path, identity: Mapping[str, str]) -> list[str]:
    """In what the most alike of the caches there are differs; empty where there is none.

    What is named by other things is a cache of another sort, and is not compared.
    """
    found = [
        [name for name in identity if other[name] != identity[name]]
        for other in identities(root).values()
        if other.keys() == identity.keys()
    ]
    return min(found, key=len, default=[])


def make_room(root: Path, needed_bytes: int, bound: int, keep: Sequence[str]) -> int:
    """Removes caches that nobody uses, the longest unused first, until ``bound`` is kept.

    Args:
        needed_bytes: what will be written, and what is kept of it already.
        keep: keys of caches that stay and count among ``needed_bytes``.

    Returns:
        Bytes of other caches that are still there.
    """
    others = [p for p in root.glob(f"*/{IDENTITY}") if p.parent.name not in keep]
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
