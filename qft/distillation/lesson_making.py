"""Makes of what a teacher in memory says what is kept of it, a chunk of logits at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qft.data.examples import Example
from qft.distillation.drawing import drawn
from qft.distillation.kept import Kept
from qft.distillation.lessons import Lesson, Source, joined
from qft.distillation.likeliest import likeliest
from qft.lean.label_loss import CHUNK_BYTES, CPU_ROWS, Head, head_logits

_STATES = "states"


class LessonMaker:
    """Lessons as they are stored.

    Args:
        source: a teacher in memory.
        kept: what is kept.
    """

    def __init__(self, source: Source, kept: Kept) -> None:
        self.source, self.kept = source, kept

    def vocabulary(self) -> int:
        """Tokens that the kept ones are among; known once a lesson was made; 1 without tokens."""
        head = self.source.head
        if self.kept.kind not in ("top-k", "samples") or head is None:
            return 1
        return self.source.shared or head[1]

    def __call__(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        """One an example, encoded, on the CPU; all are run at once."""
        told = self.source.lessons(examples)
        found = [{n: t for n, t in lesson.items() if n != _STATES} for lesson in told]
        if self.kept.kind in ("top-k", "samples"):
            self._add_tokens(found, told, examples)
        if self.kept.kind == "none":
            for lesson in found:
                lesson.pop("logits", None)
        coding = self.kept.coding(self.vocabulary())
        return [coding.encode(lesson) for lesson in found]

    def _add_tokens(
        self, found: list[dict[str, Tensor]], told: Sequence[Lesson], examples: Sequence[Example]
    ) -> None:
        counts = [len(lesson[_STATES]) for lesson in told]
        keys = [
            (example.index, position)
            for example, count in zip(examples, counts, strict=True)
            for position in range(count)
        ]
        assert self.source.head is not None
        states, (head, rows) = joined(told, _STATES), self.source.head
        made: dict[str, list[Tensor]] = {}
        step = _chunk_rows(states, rows)
        for start in range(0, len(states), step):
            part = slice(start, start + step)
            for name, values in self._of_chunk(states[part], head, rows, keys[part]).items():
                made.setdefault(name, []).append(values.cpu())
        for name, parts in made.items():
            for lesson, values in zip(found, torch.cat(parts).split(counts), strict=True):
                lesson[name] = values

    def _of_chunk(
        self, states: Tensor, head: Head, rows: int, keys: Sequence[tuple[int, int]]
    ) -> dict[str, Tensor]:
        kept, shared = self.kept, self.vocabulary()
        with torch.no_grad():
            logits = head_logits(states, head, rows)[:, :shared].float()
            if kept.kind == "top-k":
                return likeliest(logits, kept.count, kept.temperature)
            return drawn(logits, kept.count, keys, seed=kept.seed, temperature=kept.temperature)


def _chunk_rows(states: Tensor, vocabulary: int) -> int:
    rows = max(1, CHUNK_BYTES // (vocabulary * (4 + states.element_size())))
    return min(rows, CPU_ROWS) if states.device.type == "cpu" else rows
