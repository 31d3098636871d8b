"""Answers that are tokens of the vocabulary: every task that writes text."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qft.data.encoding import UNSUPERVISED
from qft.preparation import prepared

if TYPE_CHECKING:
    from qft.data.examples import Example

CHUNK_POSITIONS = 512  # label positions whose float32 log-probabilities exist at once


class TokenJudge:
    """Loss, perplexity, bits per byte and accuracy over supervised tokens."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._right = 0
        self._count = 0

    def score(
        self, model: nn.Module, batch: dict[str, Tensor], examples: Sequence[Example]
    ) -> tuple[list[float], int, int]:
        """See `Judge`."""
        labels = batch["labels"]
        state = prepared(model)
        if state is not None and state.engine.loss is not None and state.engine.loss.usable():
            found = state.engine.loss.score(model, batch)
            kept = found["label_mask"]
            nats = (-found["log_probs"][kept]).double().tolist()
            return nats, int(found["is_top1"][kept].sum()), len(nats)
        if labels.shape != batch["input_ids"].shape:  # a decoder of its own; nothing is shifted
            rows, columns = (labels != UNSUPERVISED).nonzero(as_tuple=True)
            # the last positions: a soft prompt may stand before them
            logits = model(**batch).logits[:, -labels.shape[1] :]
            return _nats(logits, rows, columns, labels[rows, columns])
        wanted = labels[:, 1:] != UNSUPERVISED  # position t predicts label t + 1
        if not bool(wanted.any()):
            return [], 0, 0
        first = int(wanted.any(dim=0).nonzero()[0])
        # The last positions only, counted from the end: soft prompts make the model's own
        # sequence longer at its beginning.
        keep = labels.shape[1] - first
        extra = {"logits_to_keep": keep} if _takes_logits_to_keep(model) else {}
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **extra
        ).logits[:, -keep:]
        rows, columns = wanted[:, first:].nonzero(as_tuple=True)
        targets = labels[:, 1:][rows, columns + first]
        return _nats(logits, rows, columns, targets)

    def add(self, scores: tuple[list[float], int, int]) -> None:
        """See `Judge`."""
        self._losses += scores[0]
        self._right += scores[1]
        self._count += scores[2]

    def result(self, examples: Sequence[Example]) -> dict[str, float]:
        """`loss` (nats a token), `perplexity`, `bits_per_byte`, `token_accuracy`."""
        if not self._count:
            raise ValueError("no supervised token in the examples")
        nats = math.fsum(self._losses)  # exact, and so the same in any order
        loss = nats / self._count
        metrics = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
        total_bytes = sum(example.label_bytes for example in examples)
        if total_bytes:
            metrics["bits_per_byte"] = nats / math.log(2) / total_bytes
        metrics["token_accuracy"] = self._right / self._count
        return metrics


def _nats(
    logits: Tensor, rows: Tensor, columns: Tensor, targets: Tensor
) -> tuple[list[float], int, int]:
    """Each target's loss, how many were the likeliest, and how many there are."""
    losses: list[float] = []
    right = 0
    for at in range(0, len(rows), CHUNK_POSITIONS):
        part = slice(at, at + CHUNK_POSITIONS)
        chosen = logits[rows[part], columns[part].to(logits.device)].float()
        target = targets[part].to(chosen.device)
        nats = nn.functional.cross_entropy(chosen, target, reduction="none")
        losses += nats.double().tolist()
        right += int((chosen.argmax(dim=-1) == target).sum())
    return losses, right, len(losses)


def _takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the transformers model computes only the logits of the last positions when asked."""
    inner: Any = getattr(model, "module", model)
    if hasattr(inner, "get_base_model"):  # PEFT hands unknown arguments through
        inner = inner.get_base_model()
    return "logits_to_keep" in inspect.signature(type(inner).forward).parameters
