"""What stays of a model: layers, neurons, heads, hidden channels; and the config that says so."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qft import models
from qft.errors import ModelError
from qft.pruning.anatomy import Anatomy, Dimension, Piece, Sizes

Kept = tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """What stays; empty mappings and None mean all of it.

    Attributes:
        layers: numbers of the layers that stay, in order.
        neurons: by layer, the MLP neurons that stay, in order.
        groups: by layer, the key-value groups that stay, in order.
        hidden: the hidden channels that stay, in order; the same in every layer.
    """

    layers: Kept
    neurons: Mapping[int, Kept] = field(default_factory=dict)
    groups: Mapping[int, Kept] = field(default_factory=dict)
    hidden: Kept | None = None

    @property
    def only_layers(self) -> bool:
        """Whether only layers go."""
        return not self.neurons and not self.groups and self.hidden is None

    def sizes(self, before: Sizes) -> Sizes:
        """The sizes of what stays."""
        any_layer = self.layers[0]
        groups = len(self.groups[any_layer]) if self.groups else before.groups
        return Sizes(
            layers=len(self.layers),
            neurons=len(self.neurons[any_layer]) if self.neurons else before.neurons,
            heads=groups * (before.heads // max(before.groups, 1)),
            groups=groups,
            head_size=before.head_size,
            hidden=before.hidden if self.hidden is None else len(self.hidden),
        )

    def indices(
        self, dimension: Dimension | None, layer: int | None, sizes: Sizes
    ) -> Tensor | None:
        """The positions that stay along an axis; None where all do."""
        if dimension == "hidden":
            return None if self.hidden is None else torch.tensor(self.hidden)
        if layer is None or dimension is None:
            return None
        if dimension == "neurons":
            kept = self.neurons.get(layer)
            return None if kept is None else torch.tensor(kept)
        groups = self.groups.get(layer)
        if groups is None:
            return None
        width = sizes.of(dimension) // sizes.groups  # channels of one group
        return torch.cat([torch.arange(g * width, (g + 1) * width) for g in groups])

    def apply(self, anatomy: Anatomy, piece: Piece, tensor: Tensor) -> Tensor:
        """What stays of a tensor."""
        if self.only_layers or (piece.layer is None and self.hidden is None):
            return tensor
        axes = anatomy.axes(piece, tuple(tensor.shape))
        for axis, dimension in enumerate(axes):
            kept = self.indices(dimension, piece.layer, anatomy.sizes)
            if kept is not None:
                tensor = tensor.index_select(axis, kept)
        return tensor.contiguous()


def pruned_shape(
    anatomy: Anatomy, piece: Piece, shape: tuple[int, ...], after: Sizes
) -> tuple[int, ...]:
    """The shape a tensor of a layer that stays has in a model of other sizes."""
    before = anatomy.sizes
    if replace(after, layers=before.layers) == before:
        return shape
    if piece.layer is None and after.hidden == before.hidden:
        return shape
    axes = anatomy.axes(piece, shape)
    pairs = zip(axes, shape, strict=True)
    return tuple(n if dimension is None else after.of(dimension) for dimension, n in pairs)


def pruned_config(anatomy: Anatomy, cut: Cut) -> dict[str, Any]:
    """The config.json of what stays.

    Lists with an entry a layer lose those of the layers that go; a pattern of sliding windows that
    the family derives from the layers' numbers is written out.
    """
    values = dict(anatomy.config)
    resolved: Any = anatomy.skeleton.config
    before = anatomy.sizes.layers
    if len(cut.layers) < before:
        types = getattr(resolved, "layer_types", None)
        if isinstance(types, list) and len(types) == before and len(set(types)) > 1:
            values["layer_types"] = list(types)
        for key, value in values.items():
            if "layer" in key and isinstance(value, list) and len(value) == before:
                values[key] = [value[number] for number in cut.layers]
        if isinstance(values.get("max_window_layers"), int):
            limit = values["max_window_layers"]
            values["max_window_layers"] = sum(number < limit for number in cut.layers)
        values[_key(resolved, "num_hidden_layers")] = len(cut.layers)
    after = cut.sizes(anatomy.sizes)
    if cut.neurons:
        values[_key(resolved, "intermediate_size")] = after.neurons
    if cut.groups:
        values[_key(resolved, "num_attention_heads")] = after.heads
        if hasattr(resolved, "num_key_value_heads"):
            values["num_key_value_heads"] = after.groups
    if cut.hidden is not None:
        values[_key(resolved, "hidden_size")] = after.hidden
    if not cut.only_layers and after.heads and after.hidden != after.heads * after.head_size:
        values["head_dim"] = after.head_size
    return values


def _key(config: Any, name: str) -> str:
    """What config.json calls it: GPT-2 has ``n_layer`` for ``num_hidden_layers``."""
    return str(getattr(config, "attribute_map", {}).get(name, name))


def cannot_be_said(
    anatomy: Anatomy, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Why transformers would not build a model of these shapes from this config; None if it does.

    Args:
        shapes: module name → shape of every tensor that is to be written.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
        try:
            skeleton = models.open_skeleton(folder, anatomy.spec)
        except Exception as error:  # a family's config refuses in ways of its own
            return " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
    state = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    known = set(anatomy.skeleton.state_dict())
    for name, shape in shapes.items():
        if name in known and state.get(name) != shape:
            return f"{name} would have the shape {list(state.get(name, ()))}, not {list(shape)}"
    return None


def require_sayable(
    anatomy: Anatomy, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuses a cut that this family's config has no words for.

    Raises:
        ModelError: transformers would build another model from the config.
    """
    reason = cannot_be_said(anatomy, config, shapes)
    if reason is not None:
        raise ModelError(
            "This family's config cannot describe the pruned model.",
            where=f"{anatomy.folder}: {anatomy.config.get('model_type')}",
            found=reason,
            fix="prune other dimensions, such as --width mlp, or --method depth",
        )


def all_layers(count: int) -> Kept:
    """Every layer's number."""
    return tuple(range(count))


def without(count: int, removed: Sequence[int]) -> Kept:
    """The numbers of the layers that stay where ``removed`` go."""
    gone = set(removed)
    return tuple(number for number in range(count) if number not in gone)
