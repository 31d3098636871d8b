"""`qft eval`: metrics of any model on held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qft import evaluation, hardware, models
from qft.data.tasks import TASKS, pad_id
from qft.errors import RecipeError
from qft.files import write_json_lines
from qft.held_out import held_out_examples
from qft.opening import open_any
from qft.progress import QUIET, Reporter
from qft.written import write_and_score


def evaluate(
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
    dtype: str | None = None,
    generate: bool = False,
    max_new_tokens: int = 128,
    micro_batch: int = 8,
    execute_code: bool = False,
    predictions: Path | None = None,
    reporter: Reporter = QUIET,
) -> dict[str, float]:
    """Opens ``source`` and evaluates it.

    Args:
        source: a run, adapter, model, GGUF export or hub id.
        data: rows; a run knows its own held-out ones.
        task: where the model does not say.
        dtype: to compute in; None is the adapter's own, else what suits the device.
        generate: also let the model write, and compare its texts with the rows'.
        max_new_tokens: of each text.
        micro_batch: texts written at once.
        execute_code: run what it writes against the rows' tests (`qft.code_execution`).
        predictions: a jsonl file to write: prompt, prediction, reference a row.

    Raises:
        QftError: the model or the rows cannot be opened.
    """
    held: dict[str, Any] = {} if dtype is None else {"dtype": hardware.choose(dtype=dtype).dtype}
    opened = open_any(source, base=base, strategy=strategy, task=task, trust=trust, **held)
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
        longest=models.longest_of(opened.model.config),
        limit=limit,
        too_long=too_long,
    )
    for note in [*([opened.note] if opened.note else []), *rows.notes]:
        reporter.say(note)
    if not generate and (execute_code or predictions is not None):
        raise RecipeError("Only texts that are written can be run or kept.",
                          where="--execute-code, --predictions", fix="add --generate")  # fmt: skip
    with reporter.bar("evaluate", len(rows.examples)) as bar:
        metrics = evaluation.evaluate(
            opened.model,
            rows.examples,
            TASKS[opened.task],
            pad_token_id=pad_id(opened.tokenizer),
            labels=rows.labels,
            progress=bar.advance,
        )
    if not generate:
        return metrics
    with reporter.bar("write", len(rows.examples)) as bar:
        scores, texts = write_and_score(
            opened.model,
            opened.tokenizer,
            rows.examples,
            max_new_tokens=max_new_tokens,
            micro_batch=micro_batch,
            execute_code=execute_code,
            progress=bar.advance,
        )
    if predictions is not None:
        write_json_lines(predictions, texts)
    return metrics | scores
