"""How far a student's distribution is from a teacher's, for the chunked loss of `label_loss`.

A teacher is anything that gives the log-probabilities of some positions (`Teacher`): of all tokens,
made of its hidden states a chunk at a time (`LiveRows`), or of its likeliest ones alone, which is
all that is worth storing of it (`TopK`). Then the distributions compared are those over ``k``
tokens and one rest; with all tokens given the rest is empty and the divergence is the full one.

Every kind is a function of the student's masses ``s`` and the teacher's ``t``; with ``w`` its
derivative by ``s``, the gradient of logit j is ``p_j (w_bucket(j) - sum_b s_b w_b)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from qft.lean.label_loss import Head, head_logits, softmax_in_place

Kind = Literal["forward-kl", "reverse-kl", "jsd"]
_SMALLEST = 1e-30


class Teacher(Protocol):
    """What a teacher says of each position, at the temperature of the loss.

    Attributes:
        extra_tensors: of a chunk of logits' size, that this and `Divergence` then make.
    """

    @property
    def extra_tensors(self) -> int:
        """See above."""

    def __call__(self, rows: slice, like: Tensor) -> tuple[Tensor | None, Tensor]:
        """Of some positions: tokens, each once, and their log-probabilities.

        Args:
            rows: which positions.
            like: the student's logits there: device and dtype of the answer.

        Returns:
            ``[positions, k]`` both; or no tokens and ``[positions, shared]``: of all tokens that
            student and teacher share, from the first on. What is returned may be overwritten.
        """


@dataclass(frozen=True)
class TopK:
    """A teacher known by its likeliest tokens.

    Attributes:
        tokens: ``[positions, k]``, each once a position.
        log_probabilities: ``[positions, k]``.
    """

    extra_tensors: ClassVar[int] = 0

    tokens: Tensor
    log_probabilities: Tensor

    def __call__(self, rows: slice, like: Tensor) -> tuple[Tensor, Tensor]:
        """See `Teacher`."""
        tokens = self.tokens[rows].to(like.device, torch.int64)
        return tokens, self.log_probabilities[rows].to(like.device, like.dtype)


@dataclass(frozen=True)
class LiveRows:
    """A teacher known by its hidden states: its logits exist for a chunk of positions at a time.

    Attributes:
        states: ``[positions, width]``: what its output layer is given.
        head: its output layer.
        vocabulary: rows of that layer's weight.
        shared: its first tokens, which the student has too; the others are left out.
        temperature: of the loss.
    """

    extra_tensors: ClassVar[int] = 5  # its log-probabilities, and at most four made of them

    states: Tensor
    head: Head
    vocabulary: int
    shared: int
    temperature: float = 1.0

    def __call__(self, rows: slice, like: Tensor) -> tuple[None, Tensor]:
        """See `Teacher`."""
        with torch.no_grad():
            logits = head_logits(self.states[rows], self.head, self.vocabulary)
            logits = logits[:, : self.shared].to(like.device)
            own = torch.promote_types(logits.dtype, torch.float32)
            return None, logits.to(own).div_(self.temperature).log_softmax(dim=1).to(like.dtype)


@dataclass(frozen=True)
class Divergence:
    """Forward KL, reverse KL or generalised JSD towards a teacher.

    Attributes:
        teacher: at temperature ``temperature``.
        kind: forward-kl is KL(teacher, student), reverse-kl is KL(student, teacher), jsd is
            ``beta KL(teacher, mixture) + (1 - beta) KL(student, mixture)`` with the mixture
            ``beta teacher + (1 - beta) student`` (Agarwal et al. 2023,
            https://arxiv.org/abs/2306.13649).
        temperature: of both distributions; the loss is multiplied by its square (Hinton et al.
            2015), so that gradients keep their size.
        beta: of jsd.
        shared: tokens that the teacher has too; the student's others are left out of the
            comparison. None is all.
    """

    teacher: Teacher
    kind: Kind = "forward-kl"
    temperature: float = 1.0
    beta: float = 0.5
    shared: int | None = None

    @property
    def extra_tensors(self) -> int:
        """See `qft.lean.label_loss.LogitLoss`."""
        return self.teacher.extra_tensors

    def __call__(self, logits: Tensor, rows: slice) -> Tensor:
        """See `qft.lean.label_loss.LogitLoss`."""
        if self.shared is not None and self.shared < logits.shape[1]:
            logits[:, self.shared :] = float("-inf")  # their probability and gradient are 0
        tokens, known = self.teacher(rows, logits)
        logits.div_(self.temperature)
        nats = self._of_all(logits, known) if tokens is None else self._of(logits, tokens, known)
        logits.mul_(self.temperature)  # its square, over the one that the logits were divided by
        return nats * self.temperature**2

    def _of(self, logits: Tensor, tokens: Tensor, known: Tensor) -> Tensor:
        """With some tokens known and the others' mass together."""
        teacher = known.exp()
        softmax_in_place(logits)
        student = logits.gather(1, tokens)
        logits.scatter_(1, tokens, 0.0)
        s = _with_rest(student, logits.sum(dim=1, keepdim=True))
        t = _with_rest(teacher, 1 - teacher.sum(dim=1, keepdim=True))
        nats, slope = self._loss_and_slope(s, t)
        mean = (s * slope).sum(dim=1, keepdim=True)
        logits.mul_(slope[:, -1:] - mean)
        logits.scatter_(1, tokens, student * (slope[:, :-1] - mean))
        return nats

    def _of_all(self, logits: Tensor, known: Tensor) -> Tensor:
        """With all (shared) tokens known: from log-probabilities, so that none is too small."""
        rest = logits[:, known.shape[1] :]
        logits = logits[:, : known.shape[1]]
        rest.zero_()
        logits.sub_(logits.logsumexp(dim=1, keepdim=True))
        if self.kind == "forward-kl":
            t = known.exp()
            nats = t.mul(known.sub_(logits)).sum(dim=1)
            logits.exp_().sub_(t)
            return nats
        if self.kind == "jsd":
            weights = logits.new_tensor([self.beta, 1 - self.beta]).log()
            t = known.exp()
            mixture = torch.logaddexp(known + weights[0], logits + weights[1])
            to_teacher = t.mul_(known.sub_(mixture)).sum(dim=1)
            ratio = logits.sub(mixture)
            share = 1 - self.beta
        else:
            ratio, to_teacher, share = logits.sub(known), None, 1.0
        logits.exp_()
        to_student = (logits * ratio).sum(dim=1)
        logits.mul_(ratio.sub_(to_student[:, None])).mul_(share)
        return (
            to_student * share
            if to_teacher is None
            else (self.beta * to_teacher + share * to_student)
        )

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


@dataclass(frozen=True)
class Sampled:
    """Forward KL towards a teacher known by tokens drawn from it, without bias.

    The share of the draws that a token has is, in the mean, its probability; the loss is linear in
    it, so that loss and gradient are right in the mean too (Anshumann et al. 2025,
    https://arxiv.org/abs/2503.16870).

    Attributes:
        samples: ``[positions, draws]``; a token may stand there more than once.
        weights: ``[positions, draws]``: what each counts.
        entropy: ``[positions]``, the teacher's, in nats.
        temperature: of both distributions, as in `Divergence`.
        shared: as in `Divergence`.
    """

    extra_tensors: ClassVar[int] = 0

    samples: Tensor
    weights: Tensor
    entropy: Tensor
    temperature: float = 1.0
    shared: int | None = None

    def __call__(self, logits: Tensor, rows: slice) -> Tensor:
        """See `qft.lean.label_loss.LogitLoss`."""
        if self.shared is not None and self.shared < logits.shape[1]:
            logits[:, self.shared :] = float("-inf")
        samples = self.samples[rows].to(logits.device, torch.int64)
        weights = self.weights[rows].to(logits.device, logits.dtype)
        logits.div_(self.temperature)
        picked = logits.gather(1, samples)
        log_normaliser = softmax_in_place(logits)
        total = weights.sum(dim=1)
        nats = total * log_normaliser - (weights * picked).sum(dim=1)
        logits.mul_(total[:, None]).scatter_add_(1, samples, -weights)
        logits.mul_(self.temperature)
        entropy = self.entropy[rows].to(logits.device, logits.dtype)
        return (nats - entropy) * self.temperature**2


def _with_rest(masses: Tensor, rest: Tensor) -> Tensor:
    """``[positions, k]`` and what the others have together: ``[positions, k + 1]``."""
    return torch.cat([masses, rest], dim=1).clamp(min=_SMALLEST)
