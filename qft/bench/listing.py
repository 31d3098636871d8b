"""`qft bench ledger`: a record a line."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from qft.bench.figures import FILE, METRIC, PEAK, SECONDS, SPEED, figures_of, shown
from qft.bench.ledger_file import Record
from qft.bench.table import label_of

HEADS = ("number", "time", "what", "model", "device", "peak", "tokens/s", "metric", "file",
         "seconds", "exit")  # fmt: skip
_WIDEST = 28  # characters of a name


def rows_of(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The cells of each, the heads first."""
    return [HEADS, *(_row(record) for record in records)]


def _row(record: Record) -> tuple[str, ...]:
    figures = figures_of(record)

    def cell(name: str) -> str:
        return shown(name, figures[name]) if name in figures else ""

    verb, label = str(record.get("verb")), label_of(record)
    return (
        str(record.get("number", "")),
        _local(record),
        _short(label if label.startswith(verb) else f"{verb} {label}"),
        _short(str(record.get("model") or "")),
        str(record.get("device") or ""),
        cell(PEAK) or _predicted(figures),
        cell(SPEED),
        _metric(figures),
        cell(FILE),
        cell(SECONDS),
        str(record.get("exit_status", "")),
    )


def _metric(figures: dict[str, float]) -> str:
    """The loss, or whichever metric comes first."""
    names = [name for name in figures if name.startswith(METRIC)]
    chosen = METRIC + "loss" if METRIC + "loss" in names else next(iter(names), None)
    if chosen is None:
        return ""
    return f"{chosen.removeprefix(METRIC)} {shown(chosen, figures[chosen])}"


def _predicted(figures: dict[str, float]) -> str:
    """Of a command that only foresees: its peak, or the largest phase's."""
    names = [name for name in figures if name == "predicted_peak_bytes"
             or name.endswith(".predicted.device_bytes")]  # fmt: skip
    most = max(names, key=lambda name: figures[name], default=None)
    return f"~{shown(most, figures[most])}" if most else ""


def _local(record: Record) -> str:
    """A record's time, by this machine's clock."""
    try:
        told = datetime.fromisoformat(str(record.get("time")))
    except ValueError:
        return ""
    return told.astimezone().strftime("%Y-%m-%d %H:%M")


def _short(text: str) -> str:
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"
