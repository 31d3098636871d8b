"""Which rows are trained on and which are held out, and how many: always the same by the seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from qft.data.classify import label_names
from qft.data.examples import NumberedRow
from qft.errors import DataError

_Item = TypeVar("_Item")


def split_rows(rows: Sequence[_Item], share: float, seed: int) -> tuple[list[_Item], list[_Item]]:
    """Splits rows into those to train on and those to hold out.

    The same rows, share and seed give the same split on every machine; both parts keep the order.

    Args:
        share: of the rows to hold out, in (0, 1); at least one row on either side.

    Raises:
        DataError: there are fewer than two rows.
    """
    if len(rows) < 2:
        raise DataError(
            "One row cannot be parted into training and held-out rows.",
            where="data.eval_share",
            found=f"{len(rows)} row",
            fix="more rows, or rows of their own in data.eval",
        )
    count = min(max(1, round(len(rows) * share)), len(rows) - 1)
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    kept = [row for i, row in enumerate(rows) if i not in chosen]
    return kept, [row for i, row in enumerate(rows) if i in chosen]


def split_fold(
    rows: Sequence[_Item], fold: str, seed: int, label: str | None = None
) -> tuple[list[_Item], list[_Item]]:
    """The rows outside and inside one fold; every row is in exactly one of the folds.

    Args:
        fold: ``2/5``, the second of five.
        label: the column by which each fold gets its share of every class.

    Raises:
        DataError: there is no such fold, or too few rows.
    """
    number, count = (int(part) for part in fold.split("/"))
    if not 1 <= number <= count or count < 2 or count > len(rows):
        raise DataError("There is no such fold.", where="data.fold", found=f"{fold} of "
                        f"{len(rows)} rows", fix="1/5 … 5/5, say")  # fmt: skip
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    if label is not None:
        order.sort(key=lambda i: str(rows[i][1][label]))  # type: ignore[index]
    inside = set(order[number - 1 :: count])
    kept = [row for i, row in enumerate(rows) if i not in inside]
    return kept, [row for i, row in enumerate(rows) if i in inside]


def require_foldable(rows: Sequence[NumberedRow], label: str | None) -> None:
    """Refuses a class that a fold would take out of the training rows altogether.

    Args:
        label: the classes' column; None for a task without.

    Raises:
        DataError: a class has one row.
    """
    if label is None:
        return
    found = Counter(name for n, row in rows for name in set(label_names(row[label], n)))
    single = sorted(name for name, count in found.items() if count == 1)
    if single:
        raise DataError(
            "A class has one row only, so the fold that holds it out has none to train on.",
            where=f"data.fold, column {label!r}",
            found=", ".join(map(repr, single[:8])),
            fix="more rows of it, leave the row out, or name all classes in data.labels",
        )


def limited(
    rows: list[NumberedRow], limit: int | str | None, columns: Mapping[str, str], seed: int
) -> list[NumberedRow]:
    """The first rows, or as many of each class, drawn by the seed; the order stays."""
    if not isinstance(limit, str):
        return rows[:limit]
    if "label" not in columns:
        raise DataError("Only rows with a class can be limited by class.",
                        where="data.limit", found=limit, fix="a number of rows")  # fmt: skip
    wanted = int(limit.split(" ")[0])
    places: dict[str, list[int]] = {}
    for place, (_, row) in enumerate(rows):
        places.setdefault(str(row[columns["label"]]), []).append(place)
    generator = random.Random(seed)
    chosen = {
        place
        for name in sorted(places)
        for place in generator.sample(places[name], min(wanted, len(places[name])))
    }
    return [row for place, row in enumerate(rows) if place in chosen]


def split_text(
    row: Mapping[str, Any], column: str, share: float
) -> tuple[list[NumberedRow], list[NumberedRow]]:
    """Holds out the end of a single text, from a line's beginning if there is one near."""
    text = row[column]
    middle = int(len(text) * (1 - share)) if isinstance(text, str) else 0
    if not 0 < middle < len(text):
        raise DataError(
            "The text is too short to hold a part of it out.",
            where="data.eval_share",
            fix="a text of its own in data.eval",
        )
    line_end = text.rfind("\n", middle // 2, middle)
    border = middle if line_end < 0 else line_end + 1
    return [(1, {column: text[:border]})], [(1, {column: text[border:]})]
