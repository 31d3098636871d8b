"""The one training step: examples → micro-batches → forward → loss → backward.

Training, planning, benchmarks and tests all call `accumulate_gradients`; the optimizer's own
`step()` is left to whoever owns the optimizer. The step receives the examples of one whole
optimizer step, uncollated, and splits them itself, so that running out of memory is mended here:
fewer go at once from then on (`qft.micro_batch`), the same samples are replayed, and the update is
the same: bit for bit the same dropout, sums in another order.

With several processes (DDP, FSDP2) each is given the same whole step and takes its share. What
they compute together is what one would have computed alone.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn

from qft.data.packing import Row, borders_of, collate_packed, one_row, pack
from qft.data.seq2seq import target_lengths
from qft.data.tasks import Example, Task
from qft.enforcement import within_budget
from qft.errors import WillNotFitError
from qft.lean.dropout import DropoutClock
from qft.lean.model_parts import device_of, is_encoder_decoder, uses_flash_attention
from qft.micro_batch import MicroBatch
from qft.out_of_memory import Shortage, tried
from qft.preparation import prepared
from qft.random_state import RandomState
from qft.strategy import Strategy
from qft.task_loss import TaskLoss


@dataclass(frozen=True)
class Layout:
    """How a step's examples are put into rows; the update is the same in all.

    Attributes:
        pack_to: tokens a row holds at most, several examples in it; None is one example a row.
        grouped: examples of like length come into the same micro-batch, for little padding.
        flat: a micro-batch is one long row, and the engine's attention is told the borders; for
            models that keep examples apart so (`qft.packing_check.keeps_apart`).
    """

    pack_to: int | None = None
    grouped: bool = False
    flat: bool = False

    @property
    def shares_rows(self) -> bool:
        """Whether several examples lie in one row."""
        return self.flat or self.pack_to is not None

    def rows(self, examples: Sequence[Example]) -> list[Row]:
        """The rows in the order they are computed."""
        if self.pack_to is not None:
            return list(pack(examples, self.pack_to))
        if self.grouped:
            examples = sorted(examples, key=lambda e: -len(e.inputs["input_ids"]))
        return [[example] for example in examples]


@dataclass(frozen=True)
class Share:
    """Which of several processes this is, each of which computes a part of every step."""

    rank: int = 0
    processes: int = 1

    @classmethod
    def of_this_process(cls) -> Share:
        """As torch.distributed has it; the only one where it was not started."""
        if not distributed.is_available() or not distributed.is_initialized():
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())


class StepLoss(Protocol):
    """What a step minimises: the task's own loss, or one that a teacher has a say in."""

    def examples(
        self, model: nn.Module, examples: Sequence[Example], step: int
    ) -> Sequence[Example]:
        """What a step trains on, asked once before it; see `qft.task_loss.TaskLoss`."""

    def items(self, task: Task, batch: Mapping[str, Tensor]) -> float:
        """See `qft.task_loss.TaskLoss`."""

    def arguments(self, rows: Sequence[Row], *, chunked: bool) -> dict[str, Any]:
        """See `qft.task_loss.TaskLoss`."""

    def of(self, output: Any, batch: Mapping[str, Tensor], *, shifted: bool) -> Tensor:
        """See `qft.task_loss.TaskLoss`."""


