"""Soft labels: a head's logits towards the teacher's, where these are few enough to hold.

Classes and tags are compared by the recipe's divergence, several classes at once as so many coins,
a span's ends as two distributions over the tokens, numbers by their squared difference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qft.distillation.objective import DistillSettings


def soft_label_losses(
    student: Tensor, teacher: Tensor, settings: DistillSettings, labels_are: str = "one"
) -> Tensor:
    """The losses of some rows, ``[rows]``, in float32 at least.

    Args:
        student: ``[rows, classes]``, logits.
        teacher: the same.
        settings: kind of the divergence, temperature, beta.
        labels_are: one class a row, ``many``, or a ``number``.
    """
    precise = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(precise), teacher.to(student.device, precise)
    if labels_are == "number":
        return (student - teacher).square().mean(dim=1)
    student, teacher = student / settings.temperature, teacher / settings.temperature
    scale = settings.temperature**2
    if labels_are == "many":  # each class is a coin of its own
        pairs = [_coins(student), _coins(teacher)]
        return _divergence(pairs[0], pairs[1], settings).mean(dim=1) * scale
    s, t = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
    return _divergence(s, t, settings) * scale


def span_losses(student: Tensor, teacher: Tensor, settings: DistillSettings) -> Tensor:
    """The loss of one text's span, a scalar: the mean of its beginning's and its end's.

    Args:
        student: ``[tokens, 2]``, logits of each token as beginning and as end.
        teacher: the same.
    """
    return soft_label_losses(student.t(), teacher.t(), settings).mean()


def _coins(logits: Tensor) -> Tensor:
    """Log-probabilities of yes and no, ``[rows, classes, 2]``."""
    return torch.stack([functional.logsigmoid(logits), functional.logsigmoid(-logits)], dim=-1)


def _divergence(s: Tensor, t: Tensor, settings: DistillSettings) -> Tensor:
    """Between log-probabilities, over the last dimension."""
    if settings.loss == "forward-kl":
        return (t.exp() * (t - s)).sum(dim=-1)
    if settings.loss == "reverse-kl":
        return (s.exp() * (s - t)).sum(dim=-1)
    beta = torch.tensor(settings.beta, dtype=s.dtype, device=s.device)
    mixture = torch.logaddexp(t + beta.log(), s + (1 - beta).log())
    towards = (t.exp() * (t - mixture)).sum(dim=-1), (s.exp() * (s - mixture)).sum(dim=-1)
    return beta * towards[0] + (1 - beta) * towards[1]
