"""The task whose label is a class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qft.data.columns import text_in
from qft.data.examples import (
    EncodeSettings,
    Example,
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
    """One text, one class."""

    name = "classify"
    predicts = "class"

    def classes(self, rows: Sequence[NumberedRow], columns: Mapping[str, str]) -> tuple[str, ...]:
        """The classes in the rows, sorted: numbers as numbers, else by their names.

        Raises:
            DataError: fewer than two, or a value that is no class.
        """
        found = sorted({label_name(row[columns["label"]], number) for number, row in rows})
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
        """One example a row; `labels` is the class's place in ``settings.labels``."""
        assert settings.labels is not None
        place = {name: i for i, name in enumerate(settings.labels)}
        encoded: list[tuple[list[int], int]] = []
        for number, row in rows:
            text = text_in(row, settings.columns["text"], number)
            label = label_name(row[settings.columns["label"]], number)
            if label not in place:
                raise DataError(
                    "A label is none of the classes.",
                    where=f"row {number}, column {settings.columns['label']!r}",
                    found=f"{label!r:.80}; the classes are {', '.join(settings.labels)}",
                    fix="correct the row, or name all classes in data.labels before training",
                )
            encoded.append((self._tokens(tokenizer, text), place[label]))
        numbers = [number for number, _ in rows]
        dropped = fit_lengths([len(ids) for ids, _ in encoded], numbers, settings, notes)
        examples = []
        for position, (ids, label_id) in enumerate(encoded):
            if position in dropped:
                continue
            if len(ids) > settings.max_length:
                text = text_in(rows[position][1], settings.columns["text"], numbers[position])
                ids = self._tokens(tokenizer, text, truncation=True, max_length=settings.max_length)
            if not ids:
                raise DataError("A text has no tokens.", where=f"row {numbers[position]}")
            index = settings.index_offset + position
            examples.append(Example(index, {"input_ids": ids, "labels": label_id}))
        return examples

    def _tokens(self, tokenizer: Tokenizer, text: str, **cut: Any) -> list[int]:
        """With the tokenizer's special tokens; where it cuts, it cuts the text between them."""
        encoded: Any = tokenizer(text, add_special_tokens=True, verbose=False, **cut)
        return list(encoded["input_ids"])

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
        """See `Task.collate`; `labels` are ``[batch]``."""
        import torch

        batch = padded_inputs(examples, pad_token_id)
        labels = [example.inputs["labels"] for example in examples]
        batch["labels"] = torch.tensor(labels, dtype=torch.int64)
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


def _number(name: str) -> float | None:
    try:
        value = float(name)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
