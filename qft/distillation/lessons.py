"""A lesson: what a teacher says of one example, live or read from a cache.

Its tensors' first dimension runs over the example's own positions. By name:

- ``states``: ``[labels, width]``, what the teacher's output layer is given at each supervised
  position; its logits are made of them a chunk at a time (a teacher in memory only);
- ``tokens`` and ``log_probabilities``: ``[labels, k]``, its likeliest tokens there;
- ``samples``, ``weights``: ``[labels, draws]``, and ``entropy``: ``[labels]``, tokens drawn there;
- ``logits``: ``[1, classes]``, of tags ``[words, tags]``, of spans ``[tokens, 2]``;
- ``layer.N``: ``[tokens, width]``, the output of its layer N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qft.data.encoding import UNSUPERVISED
from qft.data.examples import Example
from qft.data.packing import Row
from qft.lean.label_loss import Head

Lesson = Mapping[str, Tensor]


class Source(Protocol):
    """Where lessons come from.

    Attributes:
        shared: tokens that teacher and student both have, from the first on; None without tokens.
        head: the teacher's output layer and the rows of its weight, where lessons hold states.
    """

    @property
    def shared(self) -> int | None:
        """See above."""

    @property
    def head(self) -> tuple[Head, int] | None:
        """See above."""

    def lessons(self, examples: Sequence[Example]) -> list[Lesson]:
        """One an example."""


def joined(lessons: Sequence[Lesson], name: str) -> Tensor:
    """One thing the lessons say, example after example."""
    return torch.cat([lesson[name] for lesson in lessons])


def layer_key(number: int) -> str:
    """The name of a layer's hidden states in a lesson."""
    return f"layer.{number}"


def label_rows(example: Example, *, shifted: bool) -> int:
    """Supervised positions of an example of text; 1 of an example with a class."""
    labels = example.inputs["labels"]
    if not isinstance(labels, list):
        return 1
    return sum(label != UNSUPERVISED for label in (labels[1:] if shifted else labels))


def real_tokens(rows: Sequence[Row], width: int) -> Tensor:
    """Where the examples' own tokens lie: ``[rows, width]``, true there."""
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        mask[number, : sum(len(example.inputs["input_ids"]) for example in row)] = True
    return mask


def supervised_positions(labels: Tensor, *, shifted: bool) -> Tensor:
    """Where a label is predicted from: ``[batch, positions]``, true there."""
    kept = labels != UNSUPERVISED
    return torch.nn.functional.pad(kept[:, 1:], (0, 1)) if shifted else kept
