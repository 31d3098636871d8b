"""The task whose answer is a span of a given text, in SQuAD's schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qft.data.columns import text_in
from qft.data.encoding import require_offsets
from qft.data.examples import EncodeSettings, Example, NumberedRow, Task, padded_inputs
from qft.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase as Tokenizer

Span = tuple[int, int]  # characters of the context, the second past the end


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a row's context, as long as the model takes; what answers are read from.

    Attributes:
        row: the row's number in its source.
        number: the example's own.
        context: the whole context.
        offsets: for each token the characters it stands for; None outside the context.
        none_at: the position that means "no answer here".
        answers: every accepted answer of the row; none where the question has no answer.
    """

    row: int
    number: int
    context: str
    offsets: tuple[Span | None, ...]
    none_at: int
    answers: tuple[str, ...]


class ExtractTask(Task):
    """A question and a context; the answer is a span of the context, or nothing."""

    name = "extract"
    predicts = "span"

    def flatten(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """SQuAD's articles and paragraphs as one row a question; flat rows as they are."""
        if not rows or not all(isinstance(row.get("paragraphs"), list) for row in rows):
            return list(rows)
        return [
            {"context": paragraph.get("context"), **question}
            for row in rows
            for paragraph in row["paragraphs"]
            for question in paragraph.get("qas", [])
        ]

    def encode(
        self,
        rows: Sequence[NumberedRow],
        tokenizer: Tokenizer,
        settings: EncodeSettings,
        notes: list[str],
    ) -> list[Example]:
        """One example a window; a context longer than the model takes has several."""
        require_offsets(tokenizer)
        examples: list[Example] = []
        for number, row in rows:
            examples += self._windows(number, row, tokenizer, settings, len(examples))
        if len(examples) > len(rows):
            notes.append(f"{len(rows)} questions became {len(examples)} windows of at most "
                         f"{settings.max_length} tokens")  # fmt: skip
        return examples

    def _windows(
        self,
        number: int,
        row: Mapping[str, Any],
        tokenizer: Tokenizer,
        settings: EncodeSettings,
        first: int,
    ) -> Iterator[Example]:
        question = text_in(row, settings.columns["question"], number).strip()
        context = text_in(row, settings.columns["context"], number)
        spans = read_answers(row, settings.columns["answers"], context, number)
        stride = _stride(tokenizer, question, number, settings)
        encoded: Any = tokenizer(
            question, context, truncation="only_second", max_length=settings.max_length,
            stride=stride, return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        extra = [name for name in ("token_type_ids",) if name in encoded]
        for part, ids in enumerate(encoded["input_ids"]):
            sides = encoded.sequence_ids(part)
            offsets = tuple(
                span if side == 1 else None
                for span, side in zip(encoded["offset_mapping"][part], sides, strict=True)
            )
            if not any(span is not None for span in offsets):
                raise DataError("A context has no tokens.", where=f"row {number}")
            none_at = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
            inputs = {"input_ids": ids, **{name: encoded[name][part] for name in extra}}
            inputs["labels"] = list(_places(offsets, spans[:1], none_at))
            answers = tuple(context[start:end] for start, end in spans)
            index = settings.index_offset + first + part
            truth = Window(number, index, context, offsets, none_at, answers)
            yield Example(index, inputs, truth=truth)

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
        """Inputs ``[batch, longest]``, `start_positions` and `end_positions` ``[batch]``."""
        import torch

        batch = padded_inputs(examples, pad_token_id)
        places = torch.tensor([example.inputs["labels"] for example in examples])
        return {**batch, "start_positions": places[:, 0], "end_positions": places[:, 1]}

    def label_count(self, batch: Mapping[str, Tensor]) -> int:
        """The windows."""
        return int(batch["start_positions"].shape[0])


def _stride(tokenizer: Tokenizer, question: str, number: int, settings: EncodeSettings) -> int:
    """How many tokens two windows share: as asked, but less than half of a window."""
    asked: Any = tokenizer(question, add_special_tokens=False)["input_ids"]
    room = settings.max_length - len(asked) - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 8:
        raise DataError(
            "A question leaves no room for its context.",
            where=f"row {number}",
            found=f"{len(asked)} tokens of {settings.max_length}",
            fix=f"train.max_length={len(asked) + 64} or more, or take the row out",
        )
    return min(settings.stride, room // 2)


def _places(offsets: Sequence[Span | None], spans: Sequence[Span], none_at: int) -> tuple[int, int]:
    """First and last token of the answer; ``none_at`` twice where the window does not hold it."""
    if not spans:
        return none_at, none_at
    start, end = spans[0]
    tokens = [
        place
        for place, span in enumerate(offsets)
        if span is not None and span[0] < end and span[1] > start
    ]
    if not tokens:
        return none_at, none_at
    first, last = offsets[tokens[0]], offsets[tokens[-1]]
    assert first is not None
    assert last is not None
    inside = [span for span in offsets if span is not None]
    cut_off = (inside[0] == first and first[0] > start) or (inside[-1] == last and last[1] < end)
    return (none_at, none_at) if cut_off else (tokens[0], tokens[-1])


def read_answers(row: Mapping[str, Any], column: str, context: str, number: int) -> list[Span]:
    """The accepted answers' places, in the order written; none for an unanswerable question.

    Known forms: ``[{"text": …, "answer_start": …}, …]``, ``{"text": […], "answer_start": […]}``,
    and a plain text that the context holds exactly once.

    Raises:
        DataError: another form, or an answer that is not where it says.
    """
    value, where = row[column], f"row {number}, column {column!r}"
    if isinstance(value, str):
        value = [{"text": value, "answer_start": _only_place(value, context, where)}]
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, (list, tuple)) or not isinstance(starts, (list, tuple)):
            raise _no_answer(value, where)
        pairs = list(zip(texts, starts, strict=False))
    elif isinstance(value, (list, tuple)) and all(isinstance(a, Mapping) for a in value):
        pairs = [(answer.get("text"), answer.get("answer_start")) for answer in value]
    else:
        raise _no_answer(value, where)
    if row.get("is_impossible") is True:
        return []
    return [_span(text, start, context, where) for text, start in pairs]


def _span(text: Any, start: Any, context: str, where: str) -> Span:
    if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
        raise _no_answer({"text": text, "answer_start": start}, where)
    if not text.strip() or start < 0 or context[start : start + len(text)] != text:
        raise DataError(
            "An answer is not in the context where it says.",
            where=where,
            found=f"{text!r:.60} at {start}; there is "
            f"{context[max(0, start) : max(0, start) + len(text)]!r:.60}",
            fix="answer_start counts the context's characters from 0",
        )
    return start, start + len(text)


def _only_place(text: str, context: str, where: str) -> int:
    count = context.count(text) if text.strip() else 0
    if count != 1:
        raise DataError(
            "An answer without a place must be in its context exactly once.",
            where=where,
            found=f"{text!r:.60}, {count} times",
            fix='{"text": ["…"], "answer_start": [character]}',
        )
    return context.index(text)


def _no_answer(value: Any, where: str) -> DataError:
    return DataError(
        "An answer is a text and where it begins.",
        where=where,
        found=f"{value!r:.80}",
        fix='{"text": ["…"], "answer_start": [character]}',
    )
