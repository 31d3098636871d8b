"""A model with zeros read one tensor at a time: what the writer of models reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qft.merging.side_files import side_files
from qft.merging.tensors import described
from qft.pruning.anatomy import Anatomy, Piece
from qft.shards import Fingerprint, ShardedCheckpoint


class SparseTensors:
    """The model as it was, but for some matrices, as a `qft.merging.tensors.TensorSource`.

    Args:
        targets: from `qft.pruning.sparse_targets`.
        prune: sets the zeros of a matrix in place, where ``places`` hold none.
        places: folders in which the pruned matrices lie (`qft.pruning.sparse_layers`).
    """

    def __init__(
        self,
        anatomy: Anatomy,
        targets: Mapping[str, Piece],
        prune: Callable[[Tensor], None] | None = None,
        places: Sequence[Path] = (),
    ) -> None:
        self._targets, self._prune = targets, prune
        self._checkpoint = ShardedCheckpoint(anatomy.folder)
        self._kept = {
            name: kept
            for kept in (ShardedCheckpoint(place) for place in places)
            for name in kept.names()
        }
        self._modules = {piece.stored: piece.module for piece in anatomy.pieces}
        self.config: Mapping[str, Any] = anatomy.config
        self.files: Mapping[str, Path] = side_files(anatomy.folder)
        self.counted = {"zeros": 0, "weights": 0}  # of the targets that were read
        self._fingerprint = Fingerprint()

    def names(self) -> list[str]:
        """Checkpoint names, in the order of the whole model's."""
        return list(self._modules)

    def module(self, name: str) -> str:
        """The module name of a checkpoint name."""
        return self._modules[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """As it is stored."""
        return self._checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""
        return self._checkpoint.dtype(name)

    def read(self, name: str) -> Tensor:
        """One tensor, pruned, on the CPU."""
        tensor = self._kept.get(name, self._checkpoint).read(name)
        if name in self._targets:
            if name not in self._kept:
                assert self._prune is not None
                self._prune(tensor)
            self.counted["zeros"] += tensor.numel() - int(torch.count_nonzero(tensor))
            self.counted["weights"] += tensor.numel()
        self._fingerprint.add_tensor(name, tensor)
        return tensor

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The same in one block."""
        yield self.read(name)

    def made_from(self) -> list[tuple[str, int, int]]:
        """See :class:`qft.merging.tensors.TensorSource`."""
        return described(
            [*self._checkpoint.files(), *(f for c in self._kept.values() for f in c.files())]
        )

    def fingerprint(self) -> str:
        """Of the pruned model, once all of it was read."""
        return self._fingerprint.text()

    def close(self) -> None:
        """Closes all files."""
        for checkpoint in {id(c): c for c in (self._checkpoint, *self._kept.values())}.values():
            checkpoint.close()
