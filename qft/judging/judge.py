"""What the evaluation asks of whoever judges a task's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qft.data.examples import Example


class Judge(Protocol):
    """Sums up over batches; `add` takes what `score` gave once that batch is complete."""

    def score(self, model: nn.Module, batch: dict[str, Tensor], examples: Sequence[Example]) -> Any:
        """One forward pass over a batch on the model's device; changes nothing here."""

    def add(self, scores: Any) -> None:
        """Takes a batch's scores in."""

    def result(self, examples: Sequence[Example]) -> dict[str, float]:
        """The metrics over all that was added."""
