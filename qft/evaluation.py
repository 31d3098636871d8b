"""How good a model is on held-out examples, in the measures of its task."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from qft.errors import RecipeError, WillNotFitError
from qft.judging.classes import ClassJudge
from qft.judging.judge import Judge
from qft.judging.spans import SpanJudge
from qft.judging.tags import TagJudge
from qft.judging.tokens import TokenJudge
from qft.lean.model_parts import device_of
from qft.step import announced, is_out_of_memory

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
    micro_batch: int = 8,
    labels: Sequence[str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Metrics of ``model`` on ``examples``; the order of the examples does not matter.

    Out of memory halves the micro-batch and goes on. No random number is drawn.

    Args:
        model: plain or wrapped by PEFT, on any device.
        examples: of ``task``, not empty.
        task: says what a label is.
        pad_token_id: see `qft.data.encoding.pad_id`.
        micro_batch: examples a forward pass.
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
    device = device_of(model)
    start = 0
    with evaluating(model):
        while start < len(ordered):
            part = ordered[start : start + micro_batch]
            try:
                batch = task.collate(part, pad_token_id)
                with announced(model, part, batch):
                    scores = judge.score(model, {k: v.to(device) for k, v in batch.items()}, part)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise _does_not_fit(part[0], error) from error
                scores = None
            if scores is None:  # outside the handler, whose traceback holds the activations
                micro_batch = len(part) // 2
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            judge.add(scores)
            start += len(part)
            if progress is not None:
                progress(len(part))
    return judge.result(ordered)


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


def _does_not_fit(example: Example, error: BaseException) -> WillNotFitError:
    return WillNotFitError(
        "Not even one example fits into the memory for evaluation.",
        found=f"{len(example.inputs['input_ids'])} tokens; {(str(error) or 'out of memory'):.200}",
        fix="a smaller train.max_length, quantize: nf4, or a smaller model",
    )
