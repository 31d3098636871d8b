"""A side's end of the line to the driver: one JSON object a line, and what it knows of itself.

Only the standard library: this must be importable before the toolkit that is measured, since some
want to be imported first.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "unsloth",
    "unsloth_zoo",
)  # fmt: skip
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Channel:
    """Takes standard input and output for the driver; whatever else is printed goes to the log."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        self._in = os.fdopen(os.dup(0), "r", encoding="utf-8")
        os.dup2(2, 1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = sys.stderr
        self.imports_bytes = 0

    def send(self, **message: Any) -> None:
        """One message to the driver."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def receive(self) -> dict[str, Any]:
        """The driver's next message; where the driver is gone, the side ends."""
        line = self._in.readline()
        if not line:
            raise SystemExit("the driver has gone")
        message: dict[str, Any] = json.loads(line)
        return message

    def imported(self) -> None:
        """Called right after the imports: memory is counted above what is resident now."""
        gc.collect()
        self.imports_bytes = resident_bytes()


def resident_bytes() -> int:
    """Bytes of this process in memory now."""
    return _status("VmRSS")


def reset_peak() -> bool:
    """Lets the peak begin anew; False where the kernel does not allow it."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """The most bytes in memory since `reset_peak`, or since the start where that failed."""
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {name}")


def versions() -> dict[str, str]:
    """Of what is installed in this side's environment."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
