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
    if plan["close"]:
        return f"{said}; close: {human_bytes(budget)} may or may not be enough"
    if plan["fits"]:
        return f"{said}; fits into {human_bytes(budget)} with {human_bytes(room)} to spare"
    return f"{said}; does not fit into {human_bytes(budget)}: {human_bytes(-room)} too many"


def lines(plan: Mapping[str, Any]) -> list[str]:
    """The whole plan in words, the table of bytes left out."""
    share = plan["trained_parameters"] / max(1, plan["parameters"])
    held = plan["dtype"] if plan["quantize"] == "none" else plan["quantize"]
    shown = [
        f"device: {plan['device_name']}, {plan['dtype']}",
        f"model: {plan['model']}, {plan['parameters'] / 1e6:,.1f} M parameters in {held}; "
        f"{plan['strategy']} trains {plan['trained_parameters']:,} of them ({share:.2%})",
        f"step: {plan['micro_batch']} × {plan['longest_tokens']} tokens a forward pass at most",
    ]
    return [*shown, *(f"note: {note}" for note in plan["notes"])]


def conclusions(plan: Mapping[str, Any]) -> list[str]:
    """What follows from the numbers: the peak, the time, the disk, and what would make it fit."""
    shown = [verdict(plan), f"error bar: {plan['basis']}"]
    if (probe := plan["probe"]) is not None:
        shown += _probed(probe)
    if (speed := plan["speed"]) is not None:
        shown.append(
            f"time: {speed['tokens_per_second']:,.0f} tokens/s, "
            f"{_duration(speed['seconds_an_epoch'])} an epoch ({speed['basis']})"
        )
    if plan["disk_peak_bytes"]:
        need, free = plan["disk_peak_bytes"], plan["free_disk_bytes"]
        much = "" if need <= free else ": NOT ENOUGH"
        shown.append(f"disk: {human_bytes(need)} needed, {human_bytes(free)} free{much}")
    if largest := plan.get("largest"):
        shown += _largest(largest)
    return [*shown, *_changes(plan)]


def _changes(plan: Mapping[str, Any]) -> list[str]:
    ways = plan.get("changes", ())
    shown = ["what would make it fit, the cheapest first:"] if ways else []
    for way in ways:
        shown.append(f"  {way['words']}    ({human_bytes(way['peak_bytes'])})")
        shown += [f"    {cost}" for cost in way["costs"]]
        shown += [f"    against the recipe's own {words}" for words in way["contrary"]]
    if plan.get("instead"):
        shown.append(f"nothing makes it fit; it would with {plan['instead']}")
    return shown


def _probed(probe: Mapping[str, Any]) -> list[str]:
    small = ", of random weights in a few layers" if probe["random_weights"] else ""
    tensors = f"{human_bytes(probe['live_bytes'])} of tensors measured, "
    tensors += f"{human_bytes(probe['predicted_live_bytes'])} predicted"
    whole = probe["resident_bytes"]
    if whole is not None:
        tensors += f"; in all {human_bytes(whole)}, {human_bytes(probe['predicted_bytes'])}"
    return [f"probe{small}: {tensors}"]


def _largest(largest: Mapping[str, Any]) -> list[str]:
    if largest["value"] is None:
        return [f"largest {largest['what']}: not even the smallest fits"]
    peak = human_bytes(largest["peak_bytes"])
    return [
        f"largest {largest['what']}: {largest['value']} ({peak}); {largest['limited_by']}",
        f"  {largest['words']}",
    ]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
