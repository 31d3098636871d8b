"""A frozen trunk's output for a set of samples, on disk: see `qft.shard_store`.

Each shard, `feature-cache/IDENTITY/NUMBER/features.safetensors`, holds `rows` of its samples, one
after another: ``[tokens, width]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qft.shard_store import ShardStore, shard_ranges

SHARD_BYTES = 64 * 2**20  # what a kill can cost at most
_ROWS = "rows"


@dataclass(frozen=True)
class Rows:
    """Which rows a store holds.

    Attributes:
        samples: the samples' numbers in the order in which they are stored, each once.
        lengths: rows of each.
        width: numbers a row.
        dtype: of the rows.
    """

    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    width: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self.width * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Of all rows."""
        return sum(self.lengths) * self.row_bytes


class FeatureStore(ShardStore):
    """The shards of one identity.

    Args:
        root: the folder of all caches.
        identity: what decides the rows' values, by name.
        rows: which rows there are to be; part of what the identity must tell.
    """

    file = "features.safetensors"

    def __init__(self, root: Path, identity: Mapping[str, str], rows: Rows) -> None:
        self.rows = rows
        sizes = (length * rows.row_bytes for length in rows.lengths)
        super().__init__(root, identity, shard_ranges(sizes, SHARD_BYTES))

    def bytes_missing(self) -> int:
        """Bytes of the rows that are still to be written."""
        return sum(self._tokens(number) for number in self.missing()) * self.rows.row_bytes

    def write(self, number: int, rows: Tensor) -> None:
        """Writes a shard; it is there as a whole or not at all.

        Args:
            rows: ``[tokens, width]`` of its samples, on the CPU.

        Raises:
            SaveError: the disk is full or not writable.
        """
        self.write_tensors(number, {_ROWS: rows})

    def open(self) -> FeatureReader:
        """The rows, mapped into memory; every shard must be there."""
        parts = [self.tensors(number)[_ROWS] for number in range(len(self.shards))]
        return FeatureReader(self.rows, self.shards, parts)

    def fits(self, number: int, tensors: Mapping[str, Tensor]) -> bool:
        """See `ShardStore`."""
        rows, shape = tensors.get(_ROWS), (self._tokens(number), self.rows.width)
        return rows is not None and rows.shape == shape and rows.dtype == self.rows.dtype

    def _tokens(self, number: int) -> int:
        part = self.shards[number]
        return sum(self.rows.lengths[part.start : part.stop])


class FeatureReader:
    """Rows by their sample's number, out of files that are mapped into memory."""

    def __init__(self, rows: Rows, shards: Sequence[range], parts: Sequence[Tensor]) -> None:
        self._places: dict[int, tuple[Tensor, int, int]] = {}
        for part, tensor in zip(shards, parts, strict=True):
            start = 0
            for position in part:
                length = rows.lengths[position]
                self._places[rows.samples[position]] = (tensor, start, length)
                start += length

    def __call__(self, samples: Sequence[int]) -> Tensor:
        """The samples' rows, one after another: ``[tokens, width]``."""
        places = [self._places[sample] for sample in samples]
        return torch.cat([tensor[start : start + length] for tensor, start, length in places])
