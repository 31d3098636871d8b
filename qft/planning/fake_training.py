"""Training's own step on fake tensors: every shape and type, no values, no memory.

The examples are real ones; batches are made of them as ever, and turn fake where the model begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qft import models
from qft.bench.fake_model import DEVICE, fill_with_fakes, fused_attention
from qft.data.encoding import UNSUPERVISED
from qft.data.packing import Row
from qft.data.tasks import Example, Task, pad_id
from qft.lean.engine import Savers
from qft.lean.meter import Meter, Reading
from qft.lean.standins import quantize_skeleton
from qft.lean.timeline import Stretch, reading_of
from qft.planning.job import PlannedJob
from qft.preparation import prepare, prepared
from qft.step import Layout, StepLoss, accumulate_gradients
from qft.task_loss import TaskLoss


class FakeTraining:
    """A job's model on fake tensors, ready to run training steps.

    Args:
        job: its recipe decides the model, the strategy, the savers and the optimizer.
        model: what `prepared_skeleton` made of it, if it is made already.

    Attributes:
        job: whose rows and settings of a step the next step has; it may be exchanged for one whose
            model is the same.
    """

    def __init__(self, job: PlannedJob, model: nn.Module | None = None) -> None:
        self.job = job
        self.device = "cpu" if job.device == "cpu" else DEVICE
        self.model = model if model is not None else prepared_skeleton(job)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            fill_with_fakes(self.model, self.device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, foreach=False)
        self._counting: Meter | None = None
        self._forward = self.model.forward
        self._own_forward = self.model.__dict__.get("forward")
        self.model.__dict__["forward"] = self._fake_forward

    def close(self) -> None:
        """The model's forward is its own again, and others may make it fake anew."""
        if self._own_forward is None:
            del self.model.__dict__["forward"]
        else:
            self.model.__dict__["forward"] = self._own_forward

    def meter(
        self, examples: Sequence[Example] | None = None, micro_batch: int | None = None
    ) -> Reading:
        """The second training step on these examples; see `qft.lean.meter`.

        Args:
            examples: of one optimizer step; None is the micro-batch that needs most.
            micro_batch: examples a forward pass; None is the job's.
        """
        chosen = self.job.longest() if examples is None else examples
        count = micro_batch or self.job.micro_batch
        self.warm_up(chosen, count)
        return reading_of(self.stretches(chosen, count))

    def warm_up(self, examples: Sequence[Example], micro_batch: int) -> None:
        """A step that is not metered: optimizer states are there after it."""
        with self._attention():
            self._step(examples, micro_batch)

    def stretches(self, examples: Sequence[Example], micro_batch: int) -> list[Stretch]:
        """One step, cut where `mark` was called; see `qft.lean.timeline`."""
        with self._attention(), Meter(self.model, self.optimizer, self.device) as counting:
            self._counting = counting
            try:
                self._step(examples, micro_batch)
            finally:
                self._counting = None
        return counting.stretches()

    def mark(self, label: Hashable, *, later: bool = False) -> None:
        """A stretch of the step begins here, should it be metered; see `Meter.mark`."""
        if self._counting is not None:
            self._counting.mark(label, later=later)

    def _step(self, examples: Sequence[Example], micro_batch: int) -> None:
        train = self.job.recipe.train
        accumulate_gradients(
            self.model,
            examples,
            self.job.inputs.task,
            step=1,
            micro_batch=micro_batch,
            pad_token_id=pad_id(self.job.inputs.tokenizer),
            strategy=self.job.recipe.strategy,
            backward=self._backward,
            loss=_CountedLabels(self.model, TaskLoss(train.label_smoothing)),
            layout=Layout(
                pack_to=train.max_length if train.packing else None,
                grouped=train.group_by_length,
                flat=self.job.flat,
            ),
        )
        with self._mode:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _fake_forward(self, **batch: Any) -> Any:
        with self._mode:
            return self._forward(**{name: self._faked(v) for name, v in batch.items()})

    def _backward(self, loss: Tensor) -> None:
        with self._mode:
            loss.backward()

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        if self.device == "cpu":
            return contextlib.nullcontext()
        return fused_attention(on_cuda=True)

    def _faked(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dtype == torch.int32 and value.dim() == 1:  # borders, which are looked at
            return _Borders(value.tolist())
        return torch.empty(value.shape, dtype=value.dtype, device=self.device)


class _Borders:
    """Borders of examples in a long row, which attention asks for as a list."""

    def __init__(self, values: list[int]) -> None:
        self._values = values

    def tolist(self) -> list[int]:
        """As a tensor's."""
        return self._values


class _CountedLabels:
    """A step's loss that tells the engine how many labels a fake batch has."""

    def __init__(self, model: nn.Module, loss: StepLoss) -> None:
        state = prepared(model)
        assert state is not None
        self._engine, self._loss = state.engine, loss

    def examples(
        self, model: nn.Module, examples: Sequence[Example], step: int
    ) -> Sequence[Example]:
        """See `qft.step.StepLoss`."""
        return self._loss.examples(model, examples, step)

    def items(self, task: Task, batch: Mapping[str, Tensor]) -> float:
        """See `qft.step.StepLoss`."""
        return self._loss.items(task, batch)

    def arguments(self, rows: Sequence[Row], *, chunked: bool) -> dict[str, Any]:
        """See `qft.step.StepLoss`."""
        if self._engine.loss is not None:
            skipped = 1 if self._engine.loss.shifted else 0
            self._engine.loss.fake_labels = sum(
                label != UNSUPERVISED
                for row in rows
                for example in row
                for label in example.inputs["labels"][skipped:]
            )
        return self._loss.arguments(rows, chunked=chunked)

    def of(self, output: Any, batch: Mapping[str, Tensor], *, shifted: bool) -> Tensor:
        """See `qft.step.StepLoss`."""
        return self._loss.of(output, batch, shifted=shifted)


def prepared_skeleton(job: PlannedJob) -> nn.Module:
    """A job's model on the meta device, its strategy attached and the engine installed."""
    recipe, ready = job.recipe, job.ready
    model = models.open_skeleton(job.inputs.base, ready.spec)
    if ready.held != "none":
        spec = replace(ready.spec, quantize=ready.held)
        kept = models.unquantized_in(job.inputs.base, spec, ready.needs.full_precision)
        quantize_skeleton(model, ready.held, tuple(kept))
    return prepare(
        model,
        recipe.strategy,
        checkpointing=recipe.memory.checkpointing,
        offload=recipe.memory.offload,
        savers=Savers(**recipe.memory.savers.model_dump()),
        context=replace(ready.context, original_weight=None),
    )
