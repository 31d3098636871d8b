"""The one training step: examples → micro-batches → forward → loss → backward.

Training, planning, benchmarks and tests all call `accumulate_gradients`; the optimizer's own
`step()` is left to whoever owns the optimizer. The step receives the examples of one whole
optimizer step, uncollated, and splits them itself, so that running out of memory is mended here:
the micro-batch is halved and the same samples are replayed, and the update is the same.

With several processes (DDP, FSDP2) each is given the same whole step and takes its share. What
they compute together is what one would have computed alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn

from qft.data.packing import Row, borders_of, collate_packed, one_row, pack
from qft.data.seq2seq import target_lengths
from qft.data.tasks import Example, Task
from qft.errors import WillNotFitError, first_line
from qft.lean.dropout import DropoutClock
from qft.lean.model_parts import device_of, is_encoder_decoder, uses_flash_attention
from qft.preparation import prepared
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


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step's forward and backward passes did.

    Attributes:
        loss: mean over all supervised items of all processes (scalar, detached, float32).
        items: supervised tokens, or rows for classification, of all processes, like ``tokens``.
        tokens: tokens that are not padding.
        micro_batch: the micro-batch that fitted.
        replays: how often the step began again for lack of memory.
    """

    loss: Tensor
    items: int
    tokens: int
    micro_batch: int
    replays: int


def accumulate_gradients(
    model: nn.Module,
    examples: Sequence[Example],
    task: Task,
    *,
    step: int,
    micro_batch: int,
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
        model: prepared or plain, wrapped by DDP or not; its gradients must be empty.
        examples: of the whole step, uncollated.
        step: number of the optimizer step; seeds the dropout masks.
        micro_batch: examples a forward pass, to begin with.
        strategy: adds its penalty, if it has one.
        backward: ``accelerator.backward`` in a Trainer.
        loss: what is minimised, where it is not the model's own loss alone.
        layout: how the examples are put into rows.
        share: which part of the examples is this process's.

    Raises:
        WillNotFitError: not even one example fits; with several processes nothing is replayed,
            since the others would wait.
    """
    micro_batch = max(1, min(micro_batch, len(examples)))
    replays = 0
    random = _random_state(model)
    while True:
        try:
            return _attempt(model, examples, task, step, micro_batch, pad_token_id, strategy,
                            backward, replays, loss, layout, share)  # fmt: skip
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if micro_batch == 1 or share.processes > 1:
                raise _does_not_fit(examples, error) from error
        # outside the handler: the traceback holds the activations that did not fit
        micro_batch = (micro_batch + 1) // 2
        replays += 1
        model.zero_grad(set_to_none=True)
        _restore_random_state(model, random)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _attempt(
    model: nn.Module,
    examples: Sequence[Example],
    task: Task,
    step: int,
    micro_batch: int,
    pad_token_id: int,
    strategy: Strategy | None,
    backward: Callable[[Tensor], None],
    replays: int,
    loss: StepLoss,
    layout: Layout,
    share: Share,
) -> StepResult:
    state = prepared(model)
    device = device_of(model)
    rows = layout.rows(examples)
    one = layout.flat or (layout.pack_to is not None and uses_flash_attention(model))

    def make(chosen: Sequence[Row]) -> _Part:
        chosen = one_row(chosen) if one else chosen
        batch = _collate(chosen, task, pad_token_id, layout)
        return _Part(chosen, batch, loss.items(task, batch), task.label_count(batch))

    parts, total, labels = _parts(rows, micro_batch, share, make)
    # with a cache, transformers takes positions that begin anew for a continued text
    extra: dict[str, Any] = {"use_cache": False} if layout.shares_rows else {}
    chunked = state is not None and state.engine.loss is not None
    shifted = task.predicts == "tokens" and not is_encoder_decoder(model)
    loss_sum = torch.zeros((), dtype=torch.float32, device=device)
    try:
        for number, part in enumerate(parts):
            if state is not None:
                announce(state.clock, step, part.rows, part.batch, layout)
            inputs = {name: value.to(device) for name, value in part.batch.items()}
            with _unsynchronised(model, share, number < len(parts) - 1):
                told = loss.arguments(part.rows, chunked=chunked)
                output = model(**inputs, **extra, **told)
                del told
                mean = loss.of(output, inputs, shifted=shifted)
                del output  # the logits, where there are any
                weight = part.items * part.counts / total
                # gradients are averaged over the processes, and are to be summed
                backward(mean * (weight * share.processes))
            loss_sum += mean.detach().float() * weight
            del mean
        if share.processes > 1:
            distributed.all_reduce(loss_sum)
        if strategy is not None and (penalty := strategy.penalty(model)) is not None:
            backward(penalty)  # the same in every process
            loss_sum += penalty.detach().float()
    finally:
        if state is not None:
            state.clock.clear()
    tokens = sum(len(example.inputs["input_ids"]) for example in examples)
    return StepResult(loss_sum, labels, tokens, micro_batch, replays)


@dataclass(frozen=True)
class _Part:
    """The rows of one forward pass.

    Attributes:
        items: what its mean loss is a mean over.
        labels: how many there are.
        counts: 0 where the rows are another process's, and are run only because all processes
            must run as often.
    """

    rows: Sequence[Row]
    batch: dict[str, Tensor]
    items: float
    labels: int
    counts: int = 1


def _parts(
    rows: Sequence[Row],
    micro_batch: int,
    share: Share,
    make: Callable[[Sequence[Row]], _Part],
) -> tuple[list[_Part], float, int]:
    """This process's micro-batches; the items and the labels of all processes together.

    One without a label is left out: its mean would be 0 / 0. Every process gets as many.
    """
    own = rows[share.rank :: share.processes]
    parts = [make(own[at : at + micro_batch]) for at in range(0, len(own), micro_batch)]
    parts = [part for part in parts if part.items]
    if share.processes == 1:
        return parts, sum(part.items for part in parts), sum(part.labels for part in parts)
    single = [part for part in (make([row]) for row in rows) if part.items]
    if single:
        most = math.ceil(math.ceil(len(rows) / share.processes) / micro_batch)
        parts += [replace(single[0], counts=0)] * (most - len(parts))
    return parts, sum(part.items for part in single), sum(part.labels for part in single)


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text


def _does_not_fit(examples: Sequence[Example], error: BaseException) -> WillNotFitError:
    longest = max(len(e.inputs["input_ids"]) for e in examples)
    return WillNotFitError(
        "Not even one example a forward pass fits into the memory.",
        found=f"the longest of this step has {longest} tokens; {first_line(error)}",
        fix="memory.checkpointing: full, quantize: nf4, a smaller train.max_length, or a smaller "
        "model",
    )


def _random_state(model: nn.Module) -> list[Tensor]:
    cuda = device_of(model).type == "cuda"
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if cuda else [])]


def _restore_random_state(model: nn.Module, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])
