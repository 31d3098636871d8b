"""Runs a model on a few samples, whole or up to its cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qft.data.tasks import Example, pad_id
from qft.evaluation import evaluating
from qft.inputs import Inputs
from qft.lean.feature_cache import Cut
from qft.lean.model_parts import device_of
from qft.step import announced
from qft.token_batches import few_at_once


class Runner:
    """A prepared model and how its task makes batches.

    Attributes:
        probe: three samples (or one thrice), the longest first; padded, if any batch can be.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.device = model, device_of(model)
        self._task, self._pad = inputs.task, pad_id(inputs.tokenizer)
        ordered = sorted(inputs.train.examples, key=_length)
        shortest, middle = ordered[0], ordered[len(ordered) // 2]
        longer = next((e for e in ordered if _length(e) > _length(shortest)), ordered[-1])
        self.probe: list[Example] = sorted([shortest, longer, middle], key=_length, reverse=True)

    def run(self, examples: Sequence[Example]) -> Any:
        """A forward pass as a training step does it, without gradients."""
        batch = self._task.collate(examples, self._pad)
        inputs = {name: value.to(self.device) for name, value in batch.items()}
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            announced(self.model, examples, batch),
            torch.no_grad(),
            torch.random.fork_rng(devices=devices),
        ):
            torch.manual_seed(0)  # what is drawn above the cut is the same every time
            return self.model(**inputs)

    def rows(
        self,
        cut: Cut,
        examples: Sequence[Example],
        progress: Callable[[int], object] = lambda count: None,
    ) -> Tensor:
        """What reaches the cut, the samples' rows one after another, on the CPU.

        Args:
            examples: best of falling length.
            progress: called with the number of samples just done.
        """

        def batch_rows(part: Sequence[Example]) -> Tensor:
            hidden = cut.observe(lambda: self.run(part))
            if not cut.pooled:
                pairs = zip(hidden, part, strict=True)
                hidden = torch.cat([row[: _length(example)] for row, example in pairs])
            return hidden.cpu()

        with evaluating(self.model):
            return torch.cat(few_at_once(examples, batch_rows, progress))


def _length(example: Example) -> int:
    return len(example.inputs["input_ids"])
