"""Several short examples in one row, each as if it were alone.

Positions begin anew with every example and attention stays within it: transformers builds the
block-diagonal mask from the positions where no attention mask is given. What fills a row up is a
block of its own that nothing looks at. FlashAttention has no such mask: transformers gives it the
borders instead, which it reads off the positions of a batch of one row only. So there, and with the
engine's own attention, a micro-batch is one long row, and nothing fills it up.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qft.data.encoding import UNSUPERVISED
from qft.data.examples import Example

if TYPE_CHECKING:
    from torch import Tensor

PACKABLE = ("text", "instruct", "chat")  # tasks whose examples are read from left to right
Row = Sequence[Example]


def pack(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Rows of at most ``length`` tokens: first fit, the longest examples first.

    An example longer than ``length`` gets a row of its own.
    """
    rows: list[list[Example]] = []
    free: list[int] = []
    for example in sorted(examples, key=lambda e: (-len(e.inputs["input_ids"]), e.index)):
        size = len(example.inputs["input_ids"])
        place = next((i for i, room in enumerate(free) if room >= size), None)
        if place is None:
            rows.append([example])
            free.append(length - size)
        else:
            rows[place].append(example)
            free[place] -= size
    return rows


def one_row(rows: Sequence[Row]) -> list[Row]:
    """All examples of a micro-batch in one row: what FlashAttention keeps apart."""
    return [[example for row in rows for example in row]]


def borders_of(row: Row) -> dict[str, Tensor]:
    """Where the examples of one long row begin and end, as transformers' attention is told.

    The mask of ones keeps transformers from making a mask of tokens x tokens out of the positions.
    """
    import torch

    lengths = [len(example.inputs["input_ids"]) for example in row]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return {
        "attention_mask": torch.ones(1, sum(lengths), dtype=torch.int64),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
    }


def collate_packed(rows: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
    """A batch of packed rows: `input_ids`, `position_ids` and `labels`, ``[rows, longest]``.

    The first label of every example is masked: the token before it is another example's.
    """
    import torch

    longest = max(sum(len(e.inputs["input_ids"]) for e in row) for row in rows)
    ids, positions, labels = [], [], []
    for row in rows:
        own = [e.inputs["input_ids"] for e in row]
        gap = longest - sum(map(len, own))
        ids.append([token for part in own for token in part] + [pad_token_id] * gap)
        positions.append([i for part in [*own, [0] * gap] for i in range(len(part))])
        marks = [label for e in row for label in [UNSUPERVISED, *e.inputs["labels"][1:]]]
        labels.append(marks + [UNSUPERVISED] * gap)
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int64),
        "position_ids": torch.tensor(positions, dtype=torch.int64),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }
