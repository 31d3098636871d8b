"""A teacher in memory: it runs on the very examples that the student is about to run on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from qft.data.encoding import UNSUPERVISED
from qft.data.tasks import Example, Task
from qft.distillation.lessons import (
    Lesson,
    label_rows,
    layer_key,
    real_tokens,
    supervised_positions,
)
from qft.distillation.objective import DistillSettings
from qft.distillation.teachers import OpenTeacher
from qft.lean.label_loss import Head
from qft.lean.model_loss import vocabulary_of
from qft.lean.model_parts import device_of, encoder_layers, is_encoder_decoder
from qft.lean.taps import Taps
from qft.preparation import inner_model

Half = Literal["only", "encoder", "decoder"]


class LiveTeacher:
    """Lessons of a teacher that is there.

    Args:
        teacher: from `qft.distillation.teachers.open_teacher`.
        task: of the examples.
        pad_token_id: fills the right of shorter rows.
        settings: what is to be learned.
        layers: the teacher's layers whose hidden states are wanted.
        paired: examples in the teacher's own tokens by number, where these are others (uld).
    """

    def __init__(
        self,
        teacher: OpenTeacher,
        task: Task,
        pad_token_id: int,
        settings: DistillSettings,
        layers: Sequence[int] = (),
        paired: Mapping[int, Example] | None = None,
    ) -> None:
        self.teacher, self.task, self.pad_token_id = teacher, task, pad_token_id
        self.paired = paired
        self._layers, self._settings = tuple(dict.fromkeys(layers)), settings
        inner = inner_model(teacher.model)
        self._two_halves = is_encoder_decoder(inner)
        self._shifted = task.predicts == "tokens" and not self._two_halves
        self._taps = Taps(inner, self._layers) if self._layers else None
        self._encoder_layers = encoder_layers(inner)
        self.device = device_of(inner)
        self._head: tuple[Head, int] | None = None

    @property
    def shared(self) -> int | None:
        """See `qft.distillation.lessons.Source`."""
        return self.teacher.shared

    @property
    def head(self) -> tuple[Head, int] | None:
        """See `qft.distillation.lessons.Source`; there once a lesson was given."""
        return self._head

    def lessons(self, examples: Sequence[Example]) -> list[Lesson]:
        """One an example; all are run at once."""
        if self.paired is not None:
            return self._paired_lessons(examples, self.paired)
        return self._own_lessons(examples)

    def _own_lessons(self, examples: Sequence[Example]) -> list[Lesson]:
        batch = self.task.collate(examples, self.pad_token_id)
        inputs = {name: value.to(self.device) for name, value in batch.items()}
        if self._taps is not None:
            self._taps.listen()
        found: list[dict[str, Tensor]] = [{} for _ in examples]
        with torch.no_grad():
            if self.teacher.loss is not None:
                states, head = self.teacher.loss.label_states(self.teacher.model, inputs)
                self._head = head, vocabulary_of(self.teacher.loss.head)
                counts = [label_rows(example, shifted=self._shifted) for example in examples]
                for lesson, part in zip(found, states.split(counts), strict=True):
                    lesson["states"] = part
            else:
                self._add_head_logits(found, examples, inputs)
        if self._taps is not None:
            self._add_hidden(found, examples, batch, self._taps.take())
        return list(found)

    def _add_head_logits(
        self,
        found: list[dict[str, Tensor]],
        examples: Sequence[Example],
        inputs: Mapping[str, Tensor],
    ) -> None:
        output = self.teacher.model(**inputs)
        for number, (lesson, example) in enumerate(zip(found, examples, strict=True)):
            length = len(example.inputs["input_ids"])
            if self.task.predicts == "span":
                ends = output.start_logits[number, :length], output.end_logits[number, :length]
                lesson["logits"] = torch.stack(ends, dim=1)
                continue
            logits = output.logits[number]
            if self.task.predicts == "tags":
                logits = logits[inputs["labels"][number] != UNSUPERVISED]
            else:
                logits = logits[None]
            order = self.teacher.class_order
            lesson["logits"] = logits if order is None else logits[:, list(order)]

    def _add_hidden(
        self,
        found: list[dict[str, Tensor]],
        examples: Sequence[Example],
        batch: Mapping[str, Tensor],
        caught: Mapping[int, Tensor],
    ) -> None:
        for layer, hidden in caught.items():
            mask = hidden_positions(
                [[example] for example in examples],
                batch,
                supervised=supervised_alone(self._settings, self.task),
                shifted=self._shifted,
                half=half_of(layer, self._encoder_layers),
            )
            chosen = hidden[mask.to(hidden.device)]
            for lesson, part in zip(found, chosen.split(mask.sum(dim=1).tolist()), strict=True):
                lesson[layer_key(layer)] = part

    def _paired_lessons(
        self, examples: Sequence[Example], paired: Mapping[int, Example]
    ) -> list[Lesson]:
        """As many positions as the student has; where the teacher's text is shorter, none count."""
        made = self._own_lessons([paired[example.index] for example in examples])
        fitted: list[Lesson] = []
        for example, lesson in zip(examples, made, strict=True):
            rows = label_rows(example, shifted=self._shifted)
            states = lesson["states"][:rows]
            mark = states.new_ones(rows, dtype=torch.float32)
            mark[len(states) :] = 0
            missing = states.new_zeros(rows - len(states), states.shape[1])
            fitted.append({"states": torch.cat([states, missing]), "paired": mark})
        return fitted


def supervised_alone(settings: DistillSettings, task: Task) -> bool:
    """Whether hidden states are compared where a label is predicted, and nowhere else."""
    assert settings.hidden is not None
    wanted = settings.hidden.tokens
    return task.predicts == "tokens" and wanted in ("auto", "supervised")


def hidden_positions(
    rows: Sequence[Sequence[Example]],
    batch: Mapping[str, Tensor],
    *,
    supervised: bool,
    shifted: bool,
    half: Half,
) -> Tensor:
    """Where hidden states are compared: ``[rows, tokens]``, true there.

    Args:
        rows: which examples each row of the batch holds.
        supervised: only where a label is predicted.
        shifted: position t predicts label t + 1.
        half: whose states they are; a decoder beside an encoder reads the labels.
    """
    if half == "decoder":
        return batch["labels"] != UNSUPERVISED
    whole = real_tokens(rows, batch["input_ids"].shape[1])
    if not supervised or half == "encoder":
        return whole
    return supervised_positions(batch["labels"], shifted=shifted)


def half_of(layer: int, encoder_layers: int) -> Half:
    """Which stack a layer is in, counted from 0 through both."""
    if not encoder_layers:
        return "only"
    return "encoder" if layer < encoder_layers else "decoder"
