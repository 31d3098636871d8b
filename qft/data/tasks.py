"""From a source to examples: the tasks by name, and the two ways to load their data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qft.data.augment import augmented
from qft.data.classify import ClassifyTask
from qft.data.columns import find_columns
from qft.data.embed import EmbedTask
from qft.data.encoding import pad_id
from qft.data.examples import (
    EncodeSettings,
    Example,
    ExampleSet,
    LabelKind,
    NumberedRow,
    Task,
    fingerprint,
)
from qft.data.extract import ExtractTask
from qft.data.language import ChatTask, InstructTask, TextTask
from qft.data.seq2seq import Seq2SeqTask
from qft.data.sources import read_rows
from qft.data.splits import limited, require_foldable, split_fold, split_rows, split_text
from qft.data.tagging import TokenTask
from qft.errors import DataError
from qft.recipe import Data, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = [
    "TASKS",
    "Example",
    "ExampleSet",
    "Task",
    "encode_rows",
    "load_examples",
    "load_train_eval",
    "pad_id",
    "split_fold",
    "split_rows",
]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        TextTask(),
        InstructTask(),
        ChatTask(),
        Seq2SeqTask(),
        ClassifyTask(),
        ExtractTask(),
        TokenTask(),
        EmbedTask(),
    )
}


def load_examples(
    task_name: str,
    source: str,
    tokenizer: Tokenizer,
    *,
    data: Data,
    max_length: int,
    labels: tuple[str, ...] | None = None,
    limit: int | None = None,
    index_offset: int = 0,
    split: str = "train",
    packed: bool = False,
) -> ExampleSet:
    """Reads and encodes one source.

    Args:
        task_name: a key of ``TASKS``.
        source: file, folder or hub id; ``data.train`` and ``data.eval`` are not looked at.
        data: columns, classes, and what happens to rows that are too long.
        max_length: longest sequence in tokens.
        labels: the classes of the model; else ``data.labels``, else those of the rows.
        limit: at most so many rows.
        index_offset: number of the first example.
        split: of a hub data set.
        packed: as `train.packing` says.

    Raises:
        DataError: the data cannot be read or does not fit the task.
    """
    rows, columns = _read(task_name, source, data, limit=limit, split=split)
    return _encode(
        task_name,
        rows,
        columns,
        tokenizer,
        data=data,
        max_length=max_length,
        labels=labels,
        index_offset=index_offset,
        source=source,
        packed=packed,
    )


def encode_rows(
    recipe: Recipe, rows: Sequence[NumberedRow], tokenizer: Tokenizer, source: str
) -> ExampleSet:
    """Training examples of rows that are there already, as a recipe's own would be read.

    Args:
        source: what errors call them.

    Raises:
        DataError: they do not fit the task.
    """
    return _encode(
        recipe.task,
        rows,
        find_columns(recipe.task, [row for _, row in rows], recipe.data.columns),
        tokenizer,
        data=recipe.data,
        max_length=recipe.train.max_length,
        source=source,
        packed=recipe.train.packing,
    )


def load_train_eval(recipe: Recipe, tokenizer: Tokenizer) -> tuple[ExampleSet, ExampleSet | None]:
    """The training examples of a recipe and the held-out ones, if it has any.

    The held-out rows are encoded with the training rows' classes. With ``eval_share`` the rows to
    hold out are drawn by the recipe's seed before any limit, so that a smaller ``limit`` never
    moves a row from one side to the other.

    Raises:
        DataError: the data cannot be read or does not fit the task.
    """
    data, task_name, max_length = recipe.data, recipe.task, recipe.train.max_length
    seed = recipe.train.seed
    shared = data.fold is not None or (data.eval is None and data.eval_share > 0)
    plain = isinstance(data.limit, int) and not shared
    rows, columns = _read(
        task_name,
        data.train,
        data,
        limit=data.limit if plain else None,  # type: ignore[arg-type]
        split="train",
    )
    held_out: list[NumberedRow] | None = None
    if shared:
        if data.fold is not None:
            if (
                data.labels is None
                and _label_kind(TASKS[task_name], rows, columns, data) != "number"
            ):
                require_foldable(rows, columns.get("label"))
            rows, held_out = split_fold(rows, data.fold, seed, columns.get("label"))
        elif task_name == "text" and len(rows) == 1:
            rows, held_out = split_text(rows[0][1], columns["text"], data.eval_share)
        else:
            rows, held_out = split_rows(rows, data.eval_share, seed)
        held_out = held_out[: data.eval_limit]
    rows = limited(rows, data.limit, columns, seed)
    if data.augment.copies:
        texts = [columns[role] for role in ("text", "text_pair") if role in columns]
        mask_token: Any = getattr(tokenizer, "mask_token", None)
        rows = augmented(rows, texts, data.augment, seed=seed, mask_token=mask_token)
    packed = recipe.train.packing
    training = _encode(
        task_name,
        rows,
        columns,
        tokenizer,
        data=data,
        max_length=max_length,
        source=data.train,
        packed=packed,
    )
    data = data.model_copy(update={"labels_are": training.labels_are})
    if held_out is not None:
        held = _encode(
            task_name,
            held_out,
            columns,
            tokenizer,
            data=data,
            max_length=max_length,
            labels=training.labels,
            source=f"{data.train} (held out)",
            packed=packed,
        )
        return training, held
    if data.eval is None:
        return training, None
    held = load_examples(
        task_name,
        data.eval,
        tokenizer,
        data=data,
        max_length=max_length,
        labels=training.labels,
        limit=data.eval_limit,
        split="validation",
        packed=packed,
    )
    return training, held


def _read(
    task_name: str, source: str, data: Data, *, limit: int | None, split: str
) -> tuple[list[NumberedRow], dict[str, str]]:
    task = TASKS[task_name]
    nested = type(task).flatten is not Task.flatten
    found = read_rows(source, columns=data.columns, limit=None if nested else limit, split=split)
    rows = task.flatten(found)[:limit] if nested else found
    try:
        columns = find_columns(task_name, rows, data.columns)
    except DataError as error:
        where = source if error.where is None else f"{source}: {error.where}"
        raise DataError(error.what, where=where, found=error.found, fix=error.fix) from None
    return list(enumerate(rows, start=1)), columns


def _encode(
    task_name: str,
    rows: Sequence[NumberedRow],
    columns: Mapping[str, str],
    tokenizer: Tokenizer,
    *,
    data: Data,
    max_length: int,
    source: str,
    labels: tuple[str, ...] | None = None,
    index_offset: int = 0,
    packed: bool = False,
) -> ExampleSet:
    task = TASKS[task_name]
    notes: list[str] = []
    try:
        kind = _label_kind(task, rows, columns, data)
        classes = None
        if task.predicts in ("class", "tags") and kind != "number":
            classes = labels or data.labels or task.classes(rows, columns)
        settings = EncodeSettings(
            columns,
            max_length,
            data.too_long,
            classes,
            index_offset,
            data.supervise,
            kind,
            data.stride,
            packed,
        )
        made = task.encode(rows, tokenizer, settings, notes)
    except DataError as error:
        where = source if error.where is None else f"{source}: {error.where}"
        raise DataError(error.what, where=where, found=error.found, fix=error.fix) from None
    examples = [example for example in made if not example.lost]
    lost = len(made) - len(examples)
    if lost:
        notes.append(f"{lost} of {len(made)} rows dropped: the cut left nothing to learn")
    if not examples:
        raise DataError(
            "No usable example is left.",
            where=source,
            found="; ".join(notes) or f"{len(rows)} rows without text",
            fix="a longer train.max_length, or other rows",
        )
    documents: tuple[str, ...] = ()
    if task_name == "text":
        texts = [row[columns["text"]].strip() for _, row in rows]
        documents = tuple(hashlib.sha256(text.encode()).hexdigest() for text in texts if text)
    return ExampleSet(examples, classes, notes, fingerprint(examples), kind, lost, documents)


def _label_kind(
    task: Task, rows: Sequence[NumberedRow], columns: Mapping[str, str], data: Data
) -> LabelKind:
    if not isinstance(task, ClassifyTask):
        return "one"
    if data.labels_are != "auto":
        return data.labels_are
    return "one" if data.labels and not _any_list(rows, columns) else task.kind_of(rows, columns)


def _any_list(rows: Sequence[NumberedRow], columns: Mapping[str, str]) -> bool:
    return any(isinstance(row[columns["label"]], (list, tuple)) for _, row in rows)
