"""A loss other than the task's plain one: smoothed labels, weighted classes.

The model computes its own loss as ever (a strategy may have added to it); what is added here is
the difference that smoothing and weights make.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qft.data.encoding import UNSUPERVISED
from qft.data.packing import Row

if TYPE_CHECKING:
    from qft.data.examples import Example, Task


@dataclass(frozen=True)
class TaskLoss:
    """How labels count.

    Attributes:
        smoothing: share of each label that is spread over all choices (Szegedy et al. 2016,
            https://arxiv.org/abs/1512.00567).
        class_weights: what a label of each class counts; None is 1 for all.
    """

    smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None

    @property
    def plain(self) -> bool:
        """Whether the model's own loss is all there is."""
        return self.smoothing == 0 and self.class_weights is None

    def items(self, task: Task, batch: Mapping[str, Tensor]) -> float:
        """What the mean loss of a batch is a mean over: labels, or their weights."""
        if self.class_weights is None:
            return task.label_count(batch)
        labels = batch["labels"]
        kept = labels[labels != UNSUPERVISED]
        return float(torch.tensor(self.class_weights)[kept].sum())

    def examples(
        self, model: nn.Module, examples: Sequence[Example], step: int
    ) -> Sequence[Example]:
        """What a step trains on: the data's own."""
        return examples

    def arguments(self, rows: Sequence[Row], *, chunked: bool) -> dict[str, Any]:
        """What the model's forward is told beside the batch.

        Args:
            rows: which examples each row of the batch holds.
            chunked: whether the model's loss is the engine's, which smooths labels itself.
        """
        return {"label_smoothing": self.smoothing} if chunked and self.smoothing else {}

    def of(self, output: Any, batch: Mapping[str, Tensor], *, shifted: bool) -> Tensor:
        """The mean loss over a batch's items.

        Args:
            output: the model's, with its own `loss` and `logits`.
            shifted: whether position t predicts label t + 1.
        """
        own: Tensor = output.loss
        if self.plain or output.logits is None:  # the chunked loss has smoothed its labels itself
            return own
        labels, logits = batch["labels"].to(output.logits.device), output.logits
        if labels.dim() == 2:
            logits = logits[:, -labels.shape[1] :]  # a soft prompt may stand before them
        if shifted:
            labels, logits = labels[:, 1:], logits[:, :-1]
        kept = labels != UNSUPERVISED
        chosen, targets = logits[kept].float(), labels[kept]
        weights = None
        if self.class_weights is not None:
            weights = torch.tensor(self.class_weights, device=chosen.device)
        mine = _mean(chosen, targets, self.smoothing, weights)
        return own + (mine - functional.cross_entropy(chosen, targets))


def _mean(logits: Tensor, targets: Tensor, smoothing: float, weights: Tensor | None) -> Tensor:
    """Each row counts by its own class's weight, its smoothed part as well."""
    losses = functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    if weights is None:
        return losses.mean()
    return (losses * weights[targets]).sum() / weights[targets].sum()


def balanced_weights(examples: Sequence[Example], classes: int) -> tuple[float, ...]:
    """Weights by which every class counts the same in all; their mean over the rows is 1.

    A class that no row has counts 1.
    """
    found: Counter[int] = Counter()
    for example in examples:
        labels = example.inputs["labels"]
        found.update(label for label in (labels if isinstance(labels, list) else [labels])
                     if label != UNSUPERVISED)  # fmt: skip
    total, seen = sum(found.values()), len(found)
    return tuple(total / (seen * found[c]) if found[c] else 1.0 for c in range(classes))
