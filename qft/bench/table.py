"""`qft bench table`: method × peak × time × metric × file size, and which rows nothing beats.

Records of one method on one model are one row, their medians in it. A row is marked where no other
is at least as good in every column that counts and better in one (Pareto).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qft.bench.figures import (
    FILE,
    METRIC,
    PEAK,
    SECONDS,
    SPEED,
    Figure,
    less_is_better,
    medians,
    shown,
    title,
)  # fmt: skip
from qft.bench.ledger_file import Record
from qft.bench.sides import one_value
from qft.errors import RecipeError, printable

TRAIN_SECONDS, TRAINED = "train_seconds", "trained_parameters"
AXES = {"memory": PEAK, "time": TRAIN_SECONDS, "metric": METRIC, "size": FILE, "speed": SPEED}
_FIRST_METRICS = ("accuracy", "exact_match", "f1", "entity_f1", "matthews", "spearman", "rmse",
                  "loss", "perplexity")  # fmt: skip
BEST = "*"


@dataclass(frozen=True)
class Row:
    """One method on one model.

    Attributes:
        method: what was done, in a few words.
        model: what it was done to.
        records: how many are in it.
        figures: medians by name.
        best: whether no other row beats it.
    """

    method: str
    model: str
    records: int
    figures: dict[str, Figure]
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Rows and the metric they are judged by.

    Attributes:
        rows: in order.
        metric: its figure's name, or None where no row has one.
        higher: whether more of it is better.
        axes: the figures that count for the marks.
    """

    rows: tuple[Row, ...]
    metric: str | None
    higher: bool
    axes: tuple[str, ...]


def table_of(
    records: Sequence[Record],
    *,
    metric: str | None = None,
    higher: bool | None = None,
    axes: Sequence[str] = ("memory", "time", "metric"),
    sort: str = "metric",
) -> Table:
    """The table of these records; those of commands that failed are left out.

    Args:
        metric: that is shown; None takes the best known one that most rows have.
        higher: whether more of it is better; None goes by its name.
        axes: of `AXES`: what a row must not be beaten in.
        sort: of `AXES`: the best first.

    Raises:
        RecipeError: no record is left, or there is no such column or metric.
    """
    for word in (*axes, sort):
        if word not in AXES:
            raise RecipeError("There is no such column.", where="--pareto, --sort", found=word,
                              fix=", ".join(AXES))  # fmt: skip
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.get("exit_status", 0) == 0:
            groups.setdefault(_kind(record), []).append(record)
    if not groups:
        raise RecipeError("There is no record of a command that worked.", where="qft bench table")
    rows = [_row(name, group) for name, group in _labelled(groups)]
    chosen = _metric(rows, metric)
    more = not less_is_better(chosen or "") if higher is None else higher
    names = tuple(dict.fromkeys(_column(word, chosen) for word in axes))
    counted = tuple(name for name in names if name)
    marked = [Row(r.method, r.model, r.records, r.figures, _unbeaten(r, rows, counted, more))
              for r in rows]  # fmt: skip
    return Table(tuple(_sorted(marked, _column(sort, chosen), more)), chosen, more, counted)


def _kind(record: Record) -> tuple[str, str]:
    """What makes records one row: the same job of the same model, by what is known of it."""
    keys = ("verb", "recipe_hash", "strategy", "quantize", "settings", "method", "device_name",
            "data_fingerprint")  # fmt: skip
    told = {key: record.get(key) for key in keys}
    return str(record.get("model")), json.dumps(told, sort_keys=True, default=str)


def _labelled(
    groups: dict[tuple[str, str], list[Record]],
) -> list[tuple[str, list[Record]]]:
    """Each group with its label; those that would have the same one are told apart by number."""
    plain = [(label_of(group[0]), group) for group in groups.values()]
    labels = [label for label, _ in plain]
    return [(label if labels.count(label) == 1 else f"{label} {_told_apart(group)}", group)
            for label, group in plain]  # fmt: skip


def _told_apart(group: Sequence[Record]) -> str:
    first = group[0]
    known = first.get("name") or first.get("number") or first.get("recipe_hash") or "?"
    return f"({known})"


def label_of(record: Record) -> str:
    """What was done, in a few words: ``lora rank 16, nf4``; ``export gguf:q8_0``."""
    verb = str(record.get("verb"))
    strategy = record.get("strategy")
    words = _strategy_words(strategy) if isinstance(strategy, dict) else ""
    if verb != "train":
        settings = record.get("settings")
        told = settings if isinstance(settings, dict) else {}
        flags = [str(told[key]) for key in ("method", "format", "ratio", "pattern") if key in told]
        words = " ".join([verb, *flags]) + (f", {words}" if words else "")
    quantize = record.get("quantize")
    return words or verb if quantize in (None, "none") else f"{words or verb}, {quantize}"


