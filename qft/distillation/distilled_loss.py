"""The loss of a student: its task's own, mixed with what its teacher says.

It stands where `qft.task_loss.TaskLoss` stands otherwise. For texts the two are one pass over the
label positions within the model's own forward (`qft.lean.label_loss`), so that the logits of
neither model ever exist as a whole; heads have few logits, which are compared as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qft.data.encoding import UNSUPERVISED
from qft.data.examples import Example, Task
from qft.data.packing import Row
from qft.distillation.heads import soft_label_losses, span_losses
from qft.distillation.lessons import Lesson, Source, joined, label_rows, layer_key
from qft.distillation.live import half_of, hidden_positions, supervised_alone
from qft.distillation.matching import Pairs, distances, projections_of
from qft.distillation.objective import DistillSettings
from qft.distillation.own_texts import OwnTexts
from qft.errors import QftError
from qft.lean.divergence import Divergence, LiveRows, Sampled, Teacher, TopK
from qft.lean.label_loss import CrossEntropy, LogitLoss, Mixed
from qft.lean.model_parts import encoder_layers
from qft.lean.sorted_gap import SortedGap
from qft.lean.taps import Taps
from qft.preparation import inner_model
from qft.task_loss import TaskLoss


@dataclass(frozen=True)
class Teaching:
    """Turns the labels' loss into the mixed one; see `qft.lean.model_loss.Teaching`."""

    lessons: Sequence[Lesson]
    source: Source
    settings: DistillSettings
    share: float

    def __call__(self, labels: CrossEntropy, count: int) -> LogitLoss:
        """The loss of ``count`` positions."""
        towards = self._towards(count)
        share = self.share
        return towards if share == 1 else Mixed(labels, towards, (1 - share, share))

    def _towards(self, count: int) -> LogitLoss:
        settings, shared = self.settings, self.source.shared
        if "samples" in self.lessons[0]:
            samples, weights, entropy = (
                self._joined(name, count) for name in ("samples", "weights", "entropy")
            )
            return Sampled(samples, weights, entropy, settings.temperature, shared)
        teacher = self._teacher(count)
        if settings.loss == "uld":
            return SortedGap(teacher, self._joined("paired", count))
        assert settings.loss != "none"
        return Divergence(teacher, settings.loss, settings.temperature, settings.beta, shared)

    def _teacher(self, count: int) -> Teacher:
        if "tokens" in self.lessons[0]:
            return TopK(self._joined("tokens", count), self._joined("log_probabilities", count))
        assert self.source.head is not None
        head, vocabulary = self.source.head
        return LiveRows(
            self._joined("states", count),
            head,
            vocabulary,
            self.source.shared or vocabulary,
            self.settings.temperature,
        )

    def _joined(self, name: str, count: int) -> Tensor:
        found = joined(self.lessons, name)
        if len(found) != count:
            raise QftError(
                "The teacher's lessons and the student's labels do not belong together.",
                found=f"{len(found)} positions in the lessons, {count} with a label",
            )
        return found


