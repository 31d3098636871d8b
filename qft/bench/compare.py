"""`qft bench compare`: two sides, figure by figure, and why they may not be comparable."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qft.bench.figures import MEASURES, METRIC, Figure, medians, ratio, shown, title
from qft.bench.ledger_file import Record
from qft.bench.sides import Side, require_done

# fact: what is said where the sides differ in it
_SAME = {
    "verb": "other commands",
    "device": "other devices",
    "device_name": "other devices",
    "base_fingerprint": "other models",
    "data_fingerprint": "other data",
    "task": "other tasks",
    "quantize": "otherwise quantized",
    "dtype": "other number formats",
    "threads": "another number of threads",
    "settings": "other flags",
    "peak_kind": "peaks of other kinds",
}
_QUOTED = 60  # characters of a value in a warning


@dataclass(frozen=True)
class Compared:
    """One figure of both sides.

    Attributes:
        name: of the figure.
        a: over the first side's records, or None where none has it.
        b: over the second's.
        ratio: b over a.
        difference: b less a.
    """

    name: str
    a: Figure | None
    b: Figure | None
    ratio: float | None
    difference: float | None


def compare(a: Side, b: Side) -> list[Compared]:
    """Every figure that one of the sides has, by medians.

    Raises:
        RecipeError: one of the records is of a command that failed.
    """
    for side in (a, b):
        require_done(side)
    first, second = medians(a.records), medians(b.records)
    found = []
    for name in sorted(dict.fromkeys([*first, *second]), key=_place):
        one, two = first.get(name), second.get(name)
        both = (one.median, two.median) if one and two else None
        found.append(Compared(name, one, two, both and ratio(*both), both and both[1] - both[0]))
    return found


def _place(name: str) -> tuple[int, int]:
    """The order of figures: those of the whole, metrics, phases; within these as they came."""
    known = list(MEASURES)
    if name in MEASURES:
        return 0, known.index(name)
    return (1 if name.startswith(METRIC) else 2), 0


def warnings(a: Side, b: Side) -> list[str]:
    """Why figures of the two sides, or of one side's records, do not say what they seem to."""
    found: list[str] = []
    for key, text in _SAME.items():
        one, two = _told(a.records, key), _told(b.records, key)
        if one and two and one != two and text not in " ".join(found):
            found.append(f"{text}: {_quote(one)} and {_quote(two)}")
    found += _recipes(a, b) + _versions(a, b)
    for side in (a, b):
        for key, text in (("verb", "commands"), ("device_name", "devices"), ("model", "models"),
                          ("recipe_hash", "recipes")):  # fmt: skip
            if len(_told(side.records, key)) > 1:
                found.append(f"{side.name} holds several {text}; its medians say nothing of one")
    counts = [len(side.records) for side in (a, b)]
    if min(counts) < 3:
        found.append("times of one or two runs each: three or more a side give medians")
    return found


def different(a: Side, b: Side, key: str) -> bool:
    """Whether both sides say something of a fact, and not the same."""
    one, two = _told(a.records, key), _told(b.records, key)
    return bool(one) and bool(two) and one != two


def _told(records: Sequence[Record], key: str) -> list[str]:
    """The different values of a fact, as text, in order."""
    values = [r[key] for r in records if r.get(key) is not None]
    return sorted({v if isinstance(v, str) else json.dumps(v, sort_keys=True) for v in values})


def _quote(values: Sequence[str]) -> str:
    text = ", ".join(values)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…"


def _recipes(a: Side, b: Side) -> list[str]:
    """Which knobs differ, where both sides know their recipe."""
    if not different(a, b, "recipe_hash"):
        return []
    one, two = (_flat(side.records[0]) for side in (a, b))
    changed = [
        f"{key} {one.get(key, 'default')} → {two.get(key, 'default')}"
        for key in sorted({*one, *two})
        if one.get(key) != two.get(key)
    ]
    return [f"other recipes: {_listed(changed) or 'in what the records do not hold'}"]


def _listed(parts: Sequence[str], most: int = 6) -> str:
    more = f", and {len(parts) - most} more" if len(parts) > most else ""
    return ", ".join(parts[:most]) + more


def _flat(record: Record) -> dict[str, Any]:
    """A record's recipe, ``train.epochs: 3``."""
    flat: dict[str, Any] = {}

    def visit(value: Any, place: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(inner, f"{place}.{key}" if place else str(key))
        else:
            flat[place] = value

    visit({**_mapping(record.get("recipe")), "strategy": record.get("strategy")}, "")
    return flat


def _versions(a: Side, b: Side) -> list[str]:
    one, two = (_mapping(side.records[0].get("versions")) for side in (a, b))
    changed = [f"{name} {one[name]} → {two[name]}" for name in one
               if name in two and one[name] != two[name]]  # fmt: skip
    return [f"other versions: {_listed(changed)}"] if changed else []


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def rows_of(compared: Sequence[Compared], a: Side, b: Side) -> list[tuple[str, ...]]:
    """A table's cells, the heads first."""
    rows: list[tuple[str, ...]] = [("", a.name, b.name, "B/A", "B − A")]
    for one in compared:
        if not any(figure and figure.high for figure in (one.a, one.b)) and "memory." in one.name:
            continue  # a place that no phase takes anything of
        rows.append((
            title(one.name), cell(one.name, one.a), cell(one.name, one.b),
            "" if one.ratio is None else f"{one.ratio:.3f}",
            "" if one.difference is None else shown(one.name, one.difference, signed=True),
        ))  # fmt: skip
    return rows


def cell(name: str, figure: Figure | None) -> str:
    """A median, with the spread where several were measured."""
    if figure is None:
        return "–"
    text = shown(name, figure.median)
    if figure.count == 1 or figure.low == figure.high:
        return text
    return f"{text} ({shown(name, figure.low)}–{shown(name, figure.high)})"


def to_dict(compared: Sequence[Compared], a: Side, b: Side) -> dict[str, Any]:
    """Plain values for JSON."""
    return {
        "a": {"name": a.name, "records": len(a.records)},
        "b": {"name": b.name, "records": len(b.records)},
        "figures": {one.name: {k: v for k, v in asdict(one).items() if k != "name"}
                    for one in compared},
        "warnings": warnings(a, b),
    }  # fmt: skip
