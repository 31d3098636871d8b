"""Runs written code against its tests, only when asked to: no network, an empty folder, limits.

The code is a model's, so it may do anything. It runs in a process of its own, cut off from the
network and from other processes by namespaces, under limits on time, memory, files and processes,
in a scratch folder that is removed; it can still read what this user can read. Where the system
cannot cut it off, nothing runs at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qft.errors import DataError, RecipeError

SECONDS = 5
_MEMORY_BYTES = 512 * 2**20
_FILE_BYTES = 2**20
_PROCESSES = 32
# flags of unshare(2): a user, network, process and message namespace of its own
_NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000
_FENCE = re.compile(r"```(?:python)?\s*\n(.*?)(?:```|\Z)", re.DOTALL)


def pass_rate(rows: Sequence[Mapping[str, Any]], predictions: Sequence[str]) -> float:
    """The share of predictions that pass their row's tests (pass@1).

    Args:
        rows: with ``test_list`` (and ``test_setup_code``) as MBPP has them, or ``prompt``,
            ``test`` and ``entry_point`` as HumanEval has them.

    Raises:
        DataError: a row has no tests.
        RecipeError: this system cannot cut code off from the network.
    """
    programs = [
        program(row, prediction, number)
        for number, (row, prediction) in enumerate(zip(rows, predictions, strict=True), start=1)
    ]
    _require_isolation()
    return sum(passes(text) for text in programs) / len(programs)


def program(row: Mapping[str, Any], prediction: str, number: int) -> str:
    """The prediction with its row's tests behind it."""
    fenced = _FENCE.search(prediction)
    code = fenced.group(1) if fenced else prediction
    if isinstance(row.get("test_list"), list):
        tests = [str(row.get("test_setup_code") or ""), *map(str, row["test_list"])]
        return "\n".join([code, *tests])
    if isinstance(row.get("test"), str) and isinstance(row.get("entry_point"), str):
        return f"{row.get('prompt', '')}{code}\n{row['test']}\ncheck({row['entry_point']})\n"
    raise DataError(
        "A row has no tests to run.",
        where=f"row {number}",
        found=f"columns: {', '.join(map(repr, row))}",
        fix="test_list, as MBPP has it, or test and entry_point, as HumanEval has them",
    )


def passes(text: str) -> bool:
    """Whether a program ends without an error within its limits."""
    with tempfile.TemporaryDirectory(prefix="qft-code-") as folder:
        file = Path(folder) / "program.py"
        file.write_text(text, encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(file)],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_isolate,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=SECONDS + 1) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
            process.wait()


def _isolate() -> None:
    """Called in the child before it runs anything: other processes are out of its sight too."""
    if ctypes.CDLL(None).unshare(_NAMESPACES) != 0:
        os._exit(1)
    inside = os.fork()  # only what is born now is in the new namespace of processes
    if inside:
        os.closerange(3, 256)  # Popen waits until nobody holds its pipe
        _, status = os.waitpid(inside, 0)
        os._exit(0 if status == 0 else 1)
    for limit, value in (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NPROC, _PROCESSES),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _require_isolation() -> None:
    if sys.platform != "linux" or not passes("pass"):
        raise RecipeError(
            "This system cannot cut a program off from the network, so no written code is run.",
            where="--execute-code",
            fix="run it on a Linux that allows user namespaces, or leave the flag out",
        )
