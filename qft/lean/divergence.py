"""How far a student's distribution is from a teacher's, for the chunked loss of `label_loss`.

The teacher is known by its likeliest tokens and the mass of all others together, which is all that
is worth storing of it: the distributions compared are those over ``k`` tokens and one rest. With
all tokens given the rest is empty and the divergence is the full one.

Every kind is a function of the student's masses ``s`` and the teacher's ``t``; with ``w`` its
derivative by ``s``, the gradient of logit j is ``p_j (w_bucket(j) - sum_b s_b w_b)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qft.lean.label_loss import softmax_in_place

Kind = Literal["forward-kl", "reverse-kl", "jsd"]
_SMALLEST = 1e-30


@dataclass(frozen=True)
class Divergence:
    """Forward KL, reverse KL or generalised JSD towards a teacher.

    Attributes:
        tokens: ``[positions, k]``, the teacher's likeliest tokens, each once.
        log_probabilities: ``[positions, k]``, theirs at temperature ``temperature``.
        kind: forward-kl is KL(teacher, student), reverse-kl is KL(student, teacher), jsd is
            ``beta KL(teacher, mixture) + (1 - beta) KL(student, mixture)`` with the mixture
            ``beta teacher + (1 - beta) student`` (Agarwal et al. 2023,
            https://arxiv.org/abs/2306.13649).
        temperature: of both distributions; the loss is multiplied by its square (Hinton et al.
            2015), so that gradients keep their size.
        beta: of jsd.
    """

    tokens: Tensor
    log_probabilities: Tensor
    kind: Kind = "forward-kl"
    temperature: float = 1.0
    beta: float = 0.5

    def __call__(self, logits: Tensor, rows: slice) -> Tensor:
        """See `qft.lean.label_loss.LogitLoss`."""
        tokens = self.tokens[rows]
        teacher = self.log_probabilities[rows].to(logits.dtype).exp()
        logits.div_(self.temperature)
        softmax_in_place(logits)
        student = logits.gather(1, tokens)
        logits.scatter_(1, tokens, 0.0)
        s = _with_rest(student, logits.sum(dim=1, keepdim=True))
        t = _with_rest(teacher, 1 - teacher.sum(dim=1, keepdim=True))
        nats, slope = self._loss_and_slope(s, t)
        mean = (s * slope).sum(dim=1, keepdim=True)
        logits.mul_(slope[:, -1:] - mean)
        logits.scatter_(1, tokens, student * (slope[:, :-1] - mean))
        logits.mul_(self.temperature)  # its square, over the one that the logits were divided by
        return nats * self.temperature**2

    def _loss_and_slope(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """A position's divergence, and its derivative by each of the student's masses."""
        if self.kind == "forward-kl":
            return (t * (t / s).clamp(min=_SMALLEST).log()).sum(dim=1), -t / s
        if self.kind == "reverse-kl":
            ratio = (s / t.clamp(min=_SMALLEST)).log()
            return (s * ratio).sum(dim=1), ratio
        beta = self.beta
        mixture = beta * t + (1 - beta) * s
        to_teacher = (t * (t / mixture).clamp(min=_SMALLEST).log()).sum(dim=1)
        ratio = (s / mixture).log()
        to_student = (s * ratio).sum(dim=1)
        return beta * to_teacher + (1 - beta) * to_student, (1 - beta) * ratio


def _with_rest(masses: Tensor, rest: Tensor) -> Tensor:
    """``[positions, k]`` and what the others have together: ``[positions, k + 1]``."""
    return torch.cat([masses, rest], dim=1).clamp(min=_SMALLEST)
