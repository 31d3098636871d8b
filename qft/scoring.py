"""`qft eval`: metrics of any model on held-out rows."""

from __future__ import annotations

from pathlib import Path

from qft import models
from qft.data.tasks import TASKS, pad_id
from qft.errors import RecipeError
from qft.evaluation import evaluate
from qft.held_out import held_out_examples
from qft.opening import open_any
from qft.progress import QUIET, Reporter


def score(
    source: str,
    *,
    data: str | None = None,
    task: str | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    columns: dict[str, str | int] | None = None,
    too_long: str | None = None,
    base: str | None = None,
    strategy: str | None = None,
    trust: models.Trust | None = None,
    reporter: Reporter = QUIET,
) -> dict[str, float]:
    """Opens ``source`` and evaluates it.

    Args:
        source: a run, adapter, model, GGUF export or hub id.
        data: rows; a run knows its own held-out ones.
        task: where the model does not say.

    Raises:
        QftError: the model or the rows cannot be opened.
    """
    opened = open_any(source, base=base, strategy=strategy, task=task, trust=trust)
    if opened.task not in TASKS:
        raise RecipeError("No such task.", where="--task", found=opened.task,
                          fix=", ".join(TASKS))  # fmt: skip
    rows = held_out_examples(
        Path(source),
        opened.tokenizer,
        task=opened.task,
        labels=opened.labels,
        labels_are=opened.labels_are,
        data=data,
        columns=columns,
        max_length=max_length,
        limit=limit,
        too_long=too_long,
    )
    for note in rows.notes:
        reporter.say(note)
    with reporter.bar("evaluate", len(rows.examples)) as bar:
        return evaluate(
            opened.model,
            rows.examples,
            TASKS[opened.task],
            pad_token_id=pad_id(opened.tokenizer),
            labels=rows.labels,
            progress=bar.advance,
        )
