"""The figures of records: which there are, their units, which way is better, their medians."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qft.bench.facts import number_in, numbers
from qft.bench.ledger_file import Record
from qft.progress import human_bytes

METRIC = "metric."  # before the name of one; `metrics` of a record holds them
PEAK, SPEED, CPU_SPEED = "peak_bytes", "tokens_per_second", "tokens_per_cpu_second"
FILE, SECONDS = "file_bytes", "seconds"

# figure: what it is called, and whether less of it is better
MEASURES: dict[str, tuple[str, bool]] = {
    PEAK: ("peak memory", True),
    "predicted_peak_bytes": ("peak memory, predicted", True),
    SPEED: ("tokens/s", False),
    "supervised_items_per_second": ("supervised items/s", False),
    CPU_SPEED: ("tokens a CPU-second", False),
    "train_seconds": ("seconds of training", True),
    SECONDS: ("seconds, all of it", True),
    "cpu_seconds": ("CPU-seconds, all of it", True),
    "process_peak_resident_bytes": ("peak of the process, resident", True),
    FILE: ("file size", True),
    "parameters": ("parameters", True),
    "trained_parameters": ("trained parameters", True),
    "flops": ("FLOPs", True),
}
_LESS_IS_BETTER = (
    "loss",
    "perplexity",
    "rmse",
    "kl",
    "error",
    "bits",
)  # endings and parts of metrics


@dataclass(frozen=True)
class Figure:
    """One figure of one record, or of several.

    Attributes:
        median: of all that have it.
        low: the smallest.
        high: the largest.
        count: how many have it.
    """

    median: float
    low: float
    high: float
    count: int


def figures_of(record: Record) -> dict[str, float]:
    """The numbers of a record that can be compared, flat, in the order they are shown in."""
    found = {}
    for name in MEASURES:
        number = number_in(record.get(name))
        if number is not None:
            found[name] = number
    for name, number in numbers(record.get("metrics")).items():
        found[METRIC + name] = number
    return found | _by_phase(record.get("memory"))


def _by_phase(memory: Any) -> dict[str, float]:
    found = {}
    for phase, sides in memory.items() if isinstance(memory, dict) else ():
        for side, values in sides.items() if isinstance(sides, dict) else ():
            for name, number in numbers(values).items():
                found[f"memory.{phase}.{side}.{name}"] = number
    return found


def medians(records: Sequence[Record]) -> dict[str, Figure]:
    """The figures that any of the records has, over those that have them."""
    values: dict[str, list[float]] = {}
    for record in records:
        for name, number in figures_of(record).items():
            values.setdefault(name, []).append(number)
    return {
        name: Figure(statistics.median(held), min(held), max(held), len(held))
        for name, held in values.items()
    }


def title(name: str) -> str:
    """What a figure is called."""
    if name in MEASURES:
        return MEASURES[name][0]
    if name.startswith("memory."):
        _, phase, side, what = name.split(".", 3)
        return f"{phase}: {what.removesuffix('_bytes')}, {side}"
    return name.removeprefix(METRIC)


def less_is_better(name: str) -> bool:
    """Which way a figure improves; a metric's by what it is called."""
    if name in MEASURES:
        return MEASURES[name][1]
    words = name.removeprefix(METRIC).split("_")
    return name.startswith("memory.") or any(word in _LESS_IS_BETTER for word in words)


def shown(name: str, value: float, *, signed: bool = False) -> str:
    """A value in its figure's unit."""
    sign = "+" if signed and value > 0 else ""
    if name.endswith("_bytes"):
        return sign + human_bytes(value)
    if name == "flops":
        return f"{sign}{value / 1e12:,.2f} T"
    if name.endswith("parameters"):
        return f"{sign}{value:,.0f}"
    if name.startswith(METRIC):
        return f"{sign}{value:.4g}" if signed else f"{value:.4f}"
    return f"{sign}{value:,.1f}" if abs(value) < 1000 else f"{sign}{value:,.0f}"


def ratio(before: float, after: float) -> float | None:
    """After over before; None where that says nothing."""
    return after / before if before > 0 and after >= 0 else None
