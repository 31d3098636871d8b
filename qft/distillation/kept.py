"""What is kept of a teacher's word on each example, and how much room that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qft.data.examples import Example, Task
from qft.distillation.lesson_coding import LessonCoding, Precision
from qft.distillation.lessons import label_rows
from qft.distillation.live import supervised_alone
from qft.distillation.matching import Pairs
from qft.distillation.objective import DistillSettings
from qft.recipe import Recipe

_NOMINAL_VOCABULARY = 2**17  # where shards end must not depend on what only the teacher knows


@dataclass(frozen=True)
class Kept:
    """What is kept.

    Attributes:
        kind: the likeliest tokens, drawn ones, a head's logits, or nothing but hidden states.
        count: how many tokens a position.
        temperature: of the distribution that they are of.
        precision: of numbers.
        layers: the teacher's, whose hidden states are kept.
        supervised: only those where a label is predicted.
        seed: of the drawing.
        by_rank: the teacher has tokens of its own (uld).
        predicts: see `qft.data.examples.Task`.
        shifted: whether position t predicts label t + 1.
    """

    kind: Literal["top-k", "samples", "logits", "none"]
    count: int
    temperature: float
    precision: Precision
    layers: tuple[int, ...]
    supervised: bool
    seed: int
    by_rank: bool
    predicts: str
    shifted: bool

    def parts(self) -> dict[str, str]:
        """What of it decides the numbers; empty where it is of no account."""
        tokens = self.kind in ("top-k", "samples")
        where = "supervised" if self.supervised else "all"
        return {
            "kind": self.kind,
            "count": str(self.count) if tokens else "",
            "temperature": str(self.temperature) if tokens else "",
            "precision": self.precision,
            "layers": ", ".join(map(str, self.layers)),
            "layers' tokens": where if self.layers else "",
            "tokens": "the teacher's own" if self.by_rank else "shared" if tokens else "",
            "seed": str(self.seed) if self.kind == "samples" else "",
        }

    def coding(self, vocabulary: int) -> LessonCoding:
        """How it is stored."""
        draws = self.count if self.kind == "samples" else 0
        return LessonCoding(vocabulary, self.precision, draws)

    def rows(self, example: Example) -> int:
        """Supervised positions of an example; 1 where it has a class, all tokens for a span."""
        if self.predicts == "span":
            return len(example.inputs["input_ids"])
        return label_rows(example, shifted=self.shifted)

    def row_bytes(self, vocabulary: int, classes: int) -> int:
        """Bytes a row, hidden states left out; of drawn tokens the most there can be."""
        coding = self.coding(vocabulary)
        return {
            "top-k": coding.likeliest_bytes(min(self.count, vocabulary)),
            "samples": coding.most_drawn_bytes(),
            "logits": 4 * (2 if self.predicts == "span" else classes),
            "none": 0,
        }[self.kind]

    def state_bytes(self, example: Example, width: int) -> int:
        """Bytes of an example's hidden states, about.

        Args:
            width: the teacher's.
        """
        rows = self.rows(example) if self.supervised else len(example.inputs["input_ids"])
        return len(self.layers) * width * rows * (2 if self.precision == "float16" else 4)

    def sizes(self, examples: Sequence[Example], classes: int, width: int) -> list[int]:
        """Bytes of each example's lesson, about: they decide where shards end."""
        row = self.row_bytes(_NOMINAL_VOCABULARY, classes)
        return [self.rows(e) * row + self.state_bytes(e, width) for e in examples]


def kept_of(recipe: Recipe, settings: DistillSettings, task: Task, pairs: Pairs) -> Kept:
    """What a recipe wants to have kept.

    Args:
        pairs: the student's layers with those of the teacher that they learn from.
    """
    kind: Literal["top-k", "samples", "logits", "none"] = "logits"
    if settings.loss == "none":
        kind = "none"
    elif task.predicts == "tokens":
        kind = "samples" if settings.keeps == "samples" else "top-k"
    return Kept(
        kind=kind,
        count=settings.draws if kind == "samples" else settings.top_k,
        temperature=settings.temperature,
        precision=settings.cache_precision,
        layers=tuple(sorted(set(pairs.values()))),
        supervised=settings.hidden is not None and supervised_alone(settings, task),
        seed=recipe.train.seed,
        by_rank=settings.loss == "uld",
        predicts=task.predicts,
        shifted=task.predicts == "tokens" and recipe.task != "seq2seq",
    )
