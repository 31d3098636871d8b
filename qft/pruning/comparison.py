"""The whole model and the pruned one on the same held-out rows: quality, distance, speed.

The two are opened one after the other. Of the first there stays what its head was given, a vector
a position, and the head's own weight; distributions over the vocabulary are made again from those,
a few hundred positions at a time, and so are exact without ever being stored.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qft import models
from qft.data.encoding import UNSUPERVISED
from qft.data.tasks import Example
from qft.evaluation import evaluate, evaluating
from qft.lean.model_loss import after_logits
from qft.lean.model_parts import device_of, output_embeddings
from qft.progress import QUIET, Reporter
from qft.pruning.calibration import CalibrationRows

_POSITIONS = 256  # whose distributions over the vocabulary exist at once, twice, in float32
_MICRO_BATCH = 4
_TIMED_ROWS = 16
_TIMED_PASSES = 5


@dataclass(frozen=True)
class Answers:
    """What a model says on the held-out rows, ready to be made into distributions.

    Attributes:
        values: ``[positions, hidden]`` before a head, or logits ``[positions, choices]``.
        weight: the head's, ``[vocabulary, hidden]``; None where ``values`` are logits.
    """

    values: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def log_probabilities(self, part: slice) -> Tensor:
        """Of some positions, ``[positions, choices]``, float32."""
        logits = self.values[part]
        if self.weight is not None:
            logits = functional.linear(logits.to(self.weight), self.weight, self.bias)
        logits = logits.float() * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.log_softmax(-1)


@dataclass(frozen=True)
class Measured:
    """One model on the rows.

    Attributes:
        metrics: as `qft eval` gives them.
        answers: None where a model answers with numbers or several classes.
        tokens_per_second: read, not written: forward passes over the scored rows.
    """

    metrics: dict[str, float]
    answers: Answers | None
    tokens_per_second: float


def measure(
    folder: Path, spec: models.ModelSpec, rows: CalibrationRows, title: str,
    reporter: Reporter = QUIET,
) -> Measured:  # fmt: skip
    """Opens a model, asks it everything, and lets it go again.

    Raises:
        WillNotFitError: it does not fit.
    """
    model: Any = models.open_model(folder, spec)
    with reporter.bar(f"evaluate {title}", len(rows.held_out)) as bar:
        metrics = evaluate(
            model, rows.held_out, rows.task, pad_token_id=rows.pad_token_id,
            micro_batch=_MICRO_BATCH, labels=rows.labels, progress=bar.advance,
        )  # fmt: skip
    with evaluating(model):
        answers = _answers(model, rows)
        speed = _tokens_per_second(model, rows)
    return Measured(metrics, answers, speed)


def mean_divergence(reference: Answers, pruned: Answers) -> float:
    """Mean KL(reference ‖ pruned) in nats a position (Kullback & Leibler 1951)."""
    total, count = 0.0, len(reference.values)
    for start in range(0, count, _POSITIONS):
        part = slice(start, start + _POSITIONS)
        wanted, found = reference.log_probabilities(part), pruned.log_probabilities(part)
        total += functional.kl_div(found, wanted, reduction="sum", log_target=True).item()
    return max(total / max(count, 1), 0.0)


def _answers(model: Any, rows: CalibrationRows) -> Answers | None:
    """The model's answers at every label of the held-out rows."""
    if rows.task.predicts == "span" or (
        rows.task.predicts == "class" and not isinstance(rows.held_out[0].inputs["labels"], int)
    ):
        return None
    head = output_embeddings(model) if rows.task.predicts == "tokens" else None
    if head is None:
        return Answers(torch.cat([_logits(model, rows, part) for part in _parts(rows.held_out)]))
    values = torch.cat([_head_inputs(model, rows, part) for part in _parts(rows.held_out)])
    scale, softcap = after_logits(model.config)
    weight, bias = getattr(head, "weight"), getattr(head, "bias", None)  # noqa: B009
    kept = None if bias is None else bias.detach().cpu().clone()
    return Answers(values, weight.detach().cpu().clone(), kept, scale, softcap)


def _parts(examples: Sequence[Example]) -> list[list[Example]]:
    ordered = sorted(examples, key=lambda e: (-len(e.inputs["input_ids"]), e.index))
    return [ordered[at : at + _MICRO_BATCH] for at in range(0, len(ordered), _MICRO_BATCH)]


def _batch(model: Any, rows: CalibrationRows, part: Sequence[Example]) -> dict[str, Tensor]:
    batch = rows.task.collate(part, rows.pad_token_id)
    return {name: value.to(device_of(model)) for name, value in batch.items()}


def _logits(model: Any, rows: CalibrationRows, part: Sequence[Example]) -> Tensor:
    batch = _batch(model, rows, part)
    labels = batch.pop("labels")
    logits: Tensor = model(**batch).logits.cpu()
    return logits if logits.dim() == 2 else logits[labels.cpu() != UNSUPERVISED]


def _head_inputs(model: Any, rows: CalibrationRows, part: Sequence[Example]) -> Tensor:
    batch = _batch(model, rows, part)
    wanted = batch.pop("labels")[:, 1:] != UNSUPERVISED  # position t predicts label t + 1
    hidden: Tensor = model.base_model(**batch).last_hidden_state
    return hidden[:, :-1][wanted].cpu()


def _tokens_per_second(model: Any, rows: CalibrationRows) -> float:
    """The best of a few passes over the first scored rows, which other programs disturb least."""
    takes = inspect.signature(type(model).forward).parameters
    extra = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    batches = []
    for part in _parts(rows.scored[:_TIMED_ROWS]):
        batch = _batch(model, rows, part)
        batches.append({k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")})
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    seconds = []
    for _ in range(_TIMED_PASSES):
        _wait(model)
        started = time.perf_counter()
        for batch in batches:
            model(**batch, **extra)
        _wait(model)
        seconds.append(time.perf_counter() - started)
    return tokens / min(seconds)


def _wait(model: Any) -> None:
    if device_of(model).type == "cuda":
        torch.cuda.synchronize()