def _strategy_words(strategy: dict[str, Any]) -> str:
    parts = [str(strategy.get("name"))]
    parts += [f"{key} {strategy[key]}" for key in ("rank", "alpha", "length", "last", "layers")
              if isinstance(strategy.get(key), (int, float))]  # fmt: skip
    return " ".join(parts)


def _row(label: str, group: Sequence[Record]) -> Row:
    figures = medians(group)
    if TRAIN_SECONDS not in figures and SECONDS in figures:
        figures[TRAIN_SECONDS] = figures[SECONDS]
    return Row(label, str(one_value(group, "model") or "?"), len(group), figures)


def _metric(rows: Sequence[Row], asked: str | None) -> str | None:
    there = [name for row in rows for name in row.figures if name.startswith(METRIC)]
    if asked is not None:
        if METRIC + asked not in there:
            known = ", ".join(sorted({name.removeprefix(METRIC) for name in there})) or "none"
            raise RecipeError("No record has this metric.", where="--metric", found=asked,
                              fix=f"there are: {known}")  # fmt: skip
        return METRIC + asked
    if not there:
        return None
    order = [METRIC + name for name in _FIRST_METRICS]
    return max(dict.fromkeys(there), key=lambda name: (
        there.count(name), -order.index(name) if name in order else -len(order)))  # fmt: skip


def _column(word: str, metric: str | None) -> str | None:
    return metric if AXES[word] == METRIC else AXES[word]


def _cost(row: Row, name: str, higher: bool) -> float | None:
    """The figure with less being better; None where the row lacks it."""
    figure = row.figures.get(name)
    if figure is None:
        return None
    less = not higher if name.startswith(METRIC) else less_is_better(name)
    return figure.median if less else -figure.median


def _unbeaten(row: Row, rows: Sequence[Row], axes: Sequence[str], higher: bool) -> bool:
    """Pareto-optimal among the rows that know all that counts."""
    mine = [_cost(row, name, higher) for name in axes]
    if not mine or None in mine:
        return False
    for other in rows:
        theirs = [_cost(other, name, higher) for name in axes]
        if None in theirs or other is row:
            continue
        pairs = [(a, b) for a, b in zip(mine, theirs, strict=True)
                 if a is not None and b is not None]  # fmt: skip
        if all(b <= a for a, b in pairs) and any(b < a for a, b in pairs):
            return False
    return True


def _sorted(rows: Sequence[Row], name: str | None, higher: bool) -> list[Row]:
    def place(row: Row) -> tuple[bool, float]:
        cost = _cost(row, name, higher) if name else None
        return cost is None, cost or 0.0

    return sorted(rows, key=place)


def columns(table: Table) -> list[str]:
    """The figures of the table's columns, in order."""
    names = [TRAINED, PEAK, TRAIN_SECONDS, SPEED, *([table.metric] if table.metric else []), FILE]
    return [name for name in names if any(name in row.figures for row in table.rows)]


def rows_of(table: Table) -> list[tuple[str, ...]]:
    """The table's cells, the heads first; the first cell holds the mark."""
    names = columns(table)
    models = len({row.model for row in table.rows}) > 1
    many = any(row.records > 1 for row in table.rows)
    heads = [title(n) + (" (higher is better)" if n == table.metric and table.higher else "")
             for n in names]  # fmt: skip
    rows: list[tuple[str, ...]] = [
        ("", "method", *(["model"] if models else []), *heads, *(["runs"] if many else []))
    ]
    for row in table.rows:
        cells = [shown(n, row.figures[n].median) if n in row.figures else "–" for n in names]
        rows.append((
            BEST if row.best else "", row.method, *([row.model] if models else []), *cells,
            *([str(row.records)] if many else []),
        ))  # fmt: skip
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """The cells as a Markdown table; text from elsewhere can neither end a cell nor mark itself."""
    lines = [_line(rows[0]), _line(["---", "---", *["---:"] * (len(rows[0]) - 2)])]
    return lines + [_line([_escaped(cell) for cell in row]) for row in rows[1:]]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escaped(cell: str) -> str:
    text = " ".join(printable(cell).split())
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, f"\\{mark}")
    return text


def below(table: Table) -> str:
    """The sentence under the table."""
    axes = ", ".join(title(name) for name in table.axes)
    return f"{BEST} no other row is as good in {axes} and better in one of them."


def to_dict(table: Table) -> dict[str, Any]:
    """Plain values for JSON."""
    names = columns(table)
    return {
        "metric": table.metric and table.metric.removeprefix(METRIC),
        "higher_is_better": table.higher,
        "pareto": list(table.axes),
        "rows": [
            {"method": row.method, "model": row.model, "records": row.records, "best": row.best,
             **{name: row.figures[name].median for name in names if name in row.figures}}
            for row in table.rows
        ],
    }  # fmt: skip
