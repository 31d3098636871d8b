"""Does the artefact still know what training taught? Its answers against the reference's, measured.

Both models are in memory here; `qft.verification.layerwise` compares two that do not fit together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qft import quantization
from qft.data.tasks import Example, Task
from qft.errors import VerificationError
from qft.evaluation import judge_of
from qft.files import write_json
from qft.judging.judge import Judge
from qft.lean.model_parts import device_of
from qft.verification.answers import comparable, inputs_of, judge_output
from qft.verification.diagnosis import HEAD, VECTORS, Finding, advice
from qft.verification.listening import LayerListener
from qft.verification.tally import LayerTally, LogitTally, first_diverging
from qft.verification.thresholds import Thresholds, thresholds_of

FILE = "verification.json"
_ROWS = 4  # rows a forward pass: their logits are what is held


@dataclass(frozen=True)
class Verification:
    """How far an artefact is from its reference.

    Attributes:
        format: what was verified.
        positions: how many predictions were compared.
        mean_kl: nats a position, of the artefact from the reference.
        p99_kl: the 99th percentile of the same.
        top1: share of positions with the same likeliest token or class.
        perplexity_reference: over the labels; None without any.
        perplexity: the artefact's.
        max_difference: the largest absolute difference of two logits.
        thresholds: what was allowed.
        metrics_reference: in the measures of the task; empty without labels.
        metrics: the artefact's.
        layers: mean relative difference of the hidden states, by where in the model.
        first_diverging_layer: where they first differ by more than the format's rounding:
            ``embeddings``, a layer's name, ``head``; None where nothing diverges.
        findings: what else differs: tensors, tokens, template, stop tokens.
        notes: what a person should know, a sentence each.
        quantized: whether the reference's base is held quantized.
    """

    format: str
    positions: int
    mean_kl: float
    p99_kl: float
    top1: float
    perplexity_reference: float | None
    perplexity: float | None
    max_difference: float
    thresholds: Thresholds
    metrics_reference: Mapping[str, float]
    metrics: Mapping[str, float]
    layers: Mapping[str, float]
    first_diverging_layer: str | None
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    quantized: bool = False

    def past(self) -> list[str]:
        """Every figure past its threshold, a phrase each; NaN is past every one."""
        limits = self.thresholds
        found = []
        if not self.mean_kl <= limits.mean_kl:
            found.append(f"mean KL {self.mean_kl:.4g}, allowed {limits.mean_kl:g}")
        if not self.p99_kl <= limits.p99_kl:
            found.append(f"99th percentile of KL {self.p99_kl:.4g}, allowed {limits.p99_kl:g}")
        if not self.top1 >= limits.top1:
            found.append(f"same first choice in {self.top1:.2%}, wanted {limits.top1:.1%}")
        ratio = self.perplexity_ratio
        if ratio is not None and not ratio <= limits.perplexity_ratio:
            found.append(f"perplexity {self.perplexity:.4g} against "
                         f"{self.perplexity_reference:.4g}")  # fmt: skip
        if self.first_diverging_layer in self.layers:
            found.append(f"hidden states diverge from {self.first_diverging_layer} on")
        return found

    @property
    def perplexity_ratio(self) -> float | None:
        """The artefact's over the reference's."""
        if self.perplexity is None or self.perplexity_reference is None:
            return None
        return self.perplexity / self.perplexity_reference

    def problems(self) -> list[str]:
        """All that is wrong, a phrase each."""
        return [*self.past(), *(finding.text for finding in self.findings)]

    def check(self, where: Path | None = None) -> None:
        """Raises VerificationError (exit code 5) where anything is wrong, with advice."""
        if not self.problems():
            return
        found = "; ".join(self.problems())
        if self.past() and self.first_diverging_layer not in self.layers:
            place = self.first_diverging_layer
            found += f"; first diverging: the {place}" if place else "; no layer diverges by itself"
        raise VerificationError(
            f"The artefact ({self.format}) is not the model that was trained.",
            where=where,
            found=found,
            fix=advice(self.format, bool(self.past()), self.first_diverging_layer,
                       list(self.layers), self.findings, self.quantized),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the verdict."""
        return {**asdict(self), "passed": not self.problems()}

    def write(self, folder: Path) -> None:
        """Writes verification.json beside the artefact."""
        write_json(folder / FILE, self.to_dict())


@dataclass(frozen=True)
class Rows:
    """Held-out rows and who judges answers to them.

    Attributes:
        examples: of one task.
        task: says what a label is.
        pad_token_id: to fill up with.
        labels: the classes or tags in order.
    """

    examples: Sequence[Example]
    task: Task
    pad_token_id: int
    labels: Sequence[str] | None = None

    def batches(self) -> Iterator[tuple[dict[str, Tensor], Sequence[Example]]]:
        """Collated, a few rows at a time, like lengths together."""
        ordered = sorted(self.examples, key=lambda e: (-len(e.inputs["input_ids"]), e.index))
        for begin in range(0, len(ordered), _ROWS):
            part = ordered[begin : begin + _ROWS]
            yield self.task.collate(part, self.pad_token_id), part


