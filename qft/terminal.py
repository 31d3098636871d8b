"""What a verb prints: its result as JSON for programs, or lines for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from qft.errors import printable

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def print_result(value: Any, as_json: bool, otherwise: Callable[[], None]) -> None:
    """Prints a verb's result, and hands it to the ledger where the verb is recorded."""
    from qft.bench.ledger import current

    recording = current()
    if recording is not None:
        recording.result = value
    if as_json:
        print_json(value)
    else:
        otherwise()


def print_json(value: Any) -> None:
    """Indented; null for what JSON has no number for."""
    from qft.files import json_ready

    print(json.dumps(json_ready(value), indent=2, ensure_ascii=False, default=str))


def print_lines(texts: Sequence[str]) -> None:
    """Texts that may come from elsewhere: nothing in them steers the terminal."""
    for text in texts:
        print(printable(text))


def print_table(values: dict[str, Any], indent: str = "") -> None:
    """A name and a value a line; a dictionary is indented below its name."""
    width = max((len(key) for key in values), default=0)
    for key, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            print_table(value, indent + "  ")
        else:
            shown = f"{value:.6g}" if isinstance(value, float) else value
            print(f"{indent}{key:<{width}}  {shown}")


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Cells in columns, aligned on the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())
