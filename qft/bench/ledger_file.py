"""The ledger's file: appended to by several processes, numbered, bounded, read back."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qft import hardware
from qft.bench.scrubbing import scrubbed
from qft.files import json_ready

LIMIT_BYTES = 8 * 2**20
VALUE_LIMIT = 8192  # characters of one value of a record; a longer one is left out
WAIT_SECONDS = 5.0  # for a lock
_TAIL = 1 << 16
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

Record = dict[str, Any]


def append(fields: Record, path: Path) -> Record:
    """Appends a record, numbered after the one before it.

    Returns:
        The record as it was written: without folders, secrets and what is too long.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    if "device" in fields and "device_name" not in fields:
        fields = {**fields, "device_name": hardware.device_name(str(fields["device"]))}
    kept = _bounded(json_ready(scrubbed(fields)))
    kept.pop("number", None)  # of another ledger
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with _locked(path) as descriptor:
            size = os.fstat(descriptor).st_size
            number = 1 + (_last_number(path) or _last_number(former(path)))
            written = {"number": number, **kept}
            line = (json.dumps(written, ensure_ascii=False) + "\n").encode()
            if size and size + len(line) > LIMIT_BYTES:
                os.replace(path, former(path))
                continue
            _write(descriptor, line, size)
            return written


def former(path: Path) -> Path:
    """Where older records are."""
    return path.with_name(f"{path.name}.1")


def _bounded(fields: Record) -> Record:
    """Without values that are too long: a strategy may list thousands of modules."""
    return {
        key: value
        for key, value in fields.items()
        if len(json.dumps(value, ensure_ascii=False, default=str)) <= VALUE_LIMIT
    }


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file, open to append, this process alone at it; it is the one that has the name now."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    until = time.monotonic() + WAIT_SECONDS
    while True:
        descriptor = os.open(path, flags, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "not an ordinary file")
            _lock(descriptor, until)
            if _is_still(path, descriptor):
                yield descriptor
                return
        finally:
            os.close(descriptor)  # which gives the lock back


def _lock(descriptor: int, until: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise TimeoutError(errno.ETIMEDOUT, "another process holds the ledger") from None
            time.sleep(0.01)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return  # a file system without locks: one short write has to do


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether nobody has renamed the file since it was opened."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write(descriptor: int, line: bytes, size: int) -> None:
    """One write; a half-written line of a process that died before gets an end first."""
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        line = b"\n" + line
    written = os.write(descriptor, line)
    if written != len(line):
        os.ftruncate(descriptor, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _last_number(path: Path) -> int:
    """The number of a file's last record; 0 without any."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            for length in (min(_TAIL, size), size):
                stream.seek(size - length)
                for line in reversed(stream.read(length).splitlines()):
                    number = (_parsed(line) or {}).get("number")
                    if isinstance(number, int) and not isinstance(number, bool):
                        return number
    except FileNotFoundError:
        pass
    return 0


def _parsed(line: bytes | str) -> Record | None:
    """A line's record, if it is one."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if is_record(value) else None


def is_record(value: Any) -> bool:
    """Whether this is a record; all else of one may be missing."""
    return isinstance(value, dict) and isinstance(value.get("verb"), str)


def read(path: Path) -> tuple[list[Record], int]:
    """All records of a ledger, the oldest first, and how many lines are none.

    Raises:
        OSError: it is there and cannot be read.
    """
    found: list[Record] = []
    broken = 0
    for file in (former(path), path):
        with contextlib.suppress(FileNotFoundError), file.open("rb") as stream:
            for line in stream:
                if not line.strip():
                    continue
                one = _parsed(line)
                if one is None:
                    broken += 1
                else:
                    found.append(one)
    return found, broken
