"""Sums over what two models answer: divergence, first choices, perplexity, hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qft.errors import VerificationError

POSITIONS = 512  # compared at a time: [512, vocabulary] in float32, a few times


class LogitTally:
    """Of the answers; a float a position is all that is kept."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._same = 0
        self._labelled = 0
        self._losses = [0.0, 0.0]
        self._right = [0, 0]
        self.largest = 0.0  # absolute difference of two logits

    def add(self, first: Tensor, second: Tensor, labels: Tensor | None) -> None:
        """Takes in both sides' logits.

        Args:
            first: the reference's, ``[positions, choices]``.
            second: the artefact's.
            labels: what is right, ``[positions]``.
        """
        for begin in range(0, first.shape[0], POSITIONS):
            part = slice(begin, begin + POSITIONS)
            self._add(first[part].float(), second[part].float(),
                      None if labels is None else labels[part])  # fmt: skip

    def _add(self, first: Tensor, second: Tensor, labels: Tensor | None) -> None:
        difference = (first - second).abs().max().item()
        # max() would drop a NaN that comes second; a NaN must stay
        self.largest = difference if difference != difference else max(self.largest, difference)
        self._same += int((first.argmax(-1) == second.argmax(-1)).sum())
        logs = [logits.log_softmax(-1) for logits in (first, second)]
        self._kl.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1).clamp(min=0).cpu())
        if labels is None:
            return
        labels = labels.to(first.device).long()
        self._labelled += labels.numel()
        for side, log in enumerate(logs):
            self._losses[side] -= log.gather(-1, labels[:, None]).double().sum().item()
            self._right[side] += int((log.argmax(-1) == labels).sum())

    def divergence(self) -> tuple[int, float, float]:
        """Positions, mean KL and its 99th percentile, in nats.

        Raises:
            VerificationError: there was nothing to compare.
        """
        divergence = torch.cat(self._kl).double() if self._kl else torch.empty(0)
        count = divergence.numel()
        if count == 0:
            raise VerificationError(
                "There is no position to compare.", fix="give held-out rows with labels"
            )
        rank = max(0, math.ceil(0.99 * count) - 1)
        ordered = divergence.nan_to_num(nan=math.inf).sort().values
        return count, divergence.mean().item(), ordered[rank].item()

    def top1(self) -> float:
        """Share of positions where both sides' likeliest choice is the same."""
        return self._same / sum(part.numel() for part in self._kl)

    def perplexities(self) -> tuple[float | None, float | None]:
        """The reference's and the artefact's; None without labels."""
        if not self._labelled:
            return None, None
        first, second = (_exp(loss / self._labelled) for loss in self._losses)
        return first, second

    def accuracies(self) -> tuple[float | None, float | None]:
        """How often each side's likeliest choice is the label."""
        if not self._labelled:
            return None, None
        return self._right[0] / self._labelled, self._right[1] / self._labelled


class LayerTally:
    """Of hidden states: how far apart the two models are after each layer.

    A position counts as ``‖h - h'‖ / ‖h‖``, each as much as any other, so that the few positions
    of huge activations that models have do not hide the rest.
    """

    def __init__(self) -> None:
        self._sums: list[float] = []
        self._counts: list[int] = []

    def add(self, place: int, first: Tensor, second: Tensor, text: Tensor) -> None:
        """Takes in the hidden states at one place.

        Args:
            place: 0 is before the first layer, 1 after it, and so on.
            first: the reference's, ``[batch, length, width]``.
            second: the artefact's.
            text: which positions count, bool ``[batch, length]``.
        """
        while len(self._sums) <= place:
            self._sums.append(0.0)
            self._counts.append(0)
        text = text.to(first.device)
        a, b = first[text].float(), second.to(first.device)[text].float()
        lengths = torch.linalg.vector_norm(a, dim=-1).clamp(min=1e-12)
        self._sums[place] += (torch.linalg.vector_norm(a - b, dim=-1) / lengths).sum().item()
        self._counts[place] += int(text.sum())

    def differences(self) -> list[float]:
        """The mean at each place; infinite where a number is broken."""
        means = [total / max(1, count)
                 for total, count in zip(self._sums, self._counts, strict=True)]  # fmt: skip
        return [mean if math.isfinite(mean) else math.inf for mean in means]


def allowed_at(place: int, limit: float) -> float:
    """How much hidden states may differ at a place: after ``n`` layers √n times ``limit``.

    Args:
        place: 0 is before the first layer.
        limit: :attr:`qft.verification.thresholds.Thresholds.layer`.
    """
    return limit * math.sqrt(max(1, place))


def first_diverging(differences: Sequence[float], limit: float) -> int | None:
    """The first place whose difference is past what rounding alone does; None where none is."""
    for place, difference in enumerate(differences):
        if not difference <= allowed_at(place, limit):
            return place
    return None


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
