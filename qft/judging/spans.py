"""Answers that are a span of a given text, found window by window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qft.data.extract import Window
from qft.metrics.answers import answer_scores

if TYPE_CHECKING:
    from qft.data.examples import Example

_CANDIDATES = 20  # likeliest starts and ends that are tried with one another
_LONGEST = 30  # tokens of an answer


@dataclass(frozen=True)
class Answer:
    """What one window says: its best span, and how likely it finds that there is none."""

    text: str
    score: float
    none_score: float


class SpanJudge:
    """Exact match and F1 of each question's best span over all its windows."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._answers: list[tuple[Window, Answer]] = []

    def score(
        self, model: nn.Module, batch: dict[str, Tensor], examples: Sequence[Example]
    ) -> tuple[list[float], list[tuple[Window, Answer]]]:
        """See `Judge`."""
        inputs = dict(batch)
        positions = inputs.pop("start_positions"), inputs.pop("end_positions")
        output = model(**inputs)
        # padding is no place: softmax over it would count on how a batch was made up
        hidden = inputs["attention_mask"] == 0
        sides = [
            logits.float().masked_fill(hidden.to(logits.device), -torch.inf)
            for logits in (output.start_logits, output.end_logits)
        ]
        losses = [
            nn.functional.cross_entropy(side, place.to(side.device), reduction="none")
            for side, place in zip(sides, positions, strict=True)
        ]
        nats = ((losses[0] + losses[1]) / 2).double().tolist()
        starts, ends = (side.cpu() for side in sides)
        answers = []
        for example, start, end in zip(examples, starts, ends, strict=True):
            window: Window = example.truth
            answers.append((window, best_span(window, start, end)))
        return nats, answers

    def add(self, scores: tuple[list[float], list[tuple[Window, Answer]]]) -> None:
        """See `Judge`."""
        self._losses += scores[0]
        self._answers += scores[1]

    def result(self, examples: Sequence[Example]) -> dict[str, float]:
        """`loss` (nats a window and end), `exact_match`, `f1`."""
        predictions = self.predictions()
        truths = {window.row: window.answers for window, _ in self._answers}
        scores = answer_scores([predictions[row] for row in truths], list(truths.values()))
        return {"loss": math.fsum(self._losses) / len(self._losses), **scores}

    def predictions(self) -> dict[int, str]:
        """The answer to each row's question; empty where "none" is likelier than the best span.

        Only data with unanswerable questions may be answered with nothing.
        """
        may_be_none = any(not window.answers for window, _ in self._answers)
        best: dict[int, Answer] = {}
        none_scores: dict[int, float] = {}
        for window, answer in sorted(self._answers, key=lambda pair: pair[0].number):
            row = window.row
            if row not in best or answer.score > best[row].score:
                best[row] = answer
            none_scores[row] = min(none_scores.get(row, math.inf), answer.none_score)
        return {
            row: "" if may_be_none and none_scores[row] > answer.score else answer.text
            for row, answer in best.items()
        }


def best_span(window: Window, start: Tensor, end: Tensor) -> Answer:
    """The likeliest span of a window's context.

    Args:
        start: logits ``[length]``; those past the window's own tokens are padding.
        end: likewise.
    """
    places = torch.tensor([i for i, span in enumerate(window.offsets) if span is not None])
    begins = places[start[places].topk(min(_CANDIDATES, len(places))).indices]
    stops = places[end[places].topk(min(_CANDIDATES, len(places))).indices]
    scores = start[begins][:, None] + end[stops][None, :]
    length = stops[None, :] - begins[:, None]
    scores = scores.masked_fill((length < 0) | (length >= _LONGEST), -torch.inf)
    row, column = divmod(int(scores.argmax()), len(stops))
    first, last = window.offsets[int(begins[row])], window.offsets[int(stops[column])]
    none_score = float(start[window.none_at] + end[window.none_at])
    if first is None or last is None or scores[row, column] == -torch.inf:
        return Answer("", -math.inf, none_score)
    return Answer(window.context[first[0] : last[1]], float(scores[row, column]), none_score)
