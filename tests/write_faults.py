"""Faults for tests of writers: kills at every moment of a file's life, and disks that are full."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qft import write_journal
from qft.errors import SaveError

Usage = namedtuple("Usage", "total used free")  # what shutil.disk_usage tells


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}  # fmt: skip


class Moments:
    """Counts what happens to files, and does something at a chosen one."""

    def __init__(self, monkeypatch, folder: Path, at: int, act: Callable[[], None]) -> None:
        self.count, self._at, self._act, self._folder = 0, at, act, str(folder)
        plain = write_journal.JournalledFile.write

        def write(file, data):
            self.tick()
            plain(file, data)

        monkeypatch.setattr(write_journal.JournalledFile, "write", write)
        sys.addaudithook(self._heard)  # for as long as the process lives: only in a child's

    def tick(self) -> None:
        self.count += 1
        if self.count == self._at:
            self._act()

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.chmod") and (
            self._folder in str(arguments[0])
        ):
            self.tick()


def in_a_child(work: Callable[[], int]) -> int:
    """Runs in a forked process; its exit code, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            torch.set_num_threads(1)
            code = work()
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def counted_in_a_child(folder: Path, told: Path, monkeypatch: Any, work: Callable[[], int]) -> int:
    """How many moments a whole run has in ``folder``, told through a file."""

    def run() -> int:
        moments = Moments(monkeypatch, folder, -1, lambda: None)
        code = work()
        told.write_text(str(moments.count))
        return code

    assert in_a_child(run) == 0
    return int(told.read_text())


def refused(write: Callable[[], object], words: str) -> int:
    """7 where a write is refused in these words, 8 where in others, 0 where it is not."""
    try:
        write()
    except SaveError as error:
        return 7 if words in str(error) else 8
    return 0


def where_files_may_not_grow(limit: int, write: Callable[[], object]) -> int:
    """Runs `refused` in a child that may write files of so many bytes, by the system's own rule."""

    def work() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return refused(write, "cannot be written")

    return in_a_child(work)


def on_a_small_disk(place: Path, kilobytes: int, work: Callable[[], int]) -> int:
    """Runs in a child with a file system of its own at ``place``; 77 where none may be mounted."""

    def run() -> int:
        system = ctypes.CDLL(None, use_errno=True)
        new_mounts, new_user, private = 0x20000, 0x10000000, 0x40000 | 0x4000
        if system.unshare(new_mounts) and system.unshare(new_mounts | new_user):
            return 77
        system.mount(b"none", b"/", None, private, None)
        size = f"size={kilobytes}k".encode()
        if system.mount(b"tmpfs", bytes(place), b"tmpfs", 0, size):
            return 77
        return work()

    return in_a_child(run)
