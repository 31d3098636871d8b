"""Runs written code against its tests, only when asked to: no network, an empty folder, limits.

The code is a model's, so it may do anything. It runs in a process of its own, cut off from the
network and from other processes by namespaces, under limits on time, memory, files and processes,
in a scratch folder that is removed. The first process of its namespace is qft's own: it counts
what is started, and when it ends the kernel ends all that was born there, whatever session that
has fled to. Where the system cannot cut it off, nothing runs at all.

A program passes only if a secret comes back that is handed over once its tests have ended: leaving
early (`sys.exit(0)`, `os._exit(0)`) is a failure, and so is a syntax that would swallow the tests.

What this does not defend against: the program shares its interpreter with its tests, so one that
sets out to deceive this very executor (takes the secret out of its pipe early, compares equal to
everything) can pass. It can read what this user can read; it does not run as another user, who
could often not read the interpreter itself. Its processes are counted every few milliseconds, so
some hundred more may start before the count stops them.
"""

from __future__ import annotations

import contextlib
import ctypes
import hmac
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qft import code_runner
from qft.errors import DataError, RecipeError

SECONDS = 5
_MEMORY_BYTES = 512 * 2**20
_FILE_BYTES = 2**20
_PROCESSES = 32  # at once; does not bind root
_STARTED = 256  # processes and threads in all; binds everybody
_COUNT_EVERY_SECONDS = 0.005
# flags of unshare(2): a user, network, process and message namespace of its own
_NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000
# prctl(2)
_DIE_WITH_PARENT, _DUMPABLE, _NO_NEW_PRIVILEGES = 1, 4, 38
_LAST_PROCESS = Path("/proc/sys/kernel/ns_last_pid")  # of the namespace of who reads it
_FENCE = re.compile(r"```(?:python)?\s*\n(.*?)(?:```|\Z)", re.DOTALL)


class Program(NamedTuple):
    """Code and what it is tested by; the tests run after the code, among its names."""

    code: str
    tests: str


def pass_rate(rows: Sequence[Mapping[str, Any]], predictions: Sequence[str]) -> float:
    """The share of predictions that pass their row's tests (pass@1).

    Args:
        rows: with ``test_list`` (and ``test_setup_code``) as MBPP has them, or ``prompt``,
            ``test`` and ``entry_point`` as HumanEval has them.
        predictions: as the model wrote them; HumanEval's go on in the middle of a function, so
            their first blanks matter.

    Raises:
        DataError: a row has no tests.
        RecipeError: this system cannot cut code off from the network.
    """
    programs = [
        program(row, prediction, number)
        for number, (row, prediction) in enumerate(zip(rows, predictions, strict=True), start=1)
    ]
    _require_isolation()
    return sum(passes(*each) for each in programs) / len(programs)


def program(row: Mapping[str, Any], prediction: str, number: int) -> Program:
    """The prediction and its row's tests."""
    fenced = _FENCE.search(prediction)
    code = fenced.group(1) if fenced else prediction
    if isinstance(row.get("test_list"), list):
        tests = [str(row.get("test_setup_code") or ""), *map(str, row["test_list"])]
        return Program(code, "\n".join(tests))
    if isinstance(row.get("test"), str) and isinstance(row.get("entry_point"), str):
        tests = [row["test"], f"check({row['entry_point']})"]
        return Program(f"{row.get('prompt', '')}{code}", "\n".join(tests))
    raise DataError(
        "A row has no tests to run.",
        where=f"row {number}",
        found=f"columns: {', '.join(map(repr, row))}",
        fix="test_list, as MBPP has it, or test and entry_point, as HumanEval has them",
    )


def passes(code: str, tests: str = "") -> bool:
    """Whether the tests are reached and end without an error within the limits.

    When this returns, nothing that the code has started is left.
    """
    secret = secrets.token_bytes(code_runner.SECRET_BYTES)
    with (
        tempfile.TemporaryDirectory(prefix="qft-code-") as folder,
        _pipe() as (asked, answer),
        _pipe() as (proof, witness),
    ):
        for name, text in ((code_runner.PROGRAM, code), (code_runner.TESTS, tests)):
            (Path(folder) / name).write_text(text, encoding="utf-8", errors="replace")
        answer.write(secret)
        answer.close()
        ends = [asked.fileno(), witness.fileno()]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", code_runner.__file__, *map(str, ends)],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_isolate,
            pass_fds=ends,
            start_new_session=True,
        )
        witness.close()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=SECONDS + 1)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the namespace's first process is in it
            process.wait()
            # the pipe ends when the last that holds it has died, which is a moment later
            found = proof.read()
    return process.returncode == 0 and hmac.compare_digest(found, secret)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Both ends of a pipe, unbuffered."""
    read, write = os.pipe()
    with os.fdopen(read, "rb", buffering=0) as reader, os.fdopen(write, "wb", buffering=0) as end:
        yield reader, end  # type: ignore[misc]


def _isolate() -> None:
    """Called in the child before it runs anything: other processes are out of its sight too."""
    system = ctypes.CDLL(None)
    system.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if system.unshare(_NAMESPACES) != 0:
        os._exit(1)
    first = os.fork()  # only what is born now is in the new namespace of processes
    if first:
        _close_files()
        _, status = os.waitpid(first, 0)
        os._exit(0 if status == 0 else 1)
    system.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    only = os.fork()
    if only:
        _close_files()
        system.prctl(_DUMPABLE, 0)  # the program cannot trace it; nor can it signal its first
        within = _watch(only)
        os._exit(0 if within else 1)  # and with the first process the kernel ends the others
    os.setsid()
    system.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    for limit, value in (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NPROC, _PROCESSES),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _close_files() -> None:
    """Popen waits until nobody holds its pipe."""
    os.closerange(3, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 2**16))


def _watch(program: int) -> bool:
    """Until the program has ended, or has started more than it may; whether it kept within that."""
    while True:
        ended = os.waitpid(-1, os.WNOHANG)[0] == program
        # Numbers are given in turn, so the last one tells how many there were. A kernel without
        # this file has only the limit that does not bind root.
        with contextlib.suppress(OSError):
            if int(_LAST_PROCESS.read_bytes()) > _STARTED:
                return False
        if ended:
            return True
        time.sleep(_COUNT_EVERY_SECONDS)


def _require_isolation() -> None:
    if sys.platform != "linux" or not passes("pass"):
        raise RecipeError(
            "This system cannot cut a program off from the network, so no written code is run.",
            where="--execute-code",
            fix="run it on a Linux that allows user namespaces, or leave the flag out",
        )
