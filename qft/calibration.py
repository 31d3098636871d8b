"""Rows that something is fitted to (pruning's scores, an export's rounding), drawn and collated."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from qft.data.tasks import Example, Task
from qft.layer_stream import Stream
from qft.merging.tensors import MergedTensors
from qft.source_stream import open_stream

_BATCH_ROWS = 8


@dataclass(frozen=True)
class Calibration:
    """Rows that a rounding is fitted to.

    Error compensation (compressed-tensors) and the importance of columns (GGUF) both look at what
    reaches each linear layer while these rows run through base ⊕ adapter, a layer at a time.

    Attributes:
        batches: as the task collates them.
        rows: how many there are.
        name: of where they come from, without folders.
        fingerprint: tells these rows from others.
        device: to compute on.
    """

    batches: tuple[Mapping[str, Tensor], ...]
    rows: int
    name: str
    fingerprint: str
    device: str = "cpu"

    def stream(self, source: MergedTensors) -> Stream:
        """The rows on their way through a source's layers.

        Raises:
            ModelError: the model has not one stack of layers.
        """
        return open_stream(source, self.batches, device=self.device)


def drawn(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """At most ``count`` of them, drawn by the seed, in their order."""
    if len(examples) <= count:
        return list(examples)
    chosen = sorted(random.Random(seed).sample(range(len(examples)), count))
    return [examples[place] for place in chosen]


def collated(
    task: Task, examples: Sequence[Example], pad_token_id: int, rows: int = _BATCH_ROWS
) -> list[dict[str, Tensor]]:
    """The rows in batches, like lengths together; the longest first."""
    ordered = sorted(examples, key=lambda e: (-len(e.inputs["input_ids"]), e.index))
    parts = [ordered[start : start + rows] for start in range(0, len(ordered), rows)]
    return [task.collate(part, pad_token_id) for part in parts]
