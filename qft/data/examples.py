"""What a task is, and the examples it makes of rows."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from qft.data.encoding import UNSUPERVISED, Encoded
from qft.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase as Tokenizer

TooLong = Literal["error", "truncate", "drop"]
LabelKind = Literal["one", "many", "number"]
NumberedRow = tuple[int, Mapping[str, Any]]  # the number counts the source's rows from 1


@dataclass(frozen=True, slots=True)
class Written:
    """What a language example asks, and the answer that a person wrote.

    Attributes:
        prompt: a text, or the conversation up to the answer.
        reference: the answer.
        row: the whole row, for tests that it may hold.
        tools: what the conversation's template shows of functions to call.
    """

    prompt: str | list[dict[str, Any]]
    reference: str
    row: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One training or evaluation example, not yet padded.

    Attributes:
        index: the example's own number: seeds its dropout, names it in errors.
        inputs: `input_ids` (list of int) and `labels`: a list of int, -100 where not trained, not
            shifted; or the class (int), the classes' zeros and ones, a number (float), a span.
        label_bytes: UTF-8 bytes of the supervised text, for bits per byte; 0 for a class.
        cut: whether `data.too_long: truncate` cut supervised tokens off.
        lost: it cut off all of them; such an example is counted and left out.
        truth: what the evaluation needs beside the labels: `Written`, or
            `qft.data.extract.Window`.
    """

    index: int
    inputs: dict[str, Any]
    label_bytes: int = 0
    cut: bool = False
    truth: Any = None
    lost: bool = False


