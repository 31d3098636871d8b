"""Last layers: the top of the model trains, everything below it stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from adapters.freed_tensors import FreedTensors, head_parameters, own_parameters
from qft.errors import RecipeError
from qft.lean.model_parts import head_names, layer_stacks, output_embeddings
from qft.strategy import Needs

if TYPE_CHECKING:
    from torch import nn


class Layers(FreedTensors):
    """Trains the last layers, the normalisation behind them, and the task's head."""

    name: ClassVar[str] = "layers"
    paper: ClassVar[str] = "Howard & Ruder 2018, https://arxiv.org/abs/1801.06146"

    last: int = Field(2, ge=1, description="how many layers, counted from the top")
    output_embeddings: bool = Field(
        False, description="train a language model's output layer too (and what is tied to it)"
    )

    def needs(self, skeleton: nn.Module) -> Needs:
        """What trains must not be quantized; nothing below it trains."""
        modules = [*self._modules(skeleton), *head_names(skeleton)]
        layers = sum(len(stack) for stack in layer_stacks(skeleton).values())
        return Needs(full_precision=tuple(modules), lowest_trainable_layer=layers - self.last)

    def trained(self, model: nn.Module) -> list[str]:
        """The parameters of the last layers, of the normalisation behind them, of the head."""
        inside = tuple(f"{name}." for name in self._modules(model))
        parameters = own_parameters(model)
        chosen = [name for name in parameters if name.startswith(inside)]
        written = output_embeddings(model) if self.output_embeddings else None
        if written is not None:
            own = {id(parameter) for parameter in written.parameters()}
            chosen += [n for n, p in parameters.items() if id(p) in own and n not in chosen]
        return [*chosen, *head_parameters(model)]

    def _modules(self, model: nn.Module) -> list[str]:
        name, stack = list(layer_stacks(model).items())[-1]
        if self.last > len(stack):
            raise RecipeError(
                "The model has fewer layers.",
                where="strategy.last",
                found=f"{self.last}; the model has {len(stack)}",
                fix="a smaller number, or {name: full}",
            )
        parent = model.get_submodule(name.rpartition(".")[0])
        behind = [
            child
            for child, module in parent.named_children()
            if "norm" in type(module).__name__.lower() and "emb" not in child  # that is below
        ]
        prefix = name.rpartition(".")[0]
        first = len(stack) - self.last
        return [
            *(f"{name}.{number}" for number in range(first, len(stack))),
            *(f"{prefix}.{child}" if prefix else child for child in behind),
        ]
