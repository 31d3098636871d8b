"""Answers about a whole row: one class, several at once, or a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qft.errors import ModelError

if TYPE_CHECKING:
    from qft.data.examples import Example


class ClassJudge:
    """By the labels' form: one class ``[batch]``, several ``[batch, classes]``, numbers (float)."""

    def __init__(self, labels: Sequence[str] | None = None) -> None:
        self._labels = labels
        self._losses: list[float] = []
        self._logits: list[Tensor] = []
        self._truths: list[Tensor] = []

    def score(
        self, model: nn.Module, batch: dict[str, Tensor], examples: Sequence[Example]
    ) -> tuple[list[float], Tensor, Tensor]:
        """See `Judge`."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits.float()
        labels = batch["labels"].to(logits.device)
        self._require_same_width(logits, labels)
        if not labels.is_floating_point():
            nats = nn.functional.cross_entropy(logits, labels, reduction="none")
        elif labels.dim() == 2:
            nats = nn.functional.binary_cross_entropy_with_logits(
                logits, labels, reduction="none"
            ).mean(dim=1)
        else:
            nats = (logits.squeeze(-1) - labels) ** 2
        return nats.double().tolist(), logits.cpu(), labels.cpu()

    def _require_same_width(self, logits: Tensor, labels: Tensor) -> None:
        told = logits.shape[-1]
        if labels.dim() == 2:
            wanted = labels.shape[1]
        elif labels.is_floating_point():
            wanted = 1
        else:
            known = told if self._labels is None else len(self._labels)
            wanted = max(known, int(labels.max()) + 1)
        if told != wanted:
            raise ModelError(
                "The model and the data have different classes.",
                found=f"the model tells {told} apart, the data has {wanted}",
                fix="evaluate with the classes the model was trained on",
            )

    def add(self, scores: tuple[list[float], Tensor, Tensor]) -> None:
        """See `Judge`."""
        self._losses += scores[0]
        self._logits.append(scores[1])
        self._truths.append(scores[2])

    def result(self, examples: Sequence[Example]) -> dict[str, float]:
        """The mean loss and the measures of the labels' form."""
        logits, truths = torch.cat(self._logits), torch.cat(self._truths)
        loss = math.fsum(self._losses) / len(self._losses)
        if not truths.is_floating_point():
            measures = _of_classes(logits.argmax(dim=-1).tolist(), truths.tolist())
        elif truths.dim() == 2:
            measures = _of_sets((logits > 0).long(), truths.long())
        else:
            measures = _of_numbers(logits.squeeze(-1), truths)
        return {"loss": loss, **measures}


def _of_classes(answers: list[int], truths: list[int]) -> dict[str, float]:
    from sklearn.metrics import f1_score, matthews_corrcoef

    right = sum(answer == truth for answer, truth in zip(answers, truths, strict=True))
    return {
        "accuracy": right / len(truths),
        "macro_f1": float(f1_score(truths, answers, average="macro", zero_division=0)),
        "matthews": float(matthews_corrcoef(truths, answers)),
    }


def _of_sets(answers: Tensor, truths: Tensor) -> dict[str, float]:
    from sklearn.metrics import f1_score

    scores = {
        f"{average}_f1": float(
            f1_score(truths.numpy(), answers.numpy(), average=average, zero_division=0)
        )
        for average in ("micro", "macro")
    }
    return {"accuracy": float((answers == truths).all(dim=1).double().mean()), **scores}


def _of_numbers(answers: Tensor, truths: Tensor) -> dict[str, float]:
    """Root mean squared error; correlations are 0 where either side never varies."""
    from scipy.stats import pearsonr, spearmanr

    error = float(((answers - truths).double() ** 2).mean().sqrt())
    pairs = answers.double().numpy(), truths.double().numpy()
    varied = len(truths) > 1 and all(float(side.std()) > 0 for side in pairs)
    found: dict[str, Any] = {
        "pearson": pearsonr(*pairs)[0] if varied else 0.0,
        "spearman": spearmanr(*pairs)[0] if varied else 0.0,
    }
    return {"rmse": error, **{name: float(value) for name, value in found.items()}}
