"""Runs something over examples, a few at once: as many as a number of tokens allows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from qft.data.examples import Example
from qft.micro_batch import MicroBatch
from qft.out_of_memory import Shortage, tried

TOKENS = 2048  # at once, padding included
Made = TypeVar("Made")


def few_at_once(
    examples: Sequence[Example],
    run: Callable[[Sequence[Example]], Made],
    progress: Callable[[int], object] = lambda count: None,
) -> list[Made]:
    """What ``run`` made of each batch; where memory runs out, fewer go at once from then on.

    Args:
        examples: best of falling length.
        progress: called with the number of examples just done.

    Raises:
        torch.OutOfMemoryError: not even one example fits.
    """
    made: list[Made] = []
    widths = [len(example.inputs["input_ids"]) for example in examples]
    at_once, start = MicroBatch(len(examples), tokens=TOKENS), 0
    while start < len(examples):
        end = start + at_once.count(widths, start)
        found = tried(functools.partial(run, examples[start:end]))
        if isinstance(found, Shortage):
            if not at_once.make_room(widths[start:end], found):
                raise torch.OutOfMemoryError(found.message)
            continue
        made.append(found)
        progress(end - start)
        start = end
    return made
