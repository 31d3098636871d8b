"""Universal logit distillation: distributions over two vocabularies, compared by rank alone.

The loss is the sum over ranks of the gap between the student's n-th largest probability and the
teacher's, a Wasserstein distance that asks nothing of the tokens' identity (Boizard et al. 2024,
https://arxiv.org/abs/2402.12030).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qft.lean.divergence import Teacher
from qft.lean.label_loss import softmax_in_place


@dataclass(frozen=True)
class SortedGap:
    """Towards a teacher with a vocabulary of its own.

    Of a teacher known by its k likeliest tokens, the k largest probabilities are compared, and what
    is left on both sides.

    Attributes:
        teacher: its log-probabilities; which tokens they belong to is of no account.
        paired: ``[positions]``: 1 where the teacher has a position to compare with, else 0.
    """

    teacher: Teacher
    paired: Tensor

    @property
    def extra_tensors(self) -> int:
        """See `qft.lean.label_loss.LogitLoss`: sorted values, their places (8 bytes), signs."""
        return self.teacher.extra_tensors + 5

    def __call__(self, logits: Tensor, rows: slice) -> Tensor:
        """See `qft.lean.label_loss.LogitLoss`."""
        tokens, known = self.teacher(rows, logits)
        teacher = known.exp().sort(dim=1, descending=True).values
        softmax_in_place(logits)
        student, places = logits.sort(dim=1, descending=True)
        if tokens is not None:
            student, teacher = _with_rests(student, teacher)
        gap = (
            student
            - functional.pad(teacher, (0, max(0, student.shape[1] - teacher.shape[1])))[
                :, : student.shape[1]
            ]
        )
        unmatched = teacher[:, student.shape[1] :].sum(dim=1)  # a larger vocabulary's smallest
        paired = self.paired[rows].to(logits.device, logits.dtype)
        nats = (gap.abs().sum(dim=1) + unmatched) * paired
        slope = gap.sign_()
        if tokens is not None:
            beyond = places.shape[1] - slope.shape[1] + 1
            slope = torch.cat([slope[:, :-1], slope[:, -1:].expand(-1, beyond)], dim=1)
        slope = torch.empty_like(logits).scatter_(1, places, slope)
        mean = (logits * slope).sum(dim=1, keepdim=True)
        logits.mul_(slope.sub_(mean)).mul_(paired[:, None])
        return nats


def _with_rests(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest of both, and one number for the others: ``[positions, k + 1]``."""
    k = min(teacher.shape[1], student.shape[1])
    largest = student[:, :k], teacher[:, :k]
    rests = student[:, k:].sum(dim=1, keepdim=True), 1 - largest[1].sum(dim=1, keepdim=True)
    return torch.cat([largest[0], rests[0]], dim=1), torch.cat([largest[1], rests[1]], dim=1)
