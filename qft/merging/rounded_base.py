"""The base that training saw: its quantized layers rounded and dequantized while they are read.

What a 4- or 8-bit model computes with are the dequantized weights. They are had here from the
original checkpoint in blocks of rows, bit for bit what bitsandbytes' loaded layers dequantize to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from qft import models
from qft.four_bit import unpack_rows
from qft.merging.bnb_rounding import (
    blocks_of_groups,
    empty_scales,
    groups,
    pack_rows,
    quantized_linears,
    round_int8,
    round_scales,
    rows_together,
    scales_of,
    unround_int8,
)
from qft.shards import ShardedCheckpoint


class BaseCheckpoint(Protocol):
    """A base model's tensors under checkpoint names: as stored, or as a quantized model saw them.

    Attributes:
        rounded: how they are rounded, in words that tell one rounding from another; empty where
            they are not.
    """

    @property
    def rounded(self) -> str:
        """See above."""

    @property
    def folder(self) -> Path:
        """Where it lies."""

    def names(self) -> list[str]:
        """Every tensor's name, in the order of the files."""

    def shape(self, name: str) -> tuple[int, ...]:
        """As the model's module holds it."""

    def dtype(self, name: str) -> torch.dtype:
        """What the tensor is to be stored in, unless another dtype is asked for."""

    def read(self, name: str) -> Tensor:
        """All of it."""

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some of its rows."""

    def read_columns(self, name: str, columns: range) -> Tensor:
        """Some neighbouring columns of a matrix, ``[rows, len(columns)]``."""

    def files(self) -> list[Path]:
        """What is read."""

    def fingerprint(self) -> str:
        """Of the files' tensors."""

    def close(self) -> None:
        """Closes the files."""