LOOSE, PLAIN, ALONE = Layout(), TaskLoss(), Share()
SMALLER = (
    "memory.checkpointing: full, quantize: nf4, a smaller train.max_length, or a smaller model"
)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step's forward and backward passes did.

    Attributes:
        loss: mean over all supervised items of all processes (scalar, detached, float32).
        items: supervised tokens, or rows for classification, of all processes, like ``tokens``.
        tokens: tokens that are not padding.
        micro_batch: the most rows a forward pass had.
        replays: how often the step began again for lack of memory.
    """

    loss: Tensor
    items: int
    tokens: int
    micro_batch: int
    replays: int = 0


def accumulate_gradients(
    model: nn.Module,
    examples: Sequence[Example],
    task: Task,
    *,
    step: int,
    micro_batch: int | MicroBatch,
    pad_token_id: int,
    strategy: Strategy | None = None,
    backward: Callable[[Tensor], None] = Tensor.backward,
    loss: StepLoss = PLAIN,
    layout: Layout = LOOSE,
    share: Share = ALONE,
) -> StepResult:
    """Adds the gradients of one optimizer step to ``model``'s parameters.

    The loss is the mean over every supervised item of the step, however the examples are split:
    a micro-batch's mean counts in proportion to the items it holds.

    Args:
        model: prepared or plain, wrapped by DDP or not; its gradients must be empty (or zero).
        examples: of the whole step, uncollated.
        step: number of the optimizer step; seeds the dropout masks.
        micro_batch: examples a forward pass, to begin with; a `MicroBatch` remembers what did not
            fit from one step to the next.
        strategy: adds its penalty, if it has one.
        backward: ``accelerator.backward`` in a Trainer.
        loss: what is minimised, where it is not the model's own loss alone.
        layout: how the examples are put into rows.
        share: which part of the examples is this process's.

    Raises:
        WillNotFitError: not even one example fits; gradients are empty and the random state is as
            before the step. With several processes nothing is replayed, since the others would
            wait.
    """
    if not isinstance(micro_batch, MicroBatch):
        micro_batch = MicroBatch(micro_batch, padded=not layout.flat)
    passes = _Passes(model, examples, task, step, pad_token_id, strategy, backward, loss, layout,
                     share)  # fmt: skip
    random, replays = RandomState.now(), 0
    while True:
        made = tried(functools.partial(passes.run, micro_batch))
        if isinstance(made, StepResult):
            micro_batch.went_well()
            return replace(made, replays=replays)
        model.zero_grad(set_to_none=True)
        random.restore()
        if share.processes > 1 or not micro_batch.make_room(passes.at_hand, made):
            raise _does_not_fit(examples, made)
        replays += 1


@dataclass
class _Passes:
    """The forward and backward passes of one step; see `accumulate_gradients`.

    Attributes:
        at_hand: the widths of the rows that are being computed.
    """

    model: nn.Module
    examples: Sequence[Example]
    task: Task
    step: int
    pad_token_id: int
    strategy: Strategy | None
    backward: Callable[[Tensor], None]
    loss: StepLoss
    layout: Layout
    share: Share
    at_hand: Sequence[int] = ()

    def run(self, micro_batch: MicroBatch) -> StepResult:
        """All of them, or the error of the one that did not fit."""
        state, device = prepared(self.model), device_of(self.model)
        parts, total, labels = self._parts(micro_batch)
        loss_sum = torch.zeros((), dtype=torch.float32, device=device)
        try:
            for number, part in enumerate(parts):
                self.at_hand = part.widths
                if state is not None:
                    announce(state.clock, self.step, part.rows, part.batch, self.layout)
                more_to_come = number < len(parts) - 1
                with part.within_budget(), _unsynchronised(self.model, self.share, more_to_come):
                    loss_sum += self._pass(part, part.items * part.counts / total)
            if self.share.processes > 1:
                distributed.all_reduce(loss_sum)
            penalty = self.strategy.penalty(self.model) if self.strategy is not None else None
            if penalty is not None:
                self.backward(penalty)  # the same in every process
                loss_sum += penalty.detach().float()
        finally:
            if state is not None:
                state.clock.clear()
        tokens = sum(len(example.inputs["input_ids"]) for example in self.examples)
        most = max((len(part.widths) for part in parts), default=0)
        return StepResult(loss_sum, labels, tokens, most)

    def _pass(self, part: _Part, weight: float) -> Tensor:
        """Forward and backward of one micro-batch, which counts ``weight`` of the step."""
        state, device = prepared(self.model), device_of(self.model)
        chunked = state is not None and state.engine.loss is not None
        shifted = self.task.predicts == "tokens" and not is_encoder_decoder(self.model)
        # with a cache, transformers takes positions that begin anew for a continued text
        extra: dict[str, Any] = {"use_cache": False} if self.layout.shares_rows else {}
        inputs = {name: value.to(device) for name, value in part.batch.items()}
        told = self.loss.arguments(part.rows, chunked=chunked)
        output = self.model(**inputs, **extra, **told)
        del told
        mean = self.loss.of(output, inputs, shifted=shifted)
        del output  # the logits, where there are any
        # gradients are averaged over the processes, and are to be summed
        self.backward(mean * (weight * self.share.processes))
        return mean.detach().float() * weight

    def _parts(self, micro_batch: MicroBatch) -> tuple[list[_Part], float, int]:
        """This process's micro-batches; the items and the labels of all processes together.

        One without a label is left out: its mean would be 0 / 0. Every process gets as many.
        """
        rows = self.layout.rows(self.examples)
        own = rows[self.share.rank :: self.share.processes]
        self.at_hand = [width_of(row) for row in own]
        split = micro_batch.split(self.at_hand)
        parts = [self._part(own[part.start : part.stop]) for part in split]
        parts = [part for part in parts if part.items]
        if self.share.processes == 1:
            return parts, sum(part.items for part in parts), sum(part.labels for part in parts)
        single = [part for part in (self._part([row]) for row in rows) if part.items]
        if single:
            most = math.ceil(math.ceil(len(rows) / self.share.processes) / micro_batch.examples)
            parts += [replace(single[0], counts=0)] * (most - len(parts))
        return parts, sum(part.items for part in single), sum(part.labels for part in single)

    def _part(self, rows: Sequence[Row]) -> _Part:
        flash = self.layout.pack_to is not None and uses_flash_attention(self.model)
        widths = [width_of(row) for row in rows]
        rows = one_row(rows) if self.layout.flat or flash else rows
        batch = _collate(rows, self.task, self.pad_token_id, self.layout)
        items = self.loss.items(self.task, batch)
        return _Part(rows, widths, batch, items, self.task.label_count(batch))


def width_of(row: Row) -> int:
    """Tokens of a row; of two halves the longer one."""
    return sum(max(len(e.inputs["input_ids"]), target_width(e)) for e in row)


def target_width(example: Example) -> int:
    """Tokens of an example's answer, where it has one of its own."""
    labels = example.inputs.get("labels")
    return len(labels) if isinstance(labels, list) else 0


