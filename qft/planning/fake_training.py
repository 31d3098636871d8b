"""Training's own step on fake tensors: every shape and type, no values, no memory.

The examples are real ones; batches are made of them as ever, and turn fake where the model begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qft.bench.fake_model import DEVICE, Rows, fill_with_fakes, fused_attention
from qft.data.tasks import Example, pad_id
from qft.distillation.lessons import Source
from qft.distillation.supply import paired_examples, settings_in, teacher_layers
from qft.lean.engine import Savers
from qft.lean.meter import Meter, Reading
from qft.lean.noise import install_noise
from qft.lean.timeline import Stretch, reading_of
from qft.planning.fake_lessons import FakeLessons, FakeLive, open_teacher_skeleton
from qft.planning.fake_loss import planned_loss
from qft.planning.fake_optimizer import fake_optimizer
from qft.planning.job import PlannedJob
from qft.planning.known_values import KnownValues
from qft.planning.skeletons import open_held_skeleton
from qft.preparation import inner_model, prepare, prepared
from qft.step import Layout, accumulate_gradients


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
        self.teacher: nn.Module | None = None
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._rows = Rows()
        self._counting: Meter | None = None
        whole = model if model is not None else prepared_skeleton(job)
        self._own_forward = whole.__dict__.get("forward")
        self.model = self._faked(whole)
        self.optimizer = fake_optimizer(self.model, job.recipe.train, job.device)
        self._loss = planned_loss(job.recipe, job.inputs, self.model, self._source())
        self._done = 0

    def close(self) -> None:
        """The model's forward is its own again, and others may make it fake anew."""
        if self._own_forward is None:
            del self.model.__dict__["forward"]
        else:
            self.model.__dict__["forward"] = self._own_forward

    @property
    def teacher_bytes(self) -> int:
        """Of a teacher's weights that are in memory beside the model; the reading has them too."""
        held = [] if self.teacher is None else [*self.teacher.parameters(), *self.teacher.buffers()]
        return sum({id(tensor): tensor.nbytes for tensor in held}.values())

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
        """A step that is not metered, once: optimizer states are there after it."""
        if not self._done:
            with fused_attention(self.job.device == "cuda", self._rows):
                self._step(examples, micro_batch)

    def stretches(self, examples: Sequence[Example], micro_batch: int) -> list[Stretch]:
        """One step, cut where `mark` was called; see `qft.lean.timeline`."""
        held = self.model if self.teacher is None else nn.ModuleList([self.model, self.teacher])
        fused = fused_attention(self.job.device == "cuda", self._rows)
        with fused, Meter(held, self.optimizer, self.device) as counting:
            self._counting = counting
            try:
                counting.hold(self._strategy_state())
                self._step(examples, micro_batch)
            finally:
                self._counting = None
        return counting.stretches()

    def mark(self, label: Hashable, *, later: bool = False) -> None:
        """A stretch of the step begins here, should it be metered; see `Meter.mark`."""
        if self._counting is not None:
            self._counting.mark(label, later=later)

    def _step(self, examples: Sequence[Example], micro_batch: int) -> None:
        train, strategy = self.job.recipe.train, self.job.recipe.strategy
        self._done += 1
        layout = Layout(
            pack_to=train.max_length if train.packing else None,
            grouped=train.group_by_length,
            flat=self.job.flat,
        )
        with KnownValues(self._mode, self.device):
            accumulate_gradients(
                self.model,
                examples,
                self.job.inputs.task,
                step=self._done,
                micro_batch=micro_batch,
                pad_token_id=pad_id(self.job.inputs.tokenizer),
                strategy=strategy,
                backward=self._backward,
                loss=self._loss,
                layout=layout,
            )
        with self._mode:
            trained = [p for p in self.model.parameters() if p.grad is not None]
            # as the Trainer, which asks for the norm also where it clips nothing
            nn.utils.clip_grad_norm_(trained, train.max_grad_norm or float("inf"))
            self.optimizer.step()
            with contextlib.suppress(*_ABOUT_VALUES):
                strategy.after_step(self.model, self._done)
        self.optimizer.zero_grad(set_to_none=True)

    def _strategy_state(self) -> list[Tensor]:
        """What the strategy keeps from step to step."""
        with contextlib.suppress(*_ABOUT_VALUES):
            return list(self.job.recipe.strategy.state(self.model)[0].values())
        return []

    def _backward(self, loss: Tensor) -> None:
        with self._mode:
            loss.backward()

    def _faked(self, model: nn.Module) -> nn.Module:
        """The model on fake tensors, which makes its batches fake."""
        with self._mode:
            fill_with_fakes(model, self.device)
        plain = model.forward
        model.__dict__["forward"] = _FakeForward(plain, self._mode, self.device, self._rows)
        return model

    def _source(self) -> Source | None:
        """Of a teacher's lessons; a live teacher is made here."""
        recipe, inputs = self.job.recipe, self.job.inputs
        settings = settings_in(recipe)
        if settings is None or not settings.has_lessons:
            return None
        pairs = teacher_layers(recipe, settings, inputs)
        if settings.caches:
            return FakeLessons(self._mode, recipe, settings, inputs, self.model, pairs)
        teacher = open_teacher_skeleton(recipe, settings, inputs)
        self.teacher = self._faked(teacher.model)
        paired = None
        if settings.loss == "uld":
            paired = paired_examples(recipe, inputs, teacher.tokenizer)
        pad = pad_id(inputs.tokenizer if paired is None else teacher.tokenizer)
        return FakeLive(teacher, inputs.task, pad, settings, list(pairs.values()), paired)


# what reading a fake tensor's numbers raises
_ABOUT_VALUES = (torch._subclasses.fake_tensor.DataDependentOutputException,
                 torch._subclasses.fake_tensor.DynamicOutputShapeException)  # fmt: skip


@dataclass(frozen=True)
class _FakeForward:
    """A model's ``forward`` for real batches: it notes how the rows are, and runs on fake ones."""

    plain: Any
    mode: FakeTensorMode
    device: str
    rows: Rows

    def __call__(self, **batch: Any) -> Any:
        given = batch.get("attention_mask")
        padded = isinstance(given, Tensor) and not bool(given.all())
        packed = given is None and batch.get("position_ids") is not None
        with self._told(padded, packed), self.mode:
            return self.plain(**{name: self._faked(value) for name, value in batch.items()})

    @contextlib.contextmanager
    def _told(self, padded: bool, packed: bool) -> Iterator[None]:
        self.rows.padded, self.rows.packed = padded, packed
        yield

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


def prepared_skeleton(job: PlannedJob) -> nn.Module:
    """A job's model on the meta device, its strategy attached and the engine installed."""
    recipe, ready = job.recipe, job.ready
    savers = Savers(**recipe.memory.savers.model_dump())
    on_cpu = job.device == "cpu"
    if on_cpu:  # the host is where they are
        savers = replace(savers, host_embeddings=False)
    model = prepare(
        open_held_skeleton(
            job.inputs.base, ready.spec, ready.needs.full_precision, shared_room=not on_cpu
        ),
        recipe.strategy,
        checkpointing=recipe.memory.checkpointing,
        offload=recipe.memory.offload,
        savers=savers,
        context=replace(ready.context, original_weight=None),
    )
    if recipe.train.embedding_noise:
        state = prepared(model)
        assert state is not None
        table = inner_model(model).get_input_embeddings()
        install_noise(table, state.clock, recipe.train.embedding_noise)
    return model
