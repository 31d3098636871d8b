"""What a teacher cache takes and holds: foreseen from counts and a few examples, then measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qft.data.examples import Example
from qft.distillation.kept import Kept
from qft.distillation.lesson_coding import coverage
from qft.distillation.lesson_store import LessonReader
from qft.distillation.lessons import Lesson
from qft.progress import human_bytes


def probe_of(ordered: Sequence[Example]) -> list[Example]:
    """A handful of examples: the longest, the shortest, and some between them.

    Args:
        ordered: by length.
    """
    last = len(ordered) - 1
    return [ordered[place] for place in sorted({last * part // 4 for part in range(5)})]


def foreseen(
    kept: Kept, ordered: Sequence[Example], probe: Sequence[Example], made: Sequence[Lesson]
) -> dict[str, Any]:
    """What a cache will take and hold, about.

    Args:
        ordered: all examples.
        probe: some of them.
        made: their lessons, encoded.
    """
    taken = sum(tensor.nbytes for lesson in made for tensor in lesson.values())
    rows = sum(kept.rows(example) for example in ordered)
    per_row = taken / max(1, sum(kept.rows(example) for example in probe))
    return {
        "rows": rows,
        "bytes": round(rows * per_row),
        "bytes_per_row": per_row,
        "coverage": coverage(made),
    }


def measured(kept: Kept, ordered: Sequence[Example], reader: LessonReader) -> dict[str, Any]:
    """What a whole cache takes and holds."""
    rows = sum(kept.rows(example) for example in ordered)
    return {
        "rows": rows,
        "bytes": reader.bytes(),
        "bytes_per_row": reader.bytes() / max(1, rows),
        "coverage": coverage([{"rest": part} for part in reader.whole("rest")]),
    }


def sentence(kept: Kept, figures: dict[str, Any]) -> str:
    """The figures in words."""
    unit = "supervised tokens" if kept.predicts == "tokens" else "rows"
    what = f"{figures['rows']:,} {unit} x {figures['bytes_per_row']:,.1f} bytes"
    text = f"{what} = {human_bytes(figures['bytes'])}"
    if figures["coverage"] is not None:
        text += f"; the {kept.count} likeliest tokens have {figures['coverage']:.2%} of the mass"
    return text