class DequantizedBase:
    """What the two kinds of dequantized bases share.

    Args:
        checkpoint: the open files.
        layers: checkpoint name of each quantized weight → whether the module holds it transposed
            (GPT-2's Conv1D; bitsandbytes quantizes ``[out, in]``).
    """

    def __init__(self, checkpoint: ShardedCheckpoint, layers: Mapping[str, bool]) -> None:
        self._checkpoint, self._layers = checkpoint, dict(layers)
        self._whole: tuple[str, Tensor] | None = None  # the last transposed weight

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies."""
        return self._checkpoint.folder

    def names(self) -> list[str]:
        """See :class:`BaseCheckpoint`."""
        return self._checkpoint.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """See :class:`BaseCheckpoint`."""
        height, width = self._size(name) if name in self._layers else (0, 0)
        if name not in self._layers:
            return self._checkpoint.shape(name)
        return (width, height) if self._layers[name] else (height, width)

    def files(self) -> list[Path]:
        """See :class:`BaseCheckpoint`."""
        return self._checkpoint.files()

    def fingerprint(self) -> str:
        """See :class:`BaseCheckpoint`."""
        return self._checkpoint.fingerprint()

    def close(self) -> None:
        """Closes the files."""
        self._whole = None
        self._checkpoint.close()

    def read(self, name: str) -> Tensor:
        """All of a tensor."""
        if name not in self._layers:
            return self._checkpoint.read(name)
        return self.read_rows(name, range(self.shape(name)[0]))

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a tensor, in the order asked for."""
        if name not in self._layers:
            return self._checkpoint.read_rows(name, rows)
        missing = next((row for row in rows if not 0 <= row < self.shape(name)[0]), None)
        if missing is not None:
            raise IndexError(f"{name} has no row {missing}")
        if self._layers[name]:
            return self._transposed(name)[list(rows)]
        if isinstance(rows, range) and rows.step == 1:
            return torch.cat([*self._dequantized(name, rows)])
        single = [self.read_rows(name, range(row, row + 1)) for row in rows]
        return torch.cat([*self._dequantized(name, range(0)), *single])

    def read_columns(self, name: str, columns: range) -> Tensor:
        """Neighbouring columns of a matrix, ``[rows, len(columns)]``."""
        if name not in self._layers:
            return self._checkpoint.read_columns(name, columns)
        part = slice(columns.start, columns.stop)
        if self._layers[name]:
            return self._transposed(name)[:, part]
        height, _ = self._size(name)
        return torch.cat([rows[:, part] for rows in self._dequantized(name, range(height))])

    def _transposed(self, name: str) -> Tensor:
        """A weight that its module holds transposed: whole, since each of its rows needs all."""
        if self._whole is None or self._whole[0] != name:
            self._whole = None  # frees the one before
            height, width = self._size(name)
            whole, done = torch.empty(0), 0
            for rows in self._dequantized(name, range(height)):
                if not done:
                    whole = torch.empty(width, height, dtype=rows.dtype)
                whole[:, done : done + len(rows)] = rows.T
                done += len(rows)
            self._whole = (name, whole)
        return self._whole[1]

    def _dequantized(self, name: str, rows: range) -> Iterator[Tensor]:
        """Rows of a quantized layer ``[out, in]``, in blocks that hold whole groups of weights."""
        height, width = self._size(name)
        together = self._together(name)
        start = rows.start - rows.start % together
        stop = min(height, -(-rows.stop // together) * together)
        for part in blocks_of_groups((max(0, stop - start), width), together):
            wide = range(part.start + start, part.stop + start)
            block = self._block(name, wide)
            yield block[max(0, rows.start - wide.start) : rows.stop - wide.start]
        if stop <= start:
            yield self._block(name, range(min(height, together)))[:0]

    def _size(self, name: str) -> tuple[int, int]:
        """Of a quantized layer: its outputs and inputs."""
        raise NotImplementedError

    def _together(self, name: str) -> int:
        """How many rows of a quantized layer are had together at least."""
        raise NotImplementedError

    def _block(self, name: str, part: range) -> Tensor:
        """Dequantized rows of a layer, beginning and ending with whole groups."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rounding:
    """How loading has quantized a checkpoint.

    Attributes:
        kind: ``nf4``, ``fp4`` or ``int8``.
        layers: see :class:`DequantizedBase`.
        dtype: the weights were brought to it before; None is each one's own.
    """

    kind: str
    layers: Mapping[str, bool]
    dtype: torch.dtype | None = None


def layers_of(folder: Path, skeleton: nn.Module, keep: Sequence[str]) -> dict[str, bool]:
    """Checkpoint names of the weights that loading quantizes → whether they lie transposed.

    Args:
        keep: names of modules that stay unquantized.
    """
    linears = quantized_linears(skeleton, keep)
    weights = {f"{name}.weight": transposed for name, transposed in linears.items()}
    names = models.module_names(folder, skeleton)
    return {name: weights[module] for name, module in names.items() if module in weights}


class RoundedBase(DequantizedBase):
    """An unquantized checkpoint, read as a model that was quantized on loading saw it."""

    def __init__(self, checkpoint: ShardedCheckpoint, rounding: Rounding) -> None:
        super().__init__(checkpoint, rounding.layers)
        self._kind, self._dtype = rounding.kind, rounding.dtype
        self._scales: tuple[str, Tensor] | None = None  # of the layer that was read last

    @property
    def rounded(self) -> str:
        """See :class:`BaseCheckpoint`."""
        return f"{self._kind} of {self._dtype or 'its own dtype'}"

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""
        return self._checkpoint.dtype(name)

    def _size(self, name: str) -> tuple[int, int]:
        height, width = self._checkpoint.shape(name)
        return (width, height) if self._layers[name] else (height, width)

    def _together(self, name: str) -> int:
        return 1 if self._kind == "int8" else rows_together(self._size(name)[1])

    def _rows(self, name: str, part: range) -> Tensor:
        """Rows as they were quantized."""
        if self._layers[name]:
            rows = self._checkpoint.read_columns(name, part).T.contiguous()
        else:
            rows = self._checkpoint.read_rows(name, part)
        return rows if self._dtype is None else rows.to(self._dtype)

    def _block(self, name: str, part: range) -> Tensor:
        rows = self._rows(name, part)
        if self._kind == "int8":
            return unround_int8(*round_int8(rows, name))
        if self._scales is None or self._scales[0] != name:
            parts = blocks_of_groups(self._size(name), self._together(name))
            found = empty_scales(self._size(name))
            for p in parts:
                found[groups(p, rows.shape[1])] = scales_of(self._rows(name, p))
            self._scales = (name, round_scales(found).values)
        scales = self._scales[1][groups(part, rows.shape[1])]
        shape = (rows.shape[0], rows.shape[1])
        return unpack_rows(pack_rows(rows, self._kind), scales, self._kind, shape, rows.dtype)
