"""A pruned model read one tensor at a time from the whole one: what the writer of models reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qft.merging.side_files import side_files
from qft.merging.tensors import described
from qft.pruning.anatomy import Anatomy, Piece
from qft.pruning.cut import Cut, pruned_config, pruned_shape, require_sayable
from qft.shards import Fingerprint, ShardedCheckpoint, tensor_bytes


class PrunedTensors:
    """What a cut leaves of a model, as a `qft.merging.tensors.TensorSource`.

    Dtypes stay as they are; names are renumbered so that the layers count from 0 again.

    Raises:
        ModelError: the family's config cannot describe the result.
    """

    def __init__(self, anatomy: Anatomy, cut: Cut) -> None:
        self._anatomy, self._cut = anatomy, cut
        self._checkpoint = ShardedCheckpoint(anatomy.folder)
        self._after = cut.sizes(anatomy.sizes)
        new_number = {old: new for new, old in enumerate(cut.layers)}
        tail = anatomy.stack.rpartition(".")[2]
        self._pieces: dict[str, Piece] = {}
        self._modules: dict[str, str] = {}
        for piece in anatomy.pieces:
            name, module = piece.stored, piece.module
            if piece.layer is not None:
                if piece.layer not in new_number:
                    continue
                name = renumbered(name, tail, piece.layer, new_number[piece.layer])
                module = f"{anatomy.stack}.{new_number[piece.layer]}.{piece.within}"
            self._pieces[name], self._modules[name] = piece, module
        self.config: Mapping[str, Any] = pruned_config(anatomy, cut)
        self.files: Mapping[str, Path] = side_files(anatomy.folder)
        self._fingerprint = Fingerprint()
        shapes = {self._modules[name]: self.shape(name) for name in self._pieces}
        require_sayable(anatomy, self.config, shapes)

    def names(self) -> list[str]:
        """Checkpoint names, in the order of the whole model's."""
        return list(self._pieces)

    def module(self, name: str) -> str:
        """The module name of a checkpoint name."""
        return self._modules[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of what stays of the tensor."""
        piece = self._pieces[name]
        stored = self._checkpoint.shape(piece.stored)
        return pruned_shape(self._anatomy, piece, stored, self._after)

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""
        return self._checkpoint.dtype(self._pieces[name].stored)

    def read(self, name: str) -> Tensor:
        """What stays of one tensor, on the CPU."""
        piece = self._pieces[name]
        tensor = self._cut.apply(self._anatomy, piece, self._checkpoint.read(piece.stored))
        self._fingerprint.add_tensor(name, tensor)
        return tensor

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The same in one block: what stays of a row depends on all of it."""
        yield self.read(name)

    def made_from(self) -> list[tuple[str, int, int]]:
        """See :class:`qft.merging.tensors.TensorSource`."""
        return described(self._checkpoint.files())

    def fingerprint(self) -> str:
        """Of the pruned model, once all of it was read."""
        return self._fingerprint.text()

    def parameters(self) -> int:
        """Numbers in all tensors; tied ones count once."""
        return sum(_count(self.shape(name)) for name in self._pieces)

    def total_bytes(self) -> int:
        """Bytes of all tensors as they will be written."""
        return sum(tensor_bytes(self.shape(name), self.dtype(name)) for name in self._pieces)

    def close(self) -> None:
        """Closes the whole model's files."""
        self._checkpoint.close()


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def renumbered(name: str, stack: str, old: int, new: int) -> str:
    """A tensor's name with another layer number: ``renumbered("h.3.w", "h", 3, 2)`` is ``h.2.w``.

    Args:
        stack: the last part of the stack's module name, which checkpoints share.
    """
    pattern = rf"(^|\.){re.escape(stack)}\.{old}\."
    changed, times = re.subn(pattern, rf"\g<1>{stack}.{new}.", name, count=1)
    if not times:
        raise ValueError(f"{name!r} holds no layer number {old} of {stack!r}")
    return changed
