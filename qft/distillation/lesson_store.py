"""A teacher's lessons on disk: see `qft.shard_store`.

Each shard, `teacher-cache/IDENTITY/NUMBER/lessons.safetensors`, holds for each thing that the
lessons say the values of its examples, one after another, and beside them how many are each one's:
`tokens` and `tokens/rows`. So lessons may be of any names, lengths and types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qft.distillation.lessons import Lesson
from qft.shard_store import ShardStore, shard_ranges

SHARD_BYTES = 64 * 2**20  # what a kill can cost at most
_ROWS = "/rows"


class LessonStore(ShardStore):
    """The shards of one identity.

    Args:
        root: the folder of all caches.
        identity: what decides what the lessons say, by name.
        samples: the examples' numbers in the order in which they are stored, each once.
        sizes: bytes of each one's lesson, about; where shards end is decided by them alone.
    """

    file = "lessons.safetensors"

    def __init__(
        self,
        root: Path,
        identity: Mapping[str, str],
        samples: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        self.samples, self.sizes = tuple(samples), tuple(sizes)
        super().__init__(root, identity, shard_ranges(sizes, SHARD_BYTES))

    def bytes_missing(self) -> int:
        """Bytes that are still to be written, about."""
        parts = [self.shards[number] for number in self.missing()]
        return sum(sum(self.sizes[part.start : part.stop]) for part in parts)

    def write(self, number: int, lessons: Sequence[Lesson]) -> None:
        """Writes a shard; it is there as a whole or not at all.

        Args:
            lessons: encoded, on the CPU, one an example; all of them say the same things.

        Raises:
            SaveError: the disk is full or not writable.
            ValueError: they are not those of the shard.
        """
        names = sorted(lessons[0]) if lessons else []
        alike = all(sorted(lesson) == names for lesson in lessons)
        if len(lessons) != len(self.shards[number]) or not alike:
            raise ValueError("a shard takes one lesson an example, all of the same kind")
        tensors: dict[str, Tensor] = {}
        for name in names:
            parts = [lesson[name] for lesson in lessons]
            tensors[name] = torch.cat(parts)
            tensors[name + _ROWS] = torch.tensor([len(part) for part in parts], dtype=torch.int32)
        self.write_tensors(number, tensors)

    def open(self) -> LessonReader:
        """The lessons, mapped into memory; every shard must be there."""
        parts = [self.tensors(number) for number in range(len(self.shards))]
        return LessonReader(self.samples, self.shards, parts)

    def fits(self, number: int, tensors: Mapping[str, Tensor]) -> bool:
        """See `ShardStore`."""
        examples = len(self.shards[number])
        names = [name for name in tensors if not name.endswith(_ROWS)]
        if 2 * len(names) != len(tensors) or (examples and not names):
            return False
        counts = {name: tensors.get(name + _ROWS) for name in names}
        return all(
            rows is not None
            and rows.shape == (examples,)
            and rows.dtype == torch.int32
            and bool((rows >= 0).all())
            and int(rows.sum()) == len(tensors[name])
            for name, rows in counts.items()
        )


class LessonReader:
    """Encoded lessons by their example's number, out of files that are mapped into memory."""

    def __init__(
        self,
        samples: Sequence[int],
        shards: Sequence[range],
        parts: Sequence[Mapping[str, Tensor]],
    ) -> None:
        self._places = {
            samples[position]: (number, position - part.start)
            for number, part in enumerate(shards)
            for position in part
        }
        self._parts = [
            {name: tensor for name, tensor in part.items() if not name.endswith(_ROWS)}
            for part in parts
        ]
        self._ends = [
            {name: part[name + _ROWS].cumsum(dim=0).tolist() for name in values}
            for part, values in zip(parts, self._parts, strict=True)
        ]

    def __call__(self, sample: int) -> dict[str, Tensor]:
        """An example's lesson as it was written; views of the files."""
        number, place = self._places[sample]
        found = {}
        for name, ends in self._ends[number].items():
            start = ends[place - 1] if place else 0
            found[name] = self._parts[number][name][start : ends[place]]
        return found

    def whole(self, name: str) -> list[Tensor]:
        """One thing of all lessons, shard by shard; empty where they do not say it."""
        return [part[name] for part in self._parts if name in part]

    def bytes(self) -> int:
        """Of all that the lessons say."""
        return sum(tensor.nbytes for part in self._parts for tensor in part.values())
