"""A few training rows as the model is given them, kept in the run folder when a training begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qft.data.encoding import UNSUPERVISED
from qft.data.examples import Example, ExampleSet
from qft.data.preflight import shown_example
from qft.files import write_json
from qft.inputs import Inputs

SAMPLES = "samples.json"
_TOKENS = 320  # of a row; the rest is left out
_CHARACTERS = 4000  # of a piece: one token may be long
_LOOKED_AT = 2000  # rows, for the one with the fewest labels


def write_samples(folder: Path, inputs: Inputs, notes: Sequence[str] = ()) -> None:
    """Writes samples.json: rows with their masks, counts of the data, notes.

    Args:
        folder: of the run.
        notes: what a person should know, beside what `inputs` has noted.
    """
    parts = {"train": inputs.train, **({"eval": inputs.held_out} if inputs.held_out else {})}
    write_json(
        folder / SAMPLES,
        {
            "rows": [
                {"example": example.index + 1, "why": why, **_shown(example, inputs)}
                for why, example in chosen_rows(inputs.train.examples)
            ],
            "data": {name: _counts(part) for name, part in parts.items()},
            "notes": [*inputs.notes, *notes],
        },
    )


def chosen_rows(examples: Sequence[Example]) -> list[tuple[str, Example]]:
    """What is worth looking at, each row once: an ordinary one and the extremes."""
    if not examples:
        return []
    chosen = {
        "the first": examples[0],
        "from the middle": examples[len(examples) // 2],
        "the longest": max(examples, key=lambda e: len(e.inputs["input_ids"])),
        "the fewest supervised tokens": min(examples[:_LOOKED_AT], key=_labels),
    }
    once: dict[int, tuple[str, Example]] = {}
    for why, example in chosen.items():
        once.setdefault(example.index, (why, example))
    return list(once.values())


def _labels(example: Example) -> int:
    labels = example.inputs["labels"]
    return sum(label != UNSUPERVISED for label in labels) if isinstance(labels, list) else 1


def _shown(example: Example, inputs: Inputs) -> dict[str, Any]:
    label = _label(example, inputs.train)
    if label is not None:  # nothing within the row is a label
        example = replace(example, inputs=example.inputs | {"labels": 0})
    shown = shown_example(example, inputs.tokenizer, _TOKENS)
    pieces = [[text[:_CHARACTERS], supervised] for text, supervised in shown["pieces"]]
    return {
        "pieces": pieces,
        "tokens": shown["tokens"],
        "supervised": shown["supervised"],
        "cut": shown["tokens"] > _TOKENS or any(len(p[0]) > _CHARACTERS for p in shown["pieces"]),
        "label": label,
    }


def _label(example: Example, rows: ExampleSet) -> str | None:
    """Of the whole row, where it has one."""
    labels, names = example.inputs["labels"], rows.labels
    if rows.labels_are == "many" and isinstance(labels, list):
        held = [number for number, on in enumerate(labels) if on]
        return ", ".join(_name(number, names) for number in held) or "none of them"
    return None if isinstance(labels, (list, tuple)) else _name(labels, names)


def _name(label: float, names: tuple[str, ...] | None) -> str:
    known = names is not None and isinstance(label, int) and 0 <= label < len(names)
    return names[int(label)] if known and names is not None else f"{label:g}"


def _counts(part: ExampleSet) -> dict[str, int]:
    lengths = [len(example.inputs["input_ids"]) for example in part.examples]
    return {"examples": len(lengths), "tokens": sum(lengths), "longest": max(lengths, default=0)}
