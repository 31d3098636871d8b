"""A plan for a terminal: a row a phase, a column a category, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qft.progress import human_bytes

_ORDER = (
    "weights", "adapters", "gradients", "optimizer", "activations", "temporary", "teacher",
    "key-value cache", "buffers", "allocator", "context",
)  # fmt: skip


def phase_rows(phases: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A header and a row a phase: bytes on the device by category, their sum, host and disk."""
    used = {name for phase in phases for name, size in phase["device"].items() if size}
    names = [name for name in _ORDER if name in used] + sorted(used.difference(_ORDER))
    beside = [name for name in ("host", "disk") if any(phase[name] for phase in phases)]
    rows = [("", *names, "sum", *(f"on the {name}" for name in beside))]
    for phase in phases:
        sizes = [phase["device"].get(name, 0) for name in names]
        sums = [sum(sizes), *(sum(phase[name].values()) for name in beside)]
        rows.append((phase["phase"], *(_cell(size) for size in (*sizes, *sums))))
    return rows


def _cell(size: int) -> str:
    return human_bytes(size) if size else "-"


def verdict(plan: Mapping[str, Any]) -> str:
    """One sentence: the peak, its error bar, and whether it is within the budget."""
    peak = human_bytes(plan["peak_bytes"])
    low, high = plan["low_bytes"], plan["high_bytes"]
    if high > low:
        peak += f" ({human_bytes(low)} to {human_bytes(high)})"
    said = f"peak: {peak}, in the phase {plan['peak_phase']}"
    budget = plan["budget_bytes"]
    if budget is None:
        return said
    room = budget - plan["peak_bytes"]
    if plan["fits"]:
        near = "" if high <= budget else "; close: the error bar reaches beyond the budget"
        return f"{said}; fits into {human_bytes(budget)} with {human_bytes(room)} to spare{near}"
    return f"{said}; does not fit into {human_bytes(budget)}: {human_bytes(-room)} too many"
