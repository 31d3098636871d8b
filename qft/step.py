"""The one training step: examples → micro-batches → forward → loss → backward.

Training, planning, benchmarks and tests all call `accumulate_gradients`; the optimizer's own
`step()` is left to whoever owns the optimizer. The step receives the examples of one whole
optimizer step, uncollated, and splits them itself, so that running out of memory is mended here:
the micro-batch is halved and the same samples are replayed, and the update is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qft.data.packing import Row, collate_packed, one_row, pack
from qft.data.seq2seq import target_lengths
from qft.data.tasks import Example, Task
from qft.errors import WillNotFitError, first_line
from qft.lean.dropout import DropoutClock
from qft.lean.model_parts import is_encoder_decoder, uses_flash_attention
from qft.preparation import prepared
from qft.strategy import Strategy
from qft.task_loss import TaskLoss


@dataclass(frozen=True)
class Layout:
    """How a step's examples are put into rows; the update is the same in all.

    Attributes:
        pack_to: tokens a row holds at most, several examples in it; None is one example a row.
        grouped: examples of like length come into the same micro-batch, for little padding.
    """

    pack_to: int | None = None
    grouped: bool = False

    def rows(self, examples: Sequence[Example]) -> list[Row]:
        """The rows in the order they are computed."""
        if self.pack_to is not None:
            return list(pack(examples, self.pack_to))
        if self.grouped:
            examples = sorted(examples, key=lambda e: -len(e.inputs["input_ids"]))
        return [[example] for example in examples]


LOOSE, PLAIN = Layout(), TaskLoss()


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step's forward and backward passes did.

    Attributes:
        loss: mean over all supervised items (scalar, detached, float32).
        items: supervised tokens, or rows for classification.
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
    total_items: float | None = None,
    loss: TaskLoss = PLAIN,
    layout: Layout = LOOSE,
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
        total_items: items over all processes, divided by their number; None on a single one.
        loss: what is minimised, where it is not the model's own loss alone.
        layout: how the examples are put into rows.

    Raises:
        WillNotFitError: not even one example fits.
    """
    micro_batch = max(1, min(micro_batch, len(examples)))
    replays = 0
    random = _random_state(model)
    while True:
        try:
            return _attempt(model, examples, task, step, micro_batch, pad_token_id, strategy,
                            backward, total_items, replays, loss, layout)  # fmt: skip
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if micro_batch == 1:
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
    total_items: float | None,
    replays: int,
    loss: TaskLoss,
    layout: Layout,
) -> StepResult:
    state = prepared(model)
    device = next(model.parameters()).device
    rows = layout.rows(examples)
    parts = [rows[i : i + micro_batch] for i in range(0, len(rows), micro_batch)]
    if layout.pack_to is not None and uses_flash_attention(model):
        parts = [one_row(part) for part in parts]
    batches = [_collate(part, task, pad_token_id, layout) for part in parts]
    items = [loss.items(task, batch) for batch in batches]
    # with a cache, transformers takes positions that begin anew for a continued text
    extra = {"use_cache": False} if layout.pack_to is not None else {}
    shifted = task.predicts == "tokens" and not is_encoder_decoder(model)
    denominator = float(sum(items)) if total_items is None else total_items
    loss_sum = torch.zeros((), dtype=torch.float32, device=device)
    try:
        for part, batch, count in zip(parts, batches, items, strict=True):
            if count == 0:  # its mean would be 0 / 0
                continue
            if state is not None:
                _announce(state.clock, step, part, batch, layout)
            inputs = {name: value.to(device) for name, value in batch.items()}
            mean = loss.of(model(**inputs, **extra), inputs, shifted=shifted)
            backward(mean * (count / denominator))
            loss_sum += mean.detach().float() * (count / max(sum(items), 1e-9))
            del mean
        if strategy is not None and (penalty := strategy.penalty(model)) is not None:
            backward(penalty)
            loss_sum += penalty.detach().float()
    finally:
        if state is not None:
            state.clock.clear()
    tokens = sum(len(example.inputs["input_ids"]) for example in examples)
    counted = sum(task.label_count(batch) for batch in batches)
    return StepResult(loss_sum, counted, tokens, micro_batch, replays)


def _collate(
    rows: Sequence[Row], task: Task, pad_token_id: int, layout: Layout
) -> dict[str, Tensor]:
    if layout.pack_to is not None:
        return collate_packed(rows, pad_token_id)
    return task.collate([example for row in rows for example in row], pad_token_id)


def _announce(
    clock: DropoutClock,
    step: int,
    rows: Sequence[Row],
    batch: Mapping[str, Tensor],
    layout: Layout,
) -> None:
    """Tells the dropout which samples the forward pass holds."""
    width = int(batch["input_ids"].shape[1])
    sizes = [[(e.index, len(e.inputs["input_ids"])) for e in row] for row in rows]
    samples, lengths = zip(*(pair for row in sizes for pair in row), strict=True)
    packed = sizes if layout.pack_to is not None else ()
    clock.set(step, samples, lengths, *target_lengths(batch), width=width, packed=packed)


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
    cuda = next(model.parameters()).is_cuda
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if cuda else [])]


def _restore_random_state(model: nn.Module, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])
