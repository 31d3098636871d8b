"""The rows that pruning looks at: some to score parts by, others to judge the result on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qft import models
from qft.calibration import collated, drawn
from qft.data.examples import fingerprint
from qft.data.tasks import TASKS, Example, ExampleSet, Task, load_train_eval, pad_id
from qft.errors import RecipeError
from qft.recipe import build_recipe

HELD_OUT_SHARE = 0.2  # of a calibration file without a file of held-out rows beside it


@dataclass(frozen=True)
class CalibrationRows:
    """Rows to score by and rows to judge by; none is both.

    Attributes:
        scored: drawn by the seed from all that are not held out.
        held_out: empty where the user wants no report.
        labels: the classes or tags; None for other tasks.
        notes: what a person should know, a sentence each.
    """

    task: Task
    pad_token_id: int
    scored: list[Example]
    held_out: list[Example]
    labels: tuple[str, ...] | None
    notes: list[str]

    def batches(self) -> list[dict[str, Tensor]]:
        """The scored rows collated, like lengths together; the longest first."""
        return collated(self.task, self.scored, self.pad_token_id)

    def fingerprints(self) -> dict[str, str]:
        """Of both kinds of rows, as they are encoded."""
        return {"scored": fingerprint(self.scored), "held_out": fingerprint(self.held_out)}


def open_rows(
    folder: Path,
    task: str,
    data: str | None,
    *,
    held_out: str | None = None,
    rows: int = 128,
    held_out_rows: int = 64,
    max_length: int = 512,
    columns: dict[str, str | int] | None = None,
    seed: int = 0,
) -> CalibrationRows:
    """Reads the user's own rows as a training on ``task`` would.

    Args:
        folder: the model, whose tokenizer and classes count.
        data: rows to score by; None where there are rows to judge by only.
        held_out: rows to judge by; None holds out a share of ``data``.
        rows: at most so many are scored, drawn by ``seed``.
        held_out_rows: at most so many judge.
        max_length: longest sequence in tokens; longer rows are cut.

    Raises:
        DataError: the rows cannot be read or do not fit the task.
        RecipeError: there is no such task.
    """
    if task not in TASKS or task == "seq2seq":
        raise RecipeError("Pruning cannot calibrate on this task.", where="--task", found=task,
                          fix=", ".join(name for name in TASKS if name != "seq2seq"))  # fmt: skip
    config = models.read_config(folder)
    labels, kind = models.labels_in(config) if task in ("classify", "token") else (None, "auto")
    tokenizer = models.open_tokenizer(folder)
    limit = models.longest_input(folder, models.ModelSpec(str(folder), task))
    settings: dict[str, Any] = {
        "train": data or held_out, "eval": held_out if data else None,
        "eval_share": 0.0 if held_out else HELD_OUT_SHARE,
        "columns": columns or {}, "too_long": "truncate",
    }  # fmt: skip
    if labels is not None and len(labels) > 1 and not _is_placeholder(labels):
        settings |= {"labels": labels, "labels_are": kind}
    recipe = build_recipe(
        {
            "model": str(folder), "task": task, "data": settings, "strategy": "lora",
            "train": {"max_length": min(max_length, limit or max_length), "seed": seed},
            "output": "unused",
        },
        where="qft prune",
    )  # fmt: skip
    scored, held = load_train_eval(recipe, tokenizer)
    apart, notes = _without_repeats(scored, held) if data else (scored.examples, [])
    return CalibrationRows(
        TASKS[task],
        pad_id(tokenizer),
        drawn(scored.examples, rows, seed),
        drawn(apart, held_out_rows, seed + 1),
        scored.labels,
        [*scored.notes, *notes],
    )


def _is_placeholder(labels: Sequence[str]) -> bool:
    return all(label == f"LABEL_{number}" for number, label in enumerate(labels))


def _without_repeats(
    scored: ExampleSet, held: ExampleSet | None
) -> tuple[list[Example], list[str]]:
    """Held-out rows that are not among those to score by, whatever their numbers."""
    if held is None:
        return [], []
    known = {tuple(example.inputs["input_ids"]) for example in scored.examples}
    apart = [e for e in held.examples if tuple(e.inputs["input_ids"]) not in known]
    repeated = len(held.examples) - len(apart)
    if not repeated:
        return apart, []
    return apart, [f"{repeated} held-out rows left out: they are calibration rows too"]
