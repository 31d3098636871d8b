"""What happened: the training over its steps, its memory, its metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from qft.report.figures import (
    budget_bytes,
    measured_peaks,
    memory_chart,
    plan_chart,
    training_charts,
)  # fmt: skip
from qft.report.markup import said, section, table, tag
from qft.report.numbers import bytes_text, short
from qft.report.story import Line, PhaseAmounts, Story, mapping, number

# metrics of which more is better
_HIGHER_IS_BETTER = re.compile(r"accuracy|f1|precision|recall|exact|bleu|chrf|rouge|corr|r2|auc")
_LOGGED = 24  # lines of the log in the table of numbers


def training(story: Story) -> str:
    """The charts over the steps."""
    charts = training_charts(story)
    return section("Training", figures(charts), _logged(story))


def figures(charts: Sequence[str]) -> str | None:
    """Charts beside one another, where there is room."""
    if not charts:
        return None
    return tag("div", "".join(tag("figure", chart) for chart in charts), "charts")


def _logged(story: Story) -> str | None:
    """The numbers behind the charts, for those who do not see them and those who want them."""
    steps = _by_step(story)
    if not steps:
        return None
    every = max(1, -(-len(steps) // _LOGGED))
    last = steps[-1]
    chosen = [line for n, line in enumerate(steps, 1) if n % every == 0 or line is last]
    measured = [line for line in steps if "eval_loss" in line and line not in chosen]
    if len(measured) <= _LOGGED:
        chosen = sorted([*chosen, *measured], key=lambda line: line["step"] or 0)
    keys = [key for key in _COLUMNS if any(key in line for line in chosen)]
    rows = [[_cell(line, key) for key in ("step", *keys)] for line in chosen]
    shown = table(rows, ["step", *(_COLUMNS[key] for key in keys)], "numbers")
    note = f"{len(rows)} of {len(steps):,} logged steps; metrics.jsonl has them all."
    more = tag("p", note, "soft") if len(rows) < len(steps) else ""
    return tag("details", tag("summary", "The numbers") + shown + more)


def _by_step(story: Story) -> list[Line]:
    """What was logged, a line a step: an evaluation has one of its own in the log."""
    found: dict[float, Line] = {}
    for line in story.lines:
        if "loss" in line or "eval_loss" in line:
            step = line["step"] or 0
            found[step] = {**found.get(step, {}), **line}
    return list(found.values())


_COLUMNS = {
    "loss": "loss", "eval_loss": "held-out loss", "learning_rate": "learning rate",
    "grad_norm": "gradient norm", "tokens_per_second": "tokens/s", "micro_batch": "micro-batch",
    "replays": "replays", "memory_bytes": "memory", "memory_peak_bytes": "peak",
    "train_seconds": "seconds",
}  # fmt: skip


def _cell(line: Line, key: str) -> str:
    if key not in line:
        return ""
    value = line[key]
    if value is None:
        return "not finite"
    if key == "step":
        return f"{value:,.0f}"
    if key.startswith("memory"):
        return bytes_text(value - (line.get("memory_floor_bytes") or 0))
    return short(value)


def memory(story: Story) -> str:
    """Memory over the steps, the plan's bars, and both as numbers."""
    charts = [chart for chart in (memory_chart(story), plan_chart(story)) if chart]
    return section("Memory", figures(charts), _floor_note(story), _plan_table(story))


def _floor_note(story: Story) -> str | None:
    floor = story.last("memory_floor_bytes")
    if not floor:
        return None
    before = f"Beyond the {bytes_text(floor)} that Python, its libraries and the rows take before"
    return tag("p", f"{before} there is a model.", "soft")


def _plan_table(story: Story) -> str | None:
    """Each phase as planned and as measured."""
    peaks, planned = measured_peaks(story), {p.phase: p for p in story.phases}
    rows = [
        _phase_row(name, planned.get(name), peaks.get(name), story.measured.get(name, {}))
        for name in dict.fromkeys([*planned, *story.measured])
    ]
    names = ["phase", "planned", "measured", "of it tensors", "host", "disk", ""]
    kept = [n for n in range(len(names)) if n == 0 or any(row[n] for row in rows)]
    if len(kept) < 2:
        return None
    shown = table(
        [[row[n] for n in kept] for row in rows], [names[n] for n in kept], "numbers plan"
    )
    return shown + _said_before(story)


def _said_before(story: Story) -> str:
    """The plan's peak with its error bar, and the budget."""
    peak, low, high = (number(story.plan.get(k)) for k in ("peak_bytes", "low_bytes", "high_bytes"))
    told = ""
    if peak:
        told = f"The plan's peak: {bytes_text(peak)}"
        if low and high:
            told += f", from {bytes_text(low)} to {bytes_text(high)}"
        basis = said(story.plan.get("basis"), 200)
        told += f" ({basis}). " if basis else ". "
    if budget := budget_bytes(story):
        told += f"The budget was {bytes_text(budget)}."
    return tag("p", told, "soft") if told else ""


def _phase_row(
    name: str, planned: PhaseAmounts | None, peak: int | None, seen: Mapping[str, float]
) -> list[str]:
    phase = planned or PhaseAmounts(name)
    expected = sum(phase.device.values())
    beside = bytes_text(peak) if peak else ""
    if peak and expected:
        beside += f" ({peak / expected - 1:+.1%})"
    tensors = seen.get("allocated_bytes") or seen.get("live_bytes") or 0
    disk = max(phase.disk_peak, sum(phase.disk.values()))
    host = sum(phase.host.values())
    told = [bytes_text(n) if n else "" for n in (tensors, host, disk)]
    return [said(name), bytes_text(expected) if expected else "", beside, *told, said(phase.note)]


def metrics(story: Story) -> str:
    """Held-out metrics: last, best and first."""
    final = {k: number(v) for k, v in mapping(story.run.get("metrics")).items()}
    before = mapping(story.run.get("metrics_before"))
    rows = []
    for name in list(dict.fromkeys([*final, *story.held_out]))[:40]:
        if name in ("runtime", "samples_per_second", "steps_per_second"):
            continue
        seen = [(y, step) for step, y in story.held_out.get(name, []) if y is not None]
        last = final.get(name)
        last = seen[-1][0] if last is None and seen else last
        if last is None:
            continue
        start = number(before.get(name))
        was = "" if start is None else short(start)
        in_the_end = tag("strong", short(last))
        rows.append([said(name.replace("_", " ")), in_the_end, *_seen(name, seen), was])
    names = ["metric", "in the end", "best", "first measured", "before training"]
    kept = [n for n in range(len(names)) if n < 2 or any(row[n] for row in rows)]
    shown = table([[row[n] for n in kept] for row in rows], [names[n] for n in kept], "numbers")
    return section("Held-out metrics", shown or None)


def _seen(name: str, seen: Sequence[tuple[float, float]]) -> list[str]:
    if len(seen) < 2:
        return ["", ""]
    better = max if _HIGHER_IS_BETTER.search(name) else min
    return [f"{short(y)} (step {short(step)})" for y, step in (better(seen), seen[0])]
