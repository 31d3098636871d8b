"""What long work shows: a live bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from qft.errors import printable

PLAIN_SECONDS = 5.0  # between two plain lines of one bar


class Bar:
    """One piece of long work."""

    def __init__(self, reporter: Reporter, title: str, total: int, live: Progress | None) -> None:
        self._reporter = reporter
        self._title = title
        self._total = max(total, 1)
        self._live = live
        self._task = live.add_task(escape(title), total=total, fields="") if live else None
        self._done = 0
        self._started = self._shown = time.monotonic()

    def advance(self, count: int = 1, fields: str = "") -> None:
        """Reports ``count`` more units done, with a line of figures beside the bar."""
        self.update(self._done + count, fields)

    def update(self, done: int, fields: str = "") -> None:
        """Reports how many units are done in all."""
        self._done = done
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=done, fields=escape(fields))
            return
        now = time.monotonic()
        if now - self._shown >= PLAIN_SECONDS or done >= self._total:
            self._shown = now
            left = (now - self._started) / max(done, 1) * (self._total - done)
            text = f"{self._title} {done}/{self._total}  {fields}".rstrip()
            self._reporter.say(f"{text}  {left:.0f} s left" if left >= 1 else text)


class Reporter:
    """Where a command writes for people; results for programs go to standard output elsewhere.

    Args:
        quiet: say nothing.
        stream: ``stdout`` or ``stderr`` (where standard output carries JSON).
    """

    def __init__(self, *, quiet: bool = False, stream: str = "stdout") -> None:
        self.quiet = quiet
        # looked up when written to, so that a redirected stream is honoured
        self.console = Console(
            file=sys.stderr if stream == "stderr" else None, quiet=quiet, highlight=False
        )

    def say(self, text: str) -> None:
        """One line; escaped, since it may hold words from data or a model."""
        self.console.print(escape(printable(text)), soft_wrap=True)

    def title(self, text: str) -> None:
        """A heading."""
        self.console.print(f"[bold]{escape(printable(text))}[/bold]", soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        """A progress bar for ``total`` units of work."""
        if self.quiet or not self.console.is_terminal:
            yield Bar(self, title, total, None)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[fields]}"),
        )
        with Progress(*columns, console=self.console, transient=False) as live:
            yield Bar(self, title, total, live)


QUIET = Reporter(quiet=True)


def human_bytes(count: float) -> str:
    """1536 → ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
