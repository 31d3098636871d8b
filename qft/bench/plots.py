"""`qft bench plot`: memory against metric, and a kind of run over time; PNG or SVG."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from qft.bench.facts import number_in
from qft.bench.figures import CPU_SPEED, METRIC, PEAK, SPEED, Figure, figures_of, title
from qft.bench.ledger_file import Record
from qft.bench.table import Table, label_of
from qft.errors import RecipeError, printable
from qft.files import explain_write_errors

KINDS = (".png", ".svg")
_INK, _BEST, _OTHER = "#222222", "#1f6f8b", "#b8c4cc"
_LINES = ("#1f6f8b", "#c8553d", "#6a994e", "#8d6a9f", "#bc8a2f", "#555555")
_GIB = 2**30


def require_drawable(path: Path) -> None:
    """Refuses a file that cannot be drawn, before anything is read.

    Raises:
        RecipeError: neither PNG nor SVG, or matplotlib is not installed.
    """
    if path.suffix.lower() not in KINDS:
        raise RecipeError("A plot is a PNG or an SVG file.", where="--out", found=path.name,
                          fix="--out plot.png")  # fmt: skip
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise RecipeError("Plots are drawn by matplotlib, which is not installed.",
                          fix="pip install 'qft-toolkit[plot]'")  # fmt: skip


def plot_scatter(table: Table, path: Path) -> int:
    """Peak memory against the metric, a point a row; a line joins those that nothing beats.

    Returns:
        How many rows are drawn.

    Raises:
        RecipeError: no row has both.
    """
    metric = table.metric
    rows = [row for row in table.rows if metric in row.figures and PEAK in row.figures]
    if metric is None or not rows:
        raise RecipeError("No record has both a peak of memory and a metric.",
                          where="qft bench plot")  # fmt: skip
    figure, axis = _figure(1, (6.4, 4.2))
    axis = axis[0]
    front = _front([(r.figures[PEAK].median, r.figures[metric].median) for r in rows], table.higher)
    axis.plot(*zip(*((x / _GIB, y) for x, y in front), strict=True), color=_BEST, linewidth=1,
              linestyle="--", zorder=1)  # fmt: skip
    for row in rows:
        x, y = row.figures[PEAK], row.figures[metric]
        best = (x.median, y.median) in front
        axis.errorbar(
            x.median / _GIB,
            y.median,
            xerr=_spread(x, _GIB),
            yerr=_spread(y),
            fmt="o",
            color=_BEST if best else _OTHER,
            ecolor=_OTHER,
            zorder=2,
        )
        axis.annotate(
            _plain(row.method),
            (x.median / _GIB, y.median),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
            color=_INK,
        )
    axis.set_xlabel("peak memory, GiB (lower is better)")
    better = "higher" if table.higher else "lower"
    axis.set_ylabel(f"{_plain(title(metric))} ({better} is better)")
    axis.margins(0.15)
    _write(figure, path)
    return len(rows)


def plot_history(records: Sequence[Record], path: Path, metric: str | None = None) -> int:
    """Peak memory, throughput and a metric of like commands over time, a line a method.

    Returns:
        How many records are drawn.

    Raises:
        RecipeError: none has a time and a figure.
    """
    lines: dict[str, list[tuple[datetime, dict[str, float]]]] = {}
    for record in records:
        when = _time_of(record)
        if when is not None and record.get("exit_status", 0) == 0:
            name = f"{label_of(record)}, {record.get('model', '?')}"
            lines.setdefault(name, []).append((when, figures_of(record)))
    names = [name for name in (PEAK, SPEED, CPU_SPEED) if _any_has(lines, name)]
    metrics = [METRIC + metric] if metric else _metrics_of(lines)[:1]
    names += [name for name in metrics if _any_has(lines, name)]
    if not names or (metric and METRIC + metric not in names):
        raise RecipeError("No record has a time and the figure to draw.", where="qft bench plot",
                          found=metric)  # fmt: skip
    figure, axes = _figure(len(names), (6.4, 1.2 + 1.7 * len(names)))
    for axis, name in zip(axes, names, strict=True):
        for number, (label, points) in enumerate(sorted(lines.items())):
            known = sorted((when, held[name]) for when, held in points if name in held)
            scale = _GIB if name == PEAK else 1
            axis.plot([when for when, _ in known], [value / scale for _, value in known],
                      marker="o", markersize=4, linewidth=1, color=_LINES[number % len(_LINES)],
                      label=_plain(label))  # fmt: skip
        axis.set_ylabel(_plain(title(name)) + (", GiB" if name == PEAK else ""), fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0].legend(fontsize=7, frameon=False, loc="best")
    axes[-1].tick_params(axis="x", rotation=30)
    _write(figure, path)
    return sum(len(points) for points in lines.values())


def _figure(panels: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of panels above one another, drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, squeeze=False, sharex=True)[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(figure: Any, path: Path) -> None:
    """The picture in memory first, then the file as a whole."""
    kind = path.suffix.lower().removeprefix(".")
    drawn = io.BytesIO()
    metadata: dict[str, None] = {"Software": None} if kind == "png" else {"Date": None}
    figure.savefig(drawn, format=kind, dpi=130, metadata=metadata)
    temporary = path.with_name(f".unfinished-{path.name}")
    with explain_write_errors(path):
        try:
            temporary.write_bytes(drawn.getvalue())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def _front(points: Sequence[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """The points with no other left of them that is as good, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1] if higher else point[1])):
        if not front or (y > front[-1][1] if higher else y < front[-1][1]):
            front.append((x, y))
    return front


def _spread(figure: Figure, scale: float = 1.0) -> list[list[float]] | None:
    """Whiskers from the smallest to the largest; none of a single value."""
    if figure.count == 1:
        return None
    return [[(figure.median - figure.low) / scale], [(figure.high - figure.median) / scale]]


def _plain(text: str) -> str:
    """Without the sign by which matplotlib reads mathematics."""
    return printable(text).replace("$", r"\$")


def _time_of(record: Record) -> datetime | None:
    try:
        return datetime.fromisoformat(str(record.get("time"))).replace(tzinfo=None)
    except ValueError:
        return None


def _any_has(lines: dict[str, list[tuple[datetime, dict[str, float]]]], name: str) -> bool:
    return any(number_in(held.get(name)) is not None
               for points in lines.values() for _, held in points)  # fmt: skip


def _metrics_of(lines: dict[str, list[tuple[datetime, dict[str, float]]]]) -> list[str]:
    """The metrics there are, those that most records have first."""
    there = [name for points in lines.values() for _, held in points for name in held
             if name.startswith(METRIC)]  # fmt: skip
    return sorted(dict.fromkeys(there), key=lambda name: -there.count(name))
