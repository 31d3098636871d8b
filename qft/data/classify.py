"""The task whose label is of the whole row: a class, several at once, or a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qft.data.columns import text_in
from qft.data.examples import (
    EncodeSettings,
    Example,
    LabelKind,
    NumberedRow,
    Task,
    fit_lengths,
    padded_inputs,
)
from qft.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase as Tokenizer


class ClassifyTask(Task):
    """A text (or two); one class, several classes, or a number."""

    name = "classify"
    predicts = "class"

    def kind_of(self, rows: Sequence[NumberedRow], columns: Mapping[str, str]) -> LabelKind:
        """What the labels are by their looks: lists are several, fractions are numbers."""
        labels = [row[columns["label"]] for _, row in rows]
        if any(isinstance(label, (list, tuple)) for label in labels):
            return "many"
        numbers = [_number(str(label)) for label in labels if not isinstance(label, bool)]
        fractions = any(n is not None and not n.is_integer() for n in numbers)
        return "number" if fractions and None not in numbers else "one"

    def classes(self, rows: Sequence[NumberedRow], columns: Mapping[str, str]) -> tuple[str, ...]:
        """The classes in the rows, sorted: numbers as numbers, else by their names.

        Raises:
            DataError: fewer than two, or a value that is no class.
        """
        cells = [(number, row[columns["label"]]) for number, row in rows]
        found = sorted({name for number, cell in cells for name in label_names(cell, number)})
        if len(found) < 2:
            raise DataError(
                "The rows have fewer than two classes, so there is nothing to tell apart.",
                where=f"column {columns['label']!r}",
                found=", ".join(found),
                fix="more rows, or all the classes in data.labels",
            )
        values = [_number(name) for name in found]
        if all(value is not None for value in values):
            found.sort(key=lambda name: (_number(name), name))
        return tuple(found)

    def encode(
        self,
        rows: Sequence[NumberedRow],
        tokenizer: Tokenizer,
        settings: EncodeSettings,
        notes: list[str],
    ) -> list[Example]:
        """One example a row.

        Its `labels` is the class's place in ``settings.labels``, a list of 0.0 and 1.0 over all
        classes, or the number.
        """
        encoded: list[tuple[dict[str, Any], int | float | list[float]]] = []
        for number, row in rows:
            label = self._label(row[settings.columns["label"]], number, settings)
            encoded.append((self._tokens(tokenizer, row, number, settings), label))
        numbers = [number for number, _ in rows]
        lengths = [len(inputs["input_ids"]) for inputs, _ in encoded]
        dropped = fit_lengths(lengths, numbers, settings, notes)
        cut = {"truncation": True, "max_length": settings.max_length}
        examples = []
        for position, (inputs, label) in enumerate(encoded):
            if position in dropped:
                continue
            if lengths[position] > settings.max_length:
                number, row = rows[position]
                inputs = self._tokens(tokenizer, row, number, settings, **cut)
            if not inputs["input_ids"]:
                raise DataError("A text has no tokens.", where=f"row {numbers[position]}")
            index = settings.index_offset + position
            examples.append(Example(index, {**inputs, "labels": label}))
        return examples

    def _label(self, cell: Any, number: int, settings: EncodeSettings) -> int | float | list[float]:
        where = f"row {number}, column {settings.columns['label']!r}"
        if settings.labels_are == "number":
            value = None if isinstance(cell, bool) else _number(str(cell))
            if value is None:
                raise DataError("A number is needed here.", where=where, found=f"{cell!r:.80}",
                                fix="correct the row, or data.labels_are: one")  # fmt: skip
            return value
        assert settings.labels is not None
        place = {name: i for i, name in enumerate(settings.labels)}
        one = settings.labels_are == "one"
        names = [label_name(cell, number)] if one else label_names(cell, number)
        for name in names:
            if name not in place:
                raise DataError(
                    "A label is none of the classes.",
                    where=where,
                    found=f"{name!r:.80}; the classes are {', '.join(settings.labels)}",
                    fix="correct the row, or name all classes in data.labels before training",
                )
        if one:
            return place[names[0]]
        return [float(name in names) for name in settings.labels]

    def _tokens(
        self,
        tokenizer: Tokenizer,
        row: Mapping[str, Any],
        number: int,
        settings: EncodeSettings,
        **cut: Any,
    ) -> dict[str, Any]:
        """With the tokenizer's special tokens; where it cuts, it cuts the text between them.

        A second text (a hypothesis, a paraphrase) follows the first as the tokenizer joins pairs.
        """
        pair = "text_pair" in settings.columns
        texts = [text_in(row, settings.columns["text"], number)]
        texts += [text_in(row, settings.columns["text_pair"], number)] if pair else []
        encoded: Any = tokenizer(*texts, add_special_tokens=True, verbose=False, **cut)
        extra = ["token_type_ids"] if pair and "token_type_ids" in encoded else []
        return {name: list(encoded[name]) for name in ["input_ids", *extra]}

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
        """See `Task.collate`; `labels` are ``[batch]``, or ``[batch, classes]`` for several."""
        import torch

        batch = padded_inputs(examples, pad_token_id)
        batch["labels"] = torch.tensor([example.inputs["labels"] for example in examples])
        return batch

    def label_count(self, batch: Mapping[str, Tensor]) -> int:
        """The rows."""
        return int(batch["labels"].shape[0])


def label_name(value: Any, number: int) -> str:
    """A class's name: 1, 1.0 and "1" are one class, as files of different kinds write it.

    Raises:
        DataError: a value that is no single class.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, (str, int)):
        raise DataError(
            "A class is a text or a whole number.",
            where=f"row {number}",
            found=f"{type(value).__name__}: {value!r:.80}",
        )
    return str(value).strip()


def label_names(cell: Any, number: int) -> list[str]:
    """The classes of a cell that may name several.

    Raises:
        DataError: a value that is no class.
    """
    if isinstance(cell, (list, tuple)):
        return [label_name(value, number) for value in cell]
    return [label_name(cell, number)]


def _number(name: str) -> float | None:
    try:
        value = float(name)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