@dataclass(frozen=True)
class _Part:
    """The rows of one forward pass.

    Attributes:
        widths: of the rows, before some of them were joined.
        items: what its mean loss is a mean over.
        labels: how many there are.
        counts: 0 where the rows are another process's, and are run only because all processes
            must run as often.
    """

    rows: Sequence[Row]
    widths: Sequence[int]
    batch: dict[str, Tensor]
    items: float
    labels: int
    counts: int = 1

    def within_budget(self) -> contextlib.AbstractContextManager[None]:
        """See `qft.enforcement.within_budget`."""
        tokens = max(t.numel() for t in self.batch.values() if t.dim() == 2)
        return within_budget("train", sum(map(len, self.rows)), tokens, self.labels)


@contextlib.contextmanager
def _unsynchronised(model: Any, share: Share, more_to_come: bool) -> Iterator[None]:
    """Gradients are exchanged once a step: with the last micro-batch."""
    if share.processes == 1 or not more_to_come:
        yield
    elif hasattr(model, "no_sync"):  # DDP
        with model.no_sync():
            yield
    elif hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


def _collate(
    rows: Sequence[Row], task: Task, pad_token_id: int, layout: Layout
) -> dict[str, Tensor]:
    if layout.flat:
        return {**collate_packed(rows, pad_token_id), **borders_of(rows[0])}
    if layout.pack_to is not None:
        return collate_packed(rows, pad_token_id)
    return task.collate([example for row in rows for example in row], pad_token_id)


def announce(
    clock: DropoutClock,
    step: int,
    rows: Sequence[Row],
    batch: Mapping[str, Tensor],
    layout: Layout,
) -> None:
    """Tells dropout and cached features which samples the forward pass holds."""
    width = int(batch["input_ids"].shape[1])
    sizes = [[(e.index, len(e.inputs["input_ids"])) for e in row] for row in rows]
    samples, lengths = zip(*(pair for row in sizes for pair in row), strict=True)
    packed = sizes if layout.shares_rows else ()
    clock.set(step, samples, lengths, *target_lengths(batch), width=width, packed=packed)


@contextlib.contextmanager
def announced(
    model: nn.Module, examples: Sequence[Example], batch: Mapping[str, Tensor], step: int = 0
) -> Iterator[None]:
    """Within it, a prepared model knows that the batch holds these samples, one a row."""
    state = prepared(model)
    if state is None:
        yield
        return
    announce(state.clock, step, [[example] for example in examples], batch, LOOSE)
    try:
        yield
    finally:
        state.clock.clear()


def _does_not_fit(examples: Sequence[Example], shortage: Shortage) -> WillNotFitError:
    longest = max(len(e.inputs["input_ids"]) for e in examples)
    numbers = f"; held: {shortage.numbers}" if shortage.numbers else ""
    return WillNotFitError(
        "Not even one example a forward pass fits into the memory.",
        found=f"the longest of this step has {longest} tokens; {shortage.message}{numbers}",
        fix=SMALLER,
    )