@dataclass(frozen=True, slots=True)
class EncodeSettings:
    """How rows become examples.

    Attributes:
        columns: ``{role: column}``, as `qft.data.columns.find_columns` gives it.
        max_length: longest sequence in tokens.
        too_long: what happens to a longer row.
        labels: the classes or tags in order, None for tasks without.
        index_offset: number of the first example.
        supervise: all of the assistant's turns, or the last alone (chat).
        labels_are: one class a row, several, or a number (classify).
        stride: tokens that two windows of a long context share, at most (extract).
        packed: examples will share rows, so that none need be filled up (text).
    """

    columns: Mapping[str, str]
    max_length: int
    too_long: TooLong = "error"
    labels: tuple[str, ...] | None = None
    index_offset: int = 0
    supervise: Literal["all", "last"] = "all"
    labels_are: LabelKind = "one"
    stride: int = 128
    packed: bool = False


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """Examples and what is to be said about them.

    Attributes:
        examples: in the order of their rows.
        labels: the classes or tags in order; None for tasks without, and for numbers.
        notes: facts for people, such as how many rows were dropped.
        fingerprint: SHA-256 of the encoded examples.
        labels_are: one class a row, several, or a number (classify).
        lost: how many were left out because the cut left nothing to learn.
        documents: a digest of each whole text, where examples are parts of texts.
    """

    examples: list[Example]
    labels: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""
    labels_are: LabelKind = "one"
    lost: int = 0
    documents: tuple[str, ...] = ()

    def first(self, limit: int | None) -> ExampleSet:
        """At most ``limit`` examples, from the beginning."""
        if limit is None or limit >= len(self.examples):
            return self
        kept = self.examples[:limit]
        return replace(self, examples=kept, fingerprint=fingerprint(kept))


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 of tokens and labels, in order."""
    digest = hashlib.sha256()
    for example in examples:
        for name, value in sorted(example.inputs.items()):
            values = value if isinstance(value, list) else [value]
            whole = all(isinstance(number, int) for number in values)
            numbers = array("q" if whole else "d", values)
            digest.update(f"{name}{len(numbers)}:".encode())
            digest.update(numbers.tobytes())
    return digest.hexdigest()


def inputs_fingerprint(example: Example) -> str:
    """SHA-256 of what the model is given; what it should answer may differ."""
    inputs = {name: value for name, value in example.inputs.items() if name != "labels"}
    return fingerprint([replace(example, inputs=inputs)])


class Task(ABC):
    """What a model is taught: from rows to examples, from examples to a batch."""

    name: ClassVar[str]
    # what a label is, and so what is measured
    predicts: ClassVar[Literal["tokens", "class", "span", "tags", "vectors"]]

    def flatten(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The rows as one an example, where the task's usual files nest them."""
        return list(rows)

    @abstractmethod
    def encode(
        self,
        rows: Sequence[NumberedRow],
        tokenizer: Tokenizer,
        settings: EncodeSettings,
        notes: list[str],
    ) -> list[Example]:
        """Examples of rows; adds to ``notes`` what a person should know.

        Raises:
            DataError: a row that cannot be used; the row is named.
        """

    @abstractmethod
    def collate(self, examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
        """A batch, padded on the right: int64 tensors on the CPU.

        Returns:
            `input_ids` and `attention_mask` ``[batch, length]``; `labels` of the same shape (-100
            where not trained), ``[batch]`` or ``[batch, classes]``; a span's two positions.
        """

    @abstractmethod
    def label_count(self, batch: Mapping[str, Tensor]) -> int:
        """How many label items the mean loss of a batch averages over."""

    def classes(
        self, rows: Sequence[NumberedRow], columns: Mapping[str, str]
    ) -> tuple[str, ...] | None:
        """The classes in the rows, sorted; None where the task has none."""
        return None


def pad(examples: Sequence[Example], name: str, filler: int) -> Tensor:
    """The examples' lists called ``name``, filled up on the right: ``[batch, longest]``, int64."""
    import torch

    lists = [example.inputs[name] for example in examples]
    longest = max(len(values) for values in lists)
    return torch.tensor(
        [values + [filler] * (longest - len(values)) for values in lists], dtype=torch.int64
    )


def padded_inputs(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, ``[batch, longest]``; the mask is by position.

    `token_type_ids` too, where the examples are pairs of texts and the tokenizer tells them apart.
    """
    import torch

    input_ids = pad(examples, "input_ids", pad_token_id)
    lengths = torch.tensor([len(example.inputs["input_ids"]) for example in examples])
    mask = torch.arange(input_ids.shape[1])[None, :] < lengths[:, None]
    batch = {"input_ids": input_ids, "attention_mask": mask.to(torch.int64)}
    if "token_type_ids" in examples[0].inputs:
        batch["token_type_ids"] = pad(examples, "token_type_ids", 0)
    return batch


def fit_lengths(
    lengths: Sequence[int], numbers: Sequence[int], settings: EncodeSettings, notes: list[str]
) -> set[int]:
    """Applies `data.too_long`: the positions to leave out; notes what was cut or dropped.

    Args:
        lengths: tokens of each row.
        numbers: the rows' numbers, for the message.

    Raises:
        DataError: rows are too long and the user has not said what to do with them.
    """
    limit = settings.max_length
    long = [i for i, length in enumerate(lengths) if length > limit]
    if not long:
        return set()
    longest = max(lengths)
    count = f"{len(long)} of {len(lengths)} rows"
    if settings.too_long == "error":
        raise DataError(
            f"{count} {'is' if len(long) == 1 else 'are'} longer than {limit} tokens.",
            where=f"row {numbers[long[0]]}" + (" is the first" if len(long) > 1 else ""),
            found=f"the longest has {longest} tokens",
            fix=f"train.max_length={longest}, or data.too_long=truncate, or data.too_long=drop",
        )
    if settings.too_long == "truncate":
        notes.append(f"{count} cut to {limit} tokens (longest {longest})")
        return set()
    notes.append(f"{count} dropped: longer than {limit} tokens (longest {longest})")
    return set(long)


def language_examples(
    encoded: Sequence[tuple[int, Encoded, Written | None]],
    settings: EncodeSettings,
    notes: list[str],
) -> list[Example]:
    """Examples of ``(row number, sequence, what is asked)``, within the length.

    Raises:
        DataError: a row that supervises nothing; rows too long; nothing left.
    """
    for number, sequence, _ in encoded:
        if sequence.supervised == 0:
            raise DataError(
                "A row has nothing to learn from: no token of it is supervised.",
                where=f"row {number}",
                found=f"{len(sequence.input_ids)} tokens",
                fix="a conversation needs at least one message of the assistant; take out the "
                "others",
            )
    lengths = [len(sequence.input_ids) for _, sequence, _ in encoded]
    dropped = fit_lengths(lengths, [number for number, _, _ in encoded], settings, notes)
    examples = []
    for position, (_, sequence, written) in enumerate(encoded):
        if position in dropped:
            continue
        kept = sequence.cut(0, settings.max_length)
        whole = kept.supervised == sequence.supervised
        example = example_of(kept, settings.index_offset + position, cut=not whole, truth=written)
        examples.append(replace(example, lost=kept.supervised == 0))
    return examples


def example_of(
    sequence: Encoded, index: int, *, cut: bool = False, truth: Written | None = None
) -> Example:
    """A language example."""
    inputs = {"input_ids": sequence.input_ids, "labels": sequence.labels}
    return Example(index, inputs, sequence.label_bytes, cut, truth)


def collate_language(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """A batch of language examples: three int64 tensors ``[batch, longest]``."""
    batch = padded_inputs(examples, pad_token_id)
    batch["labels"] = pad(examples, "labels", UNSUPERVISED)
    return batch
