"""The ledger: one line of JSON a command, in one file of the user's.

    $XDG_STATE_HOME/qft/ledger.jsonl, most often ~/.local/state/qft/ledger.jsonl
    QFT_LEDGER=FILE or --ledger FILE    another file
    QFT_LEDGER=off or --ledger off      none

A record is appended by one write under a lock, so that several processes may end at once. Past
`LIMIT_BYTES` the file becomes `ledger.jsonl.1`, in place of the one before. A ledger that cannot
be written costs a note, never a command.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import secrets
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qft import hardware
from qft.bench import facts
from qft.bench.scrubbing import scrubbed
from qft.errors import QftError, first_line, printable
from qft.files import folder_bytes, json_ready

if TYPE_CHECKING:
    from qft.recipe import Recipe

VARIABLE = "QFT_LEDGER"
OFF = "off"
FORMAT = 1
LIMIT_BYTES = 8 * 2**20
VALUE_LIMIT = 8192  # characters of one value of a record; a longer one is left out
WAIT_SECONDS = 5.0  # for a lock
_TAIL = 1 << 16
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

Record = dict[str, Any]


def ledger_path(chosen: Path | str | None = None) -> Path | None:
    """The file records go to, or None where the ledger is off.

    Args:
        chosen: as `--ledger` has it; else the variable `QFT_LEDGER`, else the usual place.
    """
    word = str(chosen) if chosen else os.environ.get(VARIABLE, "")
    if word.lower() == OFF:
        return None
    if word:
        return Path(os.path.expanduser(word))
    state = os.environ.get("XDG_STATE_HOME", "")
    root = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return root / "qft" / "ledger.jsonl"


def record(
    verb: str,
    result: Mapping[str, Any] | None = None,
    *,
    ledger: Path | str | None = None,
    recipe: Recipe | None = None,
    **more: Any,
) -> Record | None:
    """Appends a record of what was done by the Python API, which keeps none of itself.

    Args:
        verb: as on the command line: ``train``, ``eval``, ….
        result: what that function returned: of `train` its `report`.
        ledger: see `ledger_path`.
        recipe: the one that was followed.
        more: facts by name, for example ``seconds=12.5``; they win.

    Returns:
        The record as it was written, or None where the ledger is off.

    Raises:
        OSError: the ledger cannot be written.
    """
    path = ledger_path(ledger)
    if path is None:
        return None
    of_recipe = facts.of_recipe(recipe) if recipe is not None else {}
    return append({**_here(verb), **of_recipe, **_of_result(verb, result), **more}, path)


@dataclass
class Recording:
    """A verb at work: what it has told so far of what its record will hold.

    Attributes:
        result: what the verb prints.
        recipe: what it follows.
        written: the file or folder it made, whose size counts.
        kept: False leaves no record.
    """

    verb: str
    noted: Record = field(default_factory=dict)
    result: Any = None
    recipe: Recipe | None = None
    written: Path | None = None
    kept: bool = True


_CURRENT: ContextVar[Recording | None] = ContextVar("qft_recording", default=None)


def current() -> Recording | None:
    """The verb that is being recorded, if there is one."""
    return _CURRENT.get()


@contextlib.contextmanager
def recording(
    verb: str, noted: Record | None = None, ledger: Path | str | None = None
) -> Iterator[Recording]:
    """Within it a verb works; afterwards, however it ended, its record is in the ledger.

    Args:
        verb: as on the command line.
        noted: what is known of it before.
        ledger: see `ledger_path`.
    """
    path = ledger_path(ledger)
    open_one = Recording(verb, dict(noted or {}))
    if path is None:
        yield open_one
        return
    token = _CURRENT.set(open_one)
    began, cpu_began = time.monotonic(), _cpu_seconds()
    ended: BaseException | None = None
    try:
        yield open_one
    except BaseException as error:
        ended = error
        raise
    finally:
        _CURRENT.reset(token)
        if open_one.kept:
            spent = {"seconds": time.monotonic() - began, "cpu_seconds": _cpu_seconds() - cpu_began}
            _close(open_one, ended, spent, path)


def _close(done: Recording, ended: BaseException | None, spent: Record, path: Path) -> None:
    """Writes the record; whatever goes wrong with that is a note."""
    try:
        append({**_here(done.verb), **done.noted, **_told(done, ended), **_end(ended), **spent},
               path)  # fmt: skip
    except Exception as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else (
            f"{type(error).__name__}: {first_line(error)}")  # fmt: skip
        print(f"note: the ledger was not written: {printable(why)}; {VARIABLE}=off switches it off",
              file=sys.stderr)  # fmt: skip


def _told(done: Recording, ended: BaseException | None) -> Record:
    """What recipe and result say; of a verb that failed, what its recipe says."""
    told: Record = {}
    if done.recipe is not None:
        told |= facts.of_recipe(done.recipe)
    if ended is not None:
        return told
    told |= _of_result(done.verb, done.result)
    if done.written is not None and "file_bytes" not in told:
        told |= _size_of(done.written)
    return told


def _of_result(verb: str, result: Any) -> Record:
    """What a result says; the versions are this process's."""
    return {k: v for k, v in facts.of_result(verb, result).items() if k != "versions"}


def _size_of(place: Path) -> Record:
    """Bytes of a file, or of all of a folder; nothing of what is not there, as a hub's model."""
    if place.is_dir():
        return {"file_bytes": folder_bytes(place)}
    return {"file_bytes": place.stat().st_size} if place.is_file() else {}


def _end(ended: BaseException | None) -> Record:
    """The exit status of a command that ends like this; the error's kind alone, not its words."""
    if ended is None:
        return {"exit_status": 0}
    if isinstance(ended, KeyboardInterrupt):
        return {"exit_status": 130, "error": "KeyboardInterrupt"}
    if isinstance(ended, SystemExit):
        code = ended.code
        return {"exit_status": code if isinstance(code, int) else int(code is not None)}
    code = getattr(ended, "exit_code", 1)
    status = code if isinstance(code, int) else 1
    named = isinstance(ended, QftError) or status != 0
    return {"exit_status": status, **({"error": type(ended).__name__} if named else {})}


def _cpu_seconds() -> float:
    """Of this process, all threads, and of those it has started."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _here(verb: str) -> Record:
    """What is true of any command that ends in this process now."""
    known: Record = {
        "format": FORMAT,
        "id": f"r{secrets.token_hex(4)}",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "verb": verb,
        "versions": hardware.versions(),
        "process_peak_resident_bytes": hardware.peak_resident_bytes(),
    }
    torch: Any = sys.modules.get("torch")  # a verb that does not need it does not pay for it
    if torch is None:
        return known
    cuda = torch.cuda.is_available()
    known |= {"device": "cuda" if cuda else "cpu", "threads": torch.get_num_threads()}
    if cuda and torch.cuda.is_initialized():
        known |= {"process_peak_allocated_bytes": torch.cuda.max_memory_allocated(),
                  "process_peak_reserved_bytes": torch.cuda.max_memory_reserved()}  # fmt: skip
    return known


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
