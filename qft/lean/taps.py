"""What layers of a model put out, caught as it passes: hidden states ``[batch, tokens, width]``.

A layer's number counts from 0, as in the model's own names, through the stacks in the order data
passes them. Nothing is copied: a layer's output is the next one's input, which the backward pass
keeps in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qft.lean.model_parts import layer_stacks


def numbered_layers(model: nn.Module) -> list[nn.Module]:
    """All layers, in the order data passes them."""
    return [layer for stack in layer_stacks(model).values() for layer in stack]


class Taps:
    """Listens at some layers, for one forward pass at a time.

    Args:
        model: below PEFT's wrapper or not.
        numbers: of the layers.
    """

    def __init__(self, model: nn.Module, numbers: Sequence[int]) -> None:
        layers = numbered_layers(model)
        self._caught: dict[int, Tensor] | None = None
        self._hooks: list[RemovableHandle] = []
        for number in dict.fromkeys(numbers):
            layer = layers[number]
            self._hooks.append(layer.register_forward_hook(self._hook(number)))

    def listen(self) -> None:
        """The next forward pass is caught; a recomputation in its backward pass is not."""
        self._caught = {}

    def take(self) -> dict[int, Tensor]:
        """The layers' outputs by number; listens no more."""
        caught, self._caught = self._caught, None
        return caught or {}

    def remove(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, number: int) -> Any:
        def catch(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._caught is not None:
                self._caught[number] = output[0] if isinstance(output, tuple) else output

        return catch
