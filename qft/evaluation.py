"""How good a model is on held-out examples, in the measures of its task."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qft.enforcement import within_budget
from qft.errors import RecipeError, WillNotFitError
from qft.judging.classes import ClassJudge
from qft.judging.judge import Judge
from qft.judging.spans import SpanJudge
from qft.judging.tags import TagJudge
from qft.judging.tokens import TokenJudge
from qft.lean.model_parts import device_of
from qft.micro_batch import MicroBatch
from qft.out_of_memory import Shortage, tried
from qft.step import announced, width_of

if TYPE_CHECKING:
    from qft.data.examples import Example, Task


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients; each module gets its own former mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    task: Task,
    *,
    pad_token_id: int,
    micro_batch: int | MicroBatch = 8,
    labels: Sequence[str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Metrics of ``model`` on ``examples``; the order of the examples does not matter.

    Where memory runs out, fewer go at once from then on. No random number is drawn.

    Args:
        model: plain or wrapped by PEFT, on any device.
        examples: of ``task``, not empty.
        task: says what a label is.
        pad_token_id: see `qft.data.encoding.pad_id`.
        micro_batch: examples a forward pass; a `MicroBatch` remembers what did not fit.
        labels: the classes, to check against the width of the model's answer.
        progress: called with the number of examples just done.

    Returns:
        `loss`, the mean over every label, and by what a label is: tokens: `perplexity`,
        `bits_per_byte` (of the supervised text), `token_accuracy`; one class: `accuracy`,
        `macro_f1`, `matthews`; several: `accuracy`, `micro_f1`, `macro_f1`; numbers: `rmse`,
        `pearson`, `spearman`; spans: `exact_match`, `f1`; tags: `accuracy`, and
        where they are O and B-TYPE or the like `entity_f1` and its parts.

    Raises:
        ModelError: there are other classes in the data than in the model.
        RecipeError: the task has no measures.
        WillNotFitError: not even one example fits.
    """
    if not examples:
        raise ValueError("no examples to evaluate")
    # Like lengths together, for little padding. The batches depend on the examples alone.
    ordered = sorted(examples, key=lambda e: (-len(e.inputs["input_ids"]), e.index))
    judge = judge_of(task, labels)
    widths = [width_of([example]) for example in ordered]
    at_once = micro_batch if isinstance(micro_batch, MicroBatch) else MicroBatch(micro_batch)
    start = 0
    with evaluating(model):
        while start < len(ordered):
            end = start + at_once.count(widths, start)
            part = ordered[start:end]
            scores = tried(functools.partial(_score, judge, model, part, task, pad_token_id))
            if isinstance(scores, Shortage):
                if not at_once.make_room(widths[start:end], scores):
                    raise _does_not_fit(part[0], scores)
                continue
            judge.add(scores)
            start = end
            if progress is not None:
                progress(len(part))
    at_once.went_well()
    return judge.result(ordered)


def _score(
    judge: Judge, model: nn.Module, part: Sequence[Example], task: Task, pad_token_id: int
) -> Any:
    batch, device = task.collate(part, pad_token_id), device_of(model)
    tokens = max(t.numel() for t in batch.values() if t.dim() == 2)
    labels = task.label_count(batch)
    with within_budget("evaluate", len(part), tokens, labels), announced(model, part, batch):
        return judge.score(model, {k: v.to(device) for k, v in batch.items()}, part)


def judge_of(task: Task, labels: Sequence[str] | None) -> Judge:
    """Who judges the answers to a task, by what it predicts."""
    match task.predicts:
        case "class":
            return ClassJudge(labels)
        case "span":
            return SpanJudge()
        case "tags":
            return TagJudge(labels)
        case "vectors":
            raise RecipeError(
                "An encoder without a head answers with vectors, and nothing judges these.",
                where="task",
                found=task.name,
                fix="train a head (task: classify), or compare two models: qft verify",
            )
        case _:
            return TokenJudge()


def _does_not_fit(example: Example, shortage: Shortage) -> WillNotFitError:
    numbers = f"; held: {shortage.numbers}" if shortage.numbers else ""
    return WillNotFitError(
        "Not even one example fits into the memory for evaluation.",
        found=f"{len(example.inputs['input_ids'])} tokens; {shortage.message}{numbers}",
        fix="a smaller train.max_length, quantize: nf4, or a smaller model",
    )
