"""Linear layers that read the same tensor, with the Hessian of it, one such group at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from qft.input_hessian import add_inputs_, new_hessian
from qft.layer_inputs import run_watched, text_rows
from qft.layer_stream import StreamedLayer


def input_groups(layer: StreamedLayer, linears: Mapping[str, nn.Module]) -> Iterator[InputGroup]:
    """A pass over all rows a group, in the order in which the linear layers are called.

    So one Hessian is there at a time, and a group sees what those before it make of their inputs
    once the caller has changed them. What no row comes to is in no group.

    Args:
        linears: parts of the layer, by any names.
    """
    left = dict(linears)
    while left:
        group = InputGroup(layer)
        run_watched(layer, left, group.watch)
        if not group.names:
            return
        for name in group.names:
            del left[name]
        yield group


class InputGroup:
    """The first linear layer that is called, and those that are given the very same tensor.

    Attributes:
        names: of those layers.
    """

    def __init__(self, layer: StreamedLayer) -> None:
        self._layer = layer
        self._input: Tensor | None = None
        self._hessian: Tensor | None = None
        self.names: list[str] = []

    def taken(self) -> Tensor:
        """The Hessian; the group holds nothing of that size any more."""
        assert self._hessian is not None
        hessian, self._hessian, self._input = self._hessian, None, None
        return hessian

    def watch(self, name: str) -> Callable[..., None]:
        """A hook for a linear layer."""

        def before(module: Any, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            if self.names and name != self.names[0]:
                if x is self._input and name not in self.names:
                    self.names.append(name)
                return
            if self._hessian is None:
                self.names.append(name)
                self._hessian = new_hessian(x.shape[-1], x.device)
            self._input = x
            for text in text_rows(x, self._layer.tokens):
                add_inputs_(self._hessian, text)

        return before