class Comparison:
    """Takes in what both models say, and makes the verdict of it.

    Args:
        rows: who judges; None where there are batches without examples.
    """

    def __init__(self, rows: Rows | None = None) -> None:
        self.logits, self.layers = LogitTally(), LayerTally()
        self.places: list[str] = []  # names of where hidden states are compared
        self._rows = rows
        self._judges: tuple[Judge, ...] = ()
        if rows is not None and rows.task.predicts not in ("tokens", "vectors"):
            self._judges = tuple(judge_of(rows.task, rows.labels) for _ in range(2))

    def compare_vectors(self, outputs: Sequence[Any], text: Tensor) -> None:
        """Takes in what encoders without a head answer, where no layer can be listened to."""
        bare = not hasattr(outputs[0], "logits") and hasattr(outputs[0], VECTORS)
        if bare and self.places in ([], [VECTORS]):
            self.places = [VECTORS]
            first, second = (getattr(output, VECTORS) for output in outputs)
            self.layers.add(0, first, second, text)

    def judge(
        self, outputs: Sequence[Any], batch: Mapping[str, Tensor], examples: Sequence[Example]
    ) -> None:
        """Scores both answers in the measures of the task; tokens are counted by the tally."""
        for judge, output in zip(self._judges, outputs, strict=bool(self._judges)):
            judge_output(judge, output, batch, examples)

    def result(
        self, format: str, thresholds: Thresholds, notes: Sequence[str] = ()
    ) -> Verification:
        """The figures.

        Raises:
            VerificationError: there was nothing to compare.
        """
        count, mean, p99 = self.logits.divergence()
        perplexities = self.logits.perplexities()
        differences = self.layers.differences()
        place = first_diverging(differences, thresholds.layer)
        found = Verification(
            format=format,
            positions=count,
            mean_kl=mean,
            p99_kl=p99,
            top1=self.logits.top1(),
            perplexity_reference=perplexities[0],
            perplexity=perplexities[1],
            max_difference=self.logits.largest,
            thresholds=thresholds,
            metrics_reference=self._metrics(0),
            metrics=self._metrics(1),
            layers=dict(zip(self.places, differences, strict=False)),
            first_diverging_layer=None if place is None else self.places[place],
            notes=tuple(notes),
        )
        if _only_the_head(found):
            return replace(found, first_diverging_layer=HEAD)
        return found

    def _metrics(self, side: int) -> dict[str, float]:
        if self._judges and self._rows is not None:
            return self._judges[side].result(self._rows.examples)
        accuracy = self.logits.accuracies()[side]
        return {} if accuracy is None else {"token_accuracy": accuracy}


def _only_the_head(found: Verification) -> bool:
    """Whether the layers agree and the answers are far apart all the same."""
    limit = found.thresholds
    return (
        bool(found.layers)
        and first_diverging(list(found.layers.values()), limit.layer / 2) is None
        and not found.mean_kl <= 10 * limit.mean_kl
    )


def verify(
    reference: nn.Module,
    artefact: nn.Module,
    batches: Iterable[Mapping[str, Tensor]] | Rows,
    *,
    format: str,
    thresholds: Thresholds | None = None,
    progress: Callable[[int], object] | None = None,
) -> Verification:
    """Compares two models' predictions over held-out rows; both are put in eval mode.

    Args:
        reference: what was trained (base and adapter, or the merged model).
        artefact: what :func:`qft.verification.read_back.read_back` opened.
        batches: held-out rows; or batches of ``input_ids`` [batch, length], ``attention_mask``,
            and ``labels`` where there are any: a language model is then compared only where the
            labels ask for a token.
        format: a key of THRESHOLDS.
        thresholds: instead of the format's own.
        progress: called with the number of rows just done.

    Raises:
        VerificationError: there is nothing to compare, or the two models' outputs differ in shape.
    """
    models = (reference, artefact)
    for model in models:
        quantization.guard_cpu_kernels(model)
        model.eval()
    comparison = Comparison(batches if isinstance(batches, Rows) else None)
    listener = LayerListener(models, comparison.layers)
    comparison.places = listener.places
    try:
        for rows, examples in _batches(batches):
            listener.text = rows.get("attention_mask", torch.ones_like(rows["input_ids"])).bool()
            inputs = inputs_of(reference, rows)
            with torch.no_grad():
                outputs = [
                    model(**{k: v.to(device_of(model)) for k, v in inputs.items()})
                    for model in models
                ]
            comparison.logits.add(*comparable(reference, rows, outputs))
            comparison.compare_vectors(outputs, listener.text)
            comparison.judge(outputs, rows, examples)
            if progress is not None:
                progress(len(rows["input_ids"]))
    finally:
        listener.remove()
    return comparison.result(format, thresholds or thresholds_of(format), listener.notes)


def _batches(
    batches: Iterable[Mapping[str, Tensor]] | Rows,
) -> Iterator[tuple[Mapping[str, Tensor], Sequence[Example]]]:
    if isinstance(batches, Rows):
        yield from batches.batches()
        return
    for batch in batches:
        for begin in range(0, batch["input_ids"].shape[0], _ROWS):
            yield {key: value[begin : begin + _ROWS] for key, value in batch.items()}, ()