@dataclass
class DistilledLoss:
    """What a student minimises.

    Attributes:
        own: the task's loss.
        source: of the lessons.
        model: the student, as users hold it.
        pairs: its layers with those of the teacher that they learn from.
        labels_are: one class a row, ``many``, or a ``number`` (classify).
        own_texts: lets the student write in some of the steps.
    """

    own: TaskLoss
    settings: DistillSettings
    source: Source
    task: Task
    model: nn.Module
    pairs: Pairs = field(default_factory=dict)
    labels_are: str = "one"
    own_texts: OwnTexts | None = None
    _alone: bool = False  # the labels are the student's own words: nothing to learn from them
    _taps: Taps | None = None
    _rows: Sequence[Row] = ()
    _lessons: Sequence[Lesson] = ()

    def __post_init__(self) -> None:
        inner = inner_model(self.model)
        self._encoder_layers = encoder_layers(inner)
        if self.pairs:
            self._taps = Taps(inner, list(self.pairs))

    def examples(
        self, model: nn.Module, examples: Sequence[Example], step: int
    ) -> Sequence[Example]:
        """See `TaskLoss.examples`; in a share of the steps the student writes the answers."""
        self._alone = self.own_texts is not None and self.own_texts.is_for(step)
        if self.own_texts is None or not self._alone:
            return examples
        return self.own_texts.written(model, examples, step)

    def items(self, task: Task, batch: Mapping[str, Tensor]) -> float:
        """See `TaskLoss.items`."""
        return self.own.items(task, batch)

    def arguments(self, rows: Sequence[Row], *, chunked: bool) -> dict[str, Any]:
        """What the model's forward is told beside the batch; asks the teacher about the rows.

        Args:
            rows: which examples each row of the batch holds.
            chunked: whether the model's forward takes a `qft.lean.model_loss.Teaching`.
        """
        extra = self.own.arguments(rows, chunked=chunked)
        self._lessons = ()  # of a pass that did not fit
        if self._taps is not None:
            self._taps.take()
        self._rows = rows
        self._lessons = self.source.lessons([example for row in rows for example in row])
        if self._taps is not None:
            self._taps.listen()
        if self.task.predicts == "tokens" and self.settings.loss != "none":
            if not chunked:
                raise QftError(
                    "A student of texts needs the engine's loss, which this model does without.",
                    found=type(self.model).__name__,
                    fix="memory.savers.label_loss: true; with it this family is not supported",
                )
            share = 1.0 if self._alone else self.settings.weight
            extra["teaching"] = Teaching(self._lessons, self.source, self.settings, share)
        return extra

    def of(self, output: Any, batch: Mapping[str, Tensor], *, shifted: bool) -> Tensor:
        """The mean loss over a batch's items; see `TaskLoss.of`."""
        if self.task.predicts == "tokens":
            mean: Tensor = output.loss if output.logits is None else self.own.of(
                output, batch, shifted=shifted
            )  # fmt: skip
        else:
            mean = self.own.of(output, batch, shifted=shifted)
            if self.settings.loss != "none":
                share = self.settings.weight
                mean = (1 - share) * mean + share * self._soft_labels(output, batch)
        if self._taps is not None:
            assert self.settings.hidden is not None
            mean = mean + self.settings.hidden.weight * self._hidden(batch, shifted)
        self._lessons, self._rows = (), ()
        return mean

    def _soft_labels(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        if self.task.predicts == "span":
            ends = zip(output.start_logits, output.end_logits, self._lessons, strict=True)
            found = [
                span_losses(
                    torch.stack([start, end], dim=1)[: len(lesson["logits"])],
                    lesson["logits"],
                    self.settings,
                )
                for start, end, lesson in ends
            ]
            return torch.stack(found).mean()
        logits = output.logits
        if self.task.predicts == "tags":
            logits = logits[:, -batch["labels"].shape[1] :]  # a soft prompt may stand before them
            logits = logits[batch["labels"].to(logits.device) != UNSUPERVISED]
        teacher = joined(self._lessons, "logits")
        return soft_label_losses(logits, teacher, self.settings, self.labels_are).mean()

    def _hidden(self, batch: Mapping[str, Tensor], shifted: bool) -> Tensor:
        """The mean over the pairs of layers; within an example each of its tokens counts alike."""
        assert self._taps is not None
        assert self.settings.hidden is not None
        learned = projections_of(self.model)
        caught = self._taps.take()
        terms = []
        for layer, hidden in caught.items():
            mask = hidden_positions(
                self._rows,
                batch,
                supervised=supervised_alone(self.settings, self.task),
                shifted=shifted,
                half=half_of(layer, self._encoder_layers),
            ).to(hidden.device)
            chosen = hidden[:, -mask.shape[1] :][mask]
            if learned is not None:
                chosen = learned[str(layer)](chosen)
            else:
                chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
            name = layer_key(self.pairs[layer])
            teacher = joined(self._lessons, name)
            far = distances(chosen, teacher, self.settings.hidden.distance)
            sizes = [len(lesson[name]) for lesson in self._lessons]
            terms.append((far * self._shares(sizes, shifted, far)).sum())
        return torch.stack(terms).mean()

    def _shares(self, sizes: Sequence[int], shifted: bool, like: Tensor) -> Tensor:
        """What each hidden state counts: an example's count as much together as its labels do.

        So the loss is the same however a step's examples are split.
        """
        examples: list[Example] = [example for row in self._rows for example in row]
        shifted = shifted and self.task.predicts == "tokens"
        items = [
            label_rows(example, shifted=shifted) if self.task.predicts in ("tokens", "tags") else 1
            for example in examples
        ]
        total = sum(items)
        per_row = torch.tensor(
            [item / size / total for item, size in zip(items, sizes, strict=True)],
            dtype=torch.float64,
        )
        return per_row.repeat_interleave(torch.tensor(sizes)).to(like.device, like.dtype)
