"""Runs something over examples, a few at once: as many as a number of tokens allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from qft.data.examples import Example
from qft.step import is_out_of_memory

TOKENS = 2048  # at once, padding included
Made = TypeVar("Made")


def few_at_once(
    examples: Sequence[Example],
    run: Callable[[Sequence[Example]], Made],
    progress: Callable[[int], object] = lambda count: None,
) -> list[Made]:
    """What ``run`` made of each batch; where memory runs out, batches are halved from then on.

    Args:
        examples: best of falling length.
        progress: called with the number of examples just done.
    """
    made: list[Made] = []
    start, tokens = 0, TOKENS
    while start < len(examples):
        part = examples[start : start + max(1, tokens // _length(examples[start]))]
        found = _attempt(run, part)
        if found is None:  # outside the handler, whose traceback holds the activations
            tokens = _length(part[0]) * (len(part) // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        made.append(found[0])
        start += len(part)
        progress(len(part))
    return made


def _attempt(
    run: Callable[[Sequence[Example]], Made], part: Sequence[Example]
) -> tuple[Made] | None:
    """None where memory ran out and fewer examples at once may help."""
    try:
        return (run(part),)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or len(part) == 1:
            raise
        return None


def _length(example: Example) -> int:
    return len(example.inputs["input_ids"])
