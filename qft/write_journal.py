"""How far a checkpoint has been written, so that a write that was killed goes on where it was.

A line of the journal says that a file's first bytes are on the disk, and what their hash is. What
follows them when the write goes on is made again; what they are is checked, not believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qft.files import write_text

FILE = "journal.jsonl"
_EVERY_BYTES = 64 * 2**20  # written between two lines
_BLOCK = 1 << 20


class WriteJournal:
    """The journal of one folder that is being written.

    Args:
        folder: holds the files and the journal.
        identity: everything that decides the files' bytes; a folder that was begun with another
            is emptied.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._path = folder / FILE
        self._done = self._read(identity)
        if not self._done:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_text(self._path, json.dumps({"identity": identity}) + "\n")

    def _read(self, identity: str) -> dict[str, Any]:
        """The last line about each file, and the first one; nothing where it is another's."""
        found: dict[str, Any] = {}
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
            if json.loads(lines[0]) != {"identity": identity}:
                return {}
            found["identity"] = identity
        except (OSError, ValueError, IndexError):
            return {}
        for line in lines[1:]:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off by the kill
                values = json.loads(line)
                found[values["file"]] = (int(values["bytes"]), str(values["sha256"]))
        return found

    @contextlib.contextmanager
    def file(self, path: Path) -> Iterator[JournalledFile]:
        """A file to append to; it holds already what was on the disk for sure."""
        kept, digest = self._kept(path)
        with path.open("r+b" if kept else "wb") as stream:
            stream.truncate(kept)
            stream.seek(kept)
            yield JournalledFile(self._path, path.name, stream, kept, digest)

    def _kept(self, path: Path) -> tuple[int, Any]:
        """How many of the file's first bytes are as they were written, and their running hash."""
        size, wanted = self._done.get(path.name, (0, ""))
        digest = hashlib.sha256()
        if not size or not path.is_file() or path.stat().st_size < size:
            return 0, hashlib.sha256()
        left = size
        with path.open("rb") as stream:
            while left:
                block = stream.read(min(left, _BLOCK))
                digest.update(block)
                left -= len(block)
        return (size, digest) if digest.hexdigest() == wanted else (0, hashlib.sha256())

    def close(self) -> None:
        """Removes the journal: the folder is complete."""
        self._path.unlink()


class JournalledFile:
    """One file, written in order.

    Attributes:
        kept: bytes that were there already.
    """

    def __init__(self, journal: Path, name: str, stream: BinaryIO, kept: int, digest: Any) -> None:
        self._journal, self._name, self._stream, self._digest = journal, name, stream, digest
        self.kept = kept
        self._written = self._noted = kept

    def write(self, data: Any) -> None:
        """Appends bytes."""
        self._stream.write(data)
        self._digest.update(data)
        self._written += len(data)

    def note(self) -> None:
        """Says that what was written so far may be relied on; seldom enough to cost nothing."""
        if self._written - self._noted < _EVERY_BYTES:
            return
        self._stream.flush()
        os.fsync(self._stream.fileno())
        line = {"file": self._name, "bytes": self._written, "sha256": self._digest.hexdigest()}
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self._noted = self._written
