"""Hidden states of two whole models, compared layer by layer while they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qft.lean.model_parts import layer_stacks
from qft.verification.diagnosis import EMBEDDINGS
from qft.verification.tally import LayerTally


class LayerListener:
    """Hooks on two models' layers: the first's hidden states wait for the second's."""

    def __init__(self, models: Sequence[nn.Module], tally: LayerTally) -> None:
        self.text = torch.empty(0, 0, dtype=torch.bool)  # of the batch that runs
        self.notes: list[str] = []
        self._hooks: list[Any] = []
        self._waiting: dict[int, Tensor] = {}
        self.places: list[str] = []  # names of where hidden states are compared
        self._layers = tally
        stacks = [_named_layers(model) for model in models]
        names = [name for name, _ in stacks[0]]
        if len(names) != len(stacks[1]) or not names:
            counts = " and ".join(str(len(stack)) for stack in stacks)
            self.notes.append(f"The models have {counts} layers, which were not compared.")
            return
        # an encoder-decoder's second half begins with embeddings of its own, which are not caught
        self.places = [EMBEDDINGS, *names]
        for keep, stack in zip((True, False), stacks, strict=True):
            first = stack[0][1]
            self._hooks.append(
                first.register_forward_pre_hook(self._before(keep), with_kwargs=True)
            )
            for place, (_, layer) in enumerate(stack, start=1):
                self._hooks.append(layer.register_forward_hook(self._after(place, keep)))

    def remove(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, keep: bool) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._meet(0, given[0] if given else named["hidden_states"], keep)

        return hook

    def _after(self, place: int, keep: bool) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
            self._meet(place, made[0] if isinstance(made, tuple) else made, keep)

        return hook

    def _meet(self, place: int, hidden: Tensor, keep: bool) -> None:
        if keep:
            self._waiting[place] = hidden
            return
        first = self._waiting.pop(place)
        if first.shape != hidden.shape:
            self.notes.append("The models' hidden states differ in shape.")
            return
        text = self.text
        if text.shape != hidden.shape[:2]:  # a decoder's side, or after a soft prompt
            text = torch.ones(hidden.shape[:2], dtype=torch.bool)
        self._layers.add(place, first, hidden, text)


def _named_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All layers in the order data passes them, under the names the plain model gives them."""
    inner: Any = model
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return [
        (f"{stack}.{number}", layer)
        for stack, layers in layer_stacks(inner).items()
        for number, layer in enumerate(layers)
    ]
