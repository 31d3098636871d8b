"""What TRL asks of a model: log-probability, entropy and rank of each label, and no logits.

TRL's trainers put an output layer of their own into the model, which they reach by calling it with
``fused_lm_head=True``. A prepared model answers that call itself, from the chunked loss: same
fields, same meaning, and the savings of `qft.lean.label_loss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qft.lean.label_loss import CrossEntropy, Head, label_losses

ASKED = "fused_lm_head"


@dataclass(frozen=True)
class _Scored:
    """Cross-entropy that notes entropy and rank as it goes; see `qft.lean.label_loss.LogitLoss`."""

    inner: CrossEntropy
    is_top1: Tensor
    entropy: Tensor | None

    @property
    def extra_tensors(self) -> int:
        return self.inner.extra_tensors

    def __call__(self, logits: Tensor, rows: slice) -> Tensor:
        targets = self.inner.targets[rows]
        self.is_top1[rows] = logits.argmax(dim=1) == targets
        nats = self.inner(logits, rows)
        if self.entropy is None:
            return nats
        # what is left is the gradient: the probabilities, less 1 at the label
        chances = logits.scatter_add(1, targets[:, None], torch.ones_like(nats)[:, None])
        self.entropy[rows] = torch.special.entr(chances.clamp_(min=0)).sum(dim=1)
        return nats


def token_scores(
    chosen: Tensor,
    head: Head,
    loss: CrossEntropy,
    kept: Tensor,
    *,
    vocabulary: int,
    shifted: bool,
    entropies: bool,
) -> dict[str, Tensor]:
    """TRL's fields, ``[batch, positions]``; the last position, which predicts nothing, is cut off.

    Args:
        chosen: ``[labels, width]``.
        kept: ``[batch, positions]``: where the labels are.
        vocabulary: rows of the head's weight.
        shifted: whether the last position predicts nothing.
        entropies: also those of the predicted distributions.
    """
    entropy = chosen.new_zeros(len(chosen), dtype=torch.float32) if entropies else None
    top = torch.zeros(len(chosen), dtype=torch.bool, device=chosen.device)
    nats = label_losses(chosen, head, _Scored(loss, top, entropy), vocabulary=vocabulary)
    last = -1 if shifted else None

    def placed(values: Tensor) -> Tensor:
        return values.new_zeros(kept.shape).masked_scatter(kept, values)[:, :last]

    found = {"log_probs": placed(-nats), "is_top1": placed(top), "label_mask": kept[:, :last]}
    return found if entropy is None else {**found, "entropy": placed(entropy)}


@dataclass(frozen=True)
class _TakeTheCall:
    """A hook before the outermost module's forward."""

    loss: Any

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not kwargs.get(ASKED) or not self.loss.answers_for_trl():
            return None
        self.loss.scored = "with-entropy"
        return args, {name: value for name, value in kwargs.items() if name != ASKED}


def answer_trl(model: nn.Module, loss: Any) -> RemovableHandle:
    """Lets the outermost module take TRL's call to the model's own forward.

    TRL replaces the inner ``forward`` after the model was prepared; the word it calls it with is
    taken off before it gets there.

    Args:
        model: as users hold it, PEFT's wrapper where there is one.
        loss: the model's `qft.lean.model_loss.ModelLoss`.
    """
    return model.register_forward_pre_hook(_TakeTheCall(loss), with_kwargs=True)
