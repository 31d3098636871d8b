"""The ledger: one line of JSON a command, in one file of the user's.

    $XDG_STATE_HOME/qft/ledger.jsonl, most often ~/.local/state/qft/ledger.jsonl
    QFT_LEDGER=FILE or --ledger FILE    another file
    QFT_LEDGER=off or --ledger off      none

A record is appended by one write under a lock, so that several processes may end at once. When it
has grown too long the file becomes `ledger.jsonl.1`, in place of the one before
(`qft.bench.ledger_file`). A ledger that cannot be written costs a note, never a command.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
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
from qft.bench.ledger_file import Record, append
from qft.errors import QftError, first_line, printable
from qft.files import folder_bytes

if TYPE_CHECKING:
    from qft.recipe import Recipe

VARIABLE = "QFT_LEDGER"
OFF = "off"
FORMAT = 1


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
    """What recipe and result say; of a verb that failed before it had one, what its recipe says."""
    told: Record = {}
    if done.recipe is not None:
        told |= facts.of_recipe(done.recipe)
    if ended is not None and done.result is None:
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
