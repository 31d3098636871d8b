"""Which layers of a stack are alike, and a shorter stack in which each finds its like.

Two layers are alike if nothing that decides bytes tells them apart: the same modules, shapes, types
and settings, what trains in them and below them, what they do with their activations. A layer's
neighbours count as well, since one layer's last tensors are freed while the next one runs.
"""

from __future__ import annotations

import types
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# how a module names its place in the model, which decides no bytes
_PLACES = ("layer_idx", "layer_id", "layer_number", "block_idx", "module_name", "target_name")
_BESIDE = ("_modules", "training", *_PLACES)


@dataclass(frozen=True)
class ShortStack:
    """A few layers for many.

    Attributes:
        kept: numbers of the layers that stay, ascending.
        stands_for: for each layer of the whole stack which of the kept ones is like it.
    """

    kept: tuple[int, ...]
    stands_for: tuple[int, ...]


def shortened(likenesses: Sequence[Hashable], reach: int = 1) -> ShortStack:
    """The fewest layers among which every layer finds one that is like it, neighbours included.

    Where two layers have the same surroundings, those from the one up to the other can go, if what
    they show is shown by others too: the surroundings of all others stay as they were.

    Args:
        likenesses: one a layer; equal ones are alike.
        reach: how many neighbours on either side must be alike as well.
    """
    padded = [*range(-reach, 0), *(("layer", x) for x in likenesses), *range(-2 * reach, -reach)]
    around = [tuple(padded[at : at + 2 * reach + 1]) for at in range(len(likenesses))]
    numbers = {surroundings: n for n, surroundings in enumerate(dict.fromkeys(around))}
    seen = [numbers[surroundings] for surroundings in around]
    kept = list(range(len(seen)))
    while (gone := _longest_loop([seen[n] for n in kept])) is not None:
        del kept[gone]
    place = {seen[n]: at for at, n in reversed(list(enumerate(kept)))}
    return ShortStack(tuple(kept), tuple(place[number] for number in seen))


def _longest_loop(seen: Sequence[int]) -> slice | None:
    """The most neighbouring layers that can go; None where all are needed."""
    for length in range(len(seen) - 1, 0, -1):
        for start in range(len(seen) - length):
            end = start + length
            if seen[start] == seen[end]:
                rest = {*seen[:start], *seen[end:]}
                if rest.issuperset(seen[start:end]):
                    return slice(start, end)
    return None


def likenesses_of(stack: Sequence[nn.Module], configs: Sequence[Any]) -> list[Hashable]:
    """What decides a layer's bytes, for each layer.

    Args:
        configs: whose lists with an entry a layer (``layer_types``) tell layers apart too.
    """
    lists = [values for config in configs for values in layer_lists(config, len(stack)).values()]
    shared = _seen_twice(stack)
    found: list[Hashable] = []
    trains = False  # in this layer or below it
    for number, layer in enumerate(stack):
        told = tuple(_described(values[number]) for values in lists)
        trains = trains or any(p.requires_grad for p in layer.parameters())
        found.append((_layer(layer, shared), told, trains))
    return found


def layer_lists(config: Any, layers: int) -> dict[str, list[Any]]:
    """A config's lists with an entry a layer, by name."""
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == layers > 1
    }


def _seen_twice(stack: Sequence[nn.Module]) -> set[int]:
    """Ids of the tensors that several layers have in common."""
    once: set[int] = set()
    twice: set[int] = set()
    for layer in stack:
        own = {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
        twice |= once & own
        once |= own
    return twice


def names_of_shared(stack: Sequence[nn.Module]) -> list[set[str]]:
    """For each layer the names of the tensors that other layers have as well."""
    twice = _seen_twice(stack)
    return [
        {
            name
            for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
            if id(tensor) in twice
        }
        for layer in stack
    ]


def _layer(layer: nn.Module, shared: set[int]) -> Hashable:
    return tuple(
        (
            name,
            type(module),
            tuple(
                (key, _described(value, shared))
                for key, value in sorted(vars(module).items())
                if key not in _BESIDE
            ),
        )
        for name, module in layer.named_modules()
    )


def _described(value: Any, shared: set[int] | None = None) -> Hashable:
    """A setting as such, a tensor by its shape and type, another object by its type."""
    if isinstance(value, Tensor):
        same = shared is not None and id(value) in shared
        return (tuple(value.shape), value.dtype, value.requires_grad, value.device.type, same)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    if isinstance(value, Mapping):
        keys = (key for key in value if key not in _PLACES)
        return tuple((str(key), _described(value[key], shared)) for key in keys)
    if isinstance(value, list | tuple):
        return tuple(_described(part, shared) for part in value)
    if isinstance(value, set | frozenset):
        return tuple(sorted(map(str, value)))
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return value.__qualname__
    # what a layer does with its activations (`qft.lean.checkpointing`)
    return (type(value), getattr(value, "choice", None))
