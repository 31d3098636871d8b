"""Rows run layer by layer through a source (a base, or a base with an adapter on it).

No merged copy is made: a layer's merged weights are computed when its turn has come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from qft import models
from qft.layer_stream import Stream
from qft.layer_weights import LayerWeights
from qft.merging.tensors import MergedTensors, tied_names
from qft.shards import row_blocks


def open_stream(
    source: MergedTensors,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    device: str = "cpu",
) -> Stream:
    """Batches on their way, in float32, through a source's layers (:meth:`Stream.layers`).

    The names of the layers' modules are the source's: ``source.module(name)``.

    Args:
        source: what is to be written.
        batches: as a task collates them.

    Raises:
        ModelError: the model has not one stack of layers, or does not run them one after another.
    """
    skeleton = models.build_skeleton(source.config).float().eval().requires_grad_(False)
    skeleton.tie_weights()  # type: ignore[operator]
    tensors = SourceTensors(source, skeleton)
    return Stream(LayerWeights(skeleton, tensors, device), batches, "the model to be exported")


class SourceTensors:
    """A source under module names (:class:`qft.layer_weights.StoredTensors`).

    Reading here leaves the source's fingerprint alone.

    Args:
        skeleton: says which names are tied.
    """

    def __init__(self, source: MergedTensors, skeleton: nn.Module) -> None:
        self._source = source
        names = {name: source.module(name) for name in source.names()}
        self._names = {module: name for name, module in names.items()}
        for absent, present in tied_names(skeleton, names).items():
            if present in self._names:
                self._names.setdefault(absent, self._names[present])

    def names(self) -> list[str]:
        """Every module name, tied ones included."""
        return list(self._names)

    def read(self, name: str) -> Tensor:
        """One merged tensor, on the CPU, not rounded."""
        shape = self._source.shape(self._names[name])
        parts = [self._rows(name, part) for part in row_blocks(shape)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some of its rows."""
        return torch.cat([self._rows(name, part) for part in _runs(rows)])

    def _rows(self, name: str, part: slice) -> Tensor:
        return self._source.pair(self._names[name], part)[1]


def _runs(rows: Sequence[int]) -> Iterator[slice]:
    """Neighbouring rows together, in the order given."""
    start = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1:
            yield slice(rows[start], rows[place - 1] + 1)
            start = place
