"""Answers that are a tag a word: named entities and the like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from qft.data.encoding import UNSUPERVISED
from qft.errors import ModelError
from qft.metrics.entities import entity_scores, mark_entities

if TYPE_CHECKING:
    from qft.data.examples import Example

_Scores = tuple[list[float], list[list[int]], list[list[int]]]


class TagJudge:
    """Loss and accuracy a word; precision, recall and F1 of whole entities."""

    def __init__(self, labels: Sequence[str] | None) -> None:
        self._labels = labels
        self._losses: list[float] = []
        self._answers: list[list[int]] = []
        self._truths: list[list[int]] = []

    def score(
        self, model: nn.Module, batch: dict[str, Tensor], examples: Sequence[Example]
    ) -> _Scores:
        """See `Judge`."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits.float()
        labels = batch["labels"].to(logits.device)
        tags = logits.shape[-1]
        if self._labels is not None and len(self._labels) != tags:
            raise ModelError("The model and the data have different tags.",
                             found=f"the model knows {tags}, the data has {len(self._labels)}",
                             fix="evaluate with the tags the model was trained on")  # fmt: skip
        kept = labels != UNSUPERVISED
        nats = nn.functional.cross_entropy(logits[kept], labels[kept], reduction="none")
        answers = logits.argmax(dim=-1)
        rows = zip(answers, labels, kept, strict=True)
        pairs = [(answer[here].tolist(), truth[here].tolist()) for answer, truth, here in rows]
        return nats.double().tolist(), [a for a, _ in pairs], [t for _, t in pairs]

    def add(self, scores: _Scores) -> None:
        """See `Judge`."""
        self._losses += scores[0]
        self._answers += scores[1]
        self._truths += scores[2]

    def result(self, examples: Sequence[Example]) -> dict[str, float]:
        """`loss` (nats a word), `accuracy` and, where the tags mark entities, those's."""
        pairs = zip(self._answers, self._truths, strict=True)
        right = sum(a == t for answer, truth in pairs for a, t in zip(answer, truth, strict=True))
        metrics = {
            "loss": math.fsum(self._losses) / len(self._losses),
            "accuracy": right / len(self._losses),
        }
        if self._labels is None or not mark_entities(self._labels):
            return metrics
        names = self._labels
        sides = [[[names[tag] for tag in row] for row in side]
                 for side in (self._answers, self._truths)]  # fmt: skip
        return {**metrics, **entity_scores(*sides)}
