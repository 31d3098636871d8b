"""Atomic writes: a temporary name, a manifest of sizes and hashes, fsync, rename.

A folder that carries its final name is complete. Whatever is interrupted leaves only a folder whose
name starts with a dot, which the next write to the same place removes, or puts back where it is the
former folder of a replacement that was cut off between its two renames.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qft.errors import OutputExistsError, SaveError

MANIFEST = "manifest.json"
_TEMPORARY = ".unfinished-"
_NO_PLACE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG, errno.EBUSY, errno.EINVAL, errno.EIO, errno.ESTALE,
)  # fmt: skip
_FORMER = f"{_TEMPORARY}former-"


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's write errors into one clear :class:`SaveError`."""
    try:
        yield
    except Exception as error:
        number = _system_error_number(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise SaveError(
                "The disk is full.",
                where=path,
                found=f"{free_disk_bytes(path) / 2**20:.0f} MiB free",
                fix="free some space or choose another folder; nothing that existed was changed",
            ) from error
        if number in _NO_PLACE:
            raise SaveError(
                "This place cannot be written to.",
                where=path,
                found=os.strerror(number),
                fix="choose another folder; nothing that existed was changed",
            ) from error
        raise


def _system_error_number(error: Exception) -> int | None:
    """errno, which safetensors and tokenizers (written in Rust) tell in their text only."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told.group(1)) if told else None


def free_disk_bytes(path: Path) -> int:
    """Free bytes on the disk that holds ``path`` or will hold it."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def require_disk(path: Path, needed_bytes: int) -> None:
    """Refuses a write that cannot succeed before it begins.

    Raises:
        SaveError: fewer than ``needed_bytes`` are free.
    """
    free = free_disk_bytes(path)
    if free < needed_bytes:
        raise SaveError(
            "The disk has not enough room for what is to be written.",
            where=path,
            found=f"{free / 2**20:.0f} MiB free, {needed_bytes / 2**20:.0f} MiB needed",
            fix="free some space or choose another folder",
        )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def require_absent(path: Path, *, overwrite: bool = False) -> None:
    """Refuses to write over what exists.

    Raises:
        OutputExistsError: ``path`` is there (an empty folder does not count).
    """
    taken = path.is_symlink() or path.exists()
    if taken and path.is_dir() and not any(path.iterdir()):
        taken = False
    if taken and not overwrite:
        raise OutputExistsError(
            "The output exists already, and nothing is overwritten unasked.",
            where=path,
            fix="choose another name, or add --overwrite",
        )


def require_apart(out: Path, *sources: Path) -> None:
    """Refuses an output that is, holds, or lies in what it is made from.

    Raises:
        OutputExistsError: replacing the output would destroy a source.
    """
    target = out.resolve()
    for source in sources:
        read = source.resolve()
        if target == read or target in read.parents or read in target.parents:
            raise OutputExistsError(
                "The output and what it is made from must be apart.",
                where=out,
                found=f"it is made from {source}",
                fix="choose a folder of its own",
            )


@contextlib.contextmanager
def new_folder(path: Path | str, *, overwrite: bool = False, go_on: bool = False) -> Iterator[Path]:
    """A folder to write into that gets its name only when all of it is on the disk.

    Args:
        path: the final name.
        overwrite: replace what has this name; it stays whole until the new folder is complete.
        go_on: what a write that was killed or interrupted has left under the temporary name is
            still there, for a writer that can tell how far it is good
            (:class:`qft.write_journal.WriteJournal`).

    Raises:
        OutputExistsError: the name is taken and ``overwrite`` is off.
        SaveError: the disk is full or not writable.
    """
    path = Path(path)
    restore_former(path)
    require_absent(path, overwrite=overwrite)
    temporary = unfinished(path)
    with explain_write_errors(path):
        try:
            if not go_on:
                shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True, exist_ok=go_on)
            yield temporary
            sync_tree(temporary)
            replace_folder(temporary, path)
        except BaseException as error:
            if not (go_on and isinstance(error, KeyboardInterrupt)):
                shutil.rmtree(temporary, ignore_errors=True)
            raise


def unfinished(path: Path) -> Path:
    """What a folder is called until it is complete."""
    return path.parent / f"{_TEMPORARY}{path.name}"


def replace_folder(temporary: Path, path: Path) -> None:
    """Renames, with the former folder out of the way first (rename cannot replace a full one)."""
    former = path.parent / f"{_FORMER}{path.name}"
    _remove(former)
    if os.path.lexists(path):
        os.rename(path, former)
    try:
        os.rename(temporary, path)
    except BaseException:
        restore_former(path)
        raise
    _sync_path(path.parent)
    _remove(former)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def restore_former(path: Path) -> None:
    """Puts a replaced folder back if the process died before the new one took its name."""
    former = path.parent / f"{_FORMER}{path.name}"
    if os.path.lexists(former) and not os.path.lexists(path):
        os.rename(former, path)


def remove_unfinished(folder: Path) -> list[str]:
    """Removes what interrupted writes left in ``folder``; returns the names."""
    for former in folder.glob(f"{_FORMER}*"):
        restore_former(folder / former.name.removeprefix(_FORMER))
    left = [p for p in folder.glob(f"{_TEMPORARY}*") if p.is_dir()] if folder.is_dir() else []
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in left)


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically: the old content or the new, never half of one."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    with explain_write_errors(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            _sync_path(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(json_ready(value), indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Writes a JSON value a line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def json_ready(value: Any) -> Any:
    """The value with null for what JSON has no number for: NaN and the infinities."""
    if isinstance(value, Mapping):
        return {key: json_ready(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Reads a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """Notes size and hash of every file in ``folder``, so that completeness can be checked."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    entries = {
        p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": file_hash(p)}
        for p in files
    }
    write_json(folder / MANIFEST, {"files": entries})


def manifest_problem(folder: Path) -> str | None:
    """Why ``folder`` is not complete, or None if every file is as the manifest says."""
    try:
        entries = read_json(folder / MANIFEST)["files"]
        for name, entry in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {entry['bytes']} were written"
            if file_hash(path) != entry["sha256"]:
                return f"{name} has changed since it was written"
    except FileNotFoundError:
        return "it has no manifest"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    return None


def sync_tree(folder: Path) -> None:
    """Forces every file and folder below ``folder`` onto the disk."""
    for path in sorted(folder.rglob("*")):
        _sync_path(path)
    _sync_path(folder)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
