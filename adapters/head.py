"""Head-only: the classification head trains, everything below it stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from adapters.freed_tensors import FreedTensors, head_parameters
from qft.errors import RecipeError
from qft.lean.model_parts import head_names, layer_stacks
from qft.strategy import Needs

if TYPE_CHECKING:
    from torch import nn


class Head(FreedTensors):
    """Trains the new layers beside the base model: the cheapest thing that can work."""

    name: ClassVar[str] = "head"

    @property
    def tasks(self) -> frozenset[str]:
        """Only tasks with a head of their own; a language model's head is its vocabulary."""
        return frozenset({"classify", "extract", "token"})

    def needs(self, skeleton: nn.Module) -> Needs:
        """The head in full precision; no layer below it trains."""
        self.trained(skeleton)
        layers = sum(len(stack) for stack in layer_stacks(skeleton).values())
        heads = tuple(head_names(skeleton))
        return Needs(full_precision=heads, lowest_trainable_layer=layers)

    def trained(self, model: nn.Module) -> list[str]:
        """The head's parameters."""
        names = head_parameters(model)
        if not names:
            raise RecipeError(
                "This model has no head of its own to train; its last layer is its vocabulary.",
                where="strategy: head",
                found=type(model).__name__,
                fix="task: classify, extract or token, or another strategy such as lora",
            )
        return names
