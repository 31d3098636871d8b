"""Folds low-rank updates into a base, tensor by tensor: LoRA's, DoRA's, AdaLoRA's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.peft_backed import module_name
from qft.errors import AdapterError
from qft.strategy import BaseTensors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Update:
    """What is added to one weight: ``scale · up @ down``.

    Attributes:
        up: ``[out, rank]``.
        down: ``[rank, in]``.
        magnitude: DoRA's, ``[out]``: the length every row of the sum gets.
    """

    up: Tensor
    down: Tensor
    scale: float
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Parts:
    """A low-rank adapter's tensors, sorted by what they do.

    Attributes:
        updates: by the weight's name.
        replaced: biases and heads.
        rows: by the embedding's name: which rows, and their new values.
        heads: names of modules that may be new or of another width than the base's.
    """

    updates: Mapping[str, Update]
    replaced: Mapping[str, Tensor]
    rows: Mapping[str, tuple[Sequence[int], Tensor]]
    heads: frozenset[str]


class LowRankMerge:
    """Adds each update to its weight; replaces biases, heads and embeddings' rows."""

    def __init__(
        self, parts: Parts, base: BaseTensors, folder: Path, *, transposed: bool,
        keep_zeros: bool = False,
    ) -> None:  # fmt: skip
        self._parts, self._folder = parts, folder
        self._transposed, self._keep_zeros = transposed, keep_zeros
        self._shapes = {name: base.shape(name) for name in base.names()}
        for name, update in parts.updates.items():
            shape = (update.up.shape[0], update.down.shape[1])
            self._require(name, shape[::-1] if transposed else shape)
        for name, tensor in parts.replaced.items():
            if "lora_" in name:
                raise AdapterError("The adapter holds half an update.", where=folder, found=name)
            if not parts.heads & set(name.split(".")):
                self._require(name, tuple(tensor.shape))
        for name, (places, rows) in parts.rows.items():
            found = self._shapes.get(name, ())
            if len(found) != 2 or found[1] != rows.shape[1] or max(places) >= found[0]:
                raise self._another_base(name, tuple(rows.shape))

    def _require(self, name: str, shape: tuple[int, ...]) -> None:
        if self._shapes.get(name) != shape:
            raise self._another_base(name, shape)

    def _another_base(self, name: str, shape: tuple[int, ...]) -> AdapterError:
        return AdapterError(
            "The adapter was made for another base model.",
            where=f"{self._folder}: {name}",
            found=f"adapter {shape}, base {self._shapes.get(name) or 'has no such tensor'}",
            fix="name the base model it was trained on",
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a merged tensor."""
        if name in self._parts.replaced:
            return tuple(self._parts.replaced[name].shape)
        return self._shapes[name]

    def edit(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor`` itself, or the merged one in float32."""
        if name in self._parts.replaced:
            return self._parts.replaced[name]
        if name in self._parts.rows:
            places, rows = self._parts.rows[name]
            changed = tensor.float().clone()
            changed[list(places)] = rows.float()
            return changed
        update = self._parts.updates.get(name)
        if update is None:
            return tensor
        delta = (update.up.float() @ update.down.float()) * update.scale
        delta = delta.T if self._transposed else delta
        if self._keep_zeros:
            delta.masked_fill_(tensor == 0, 0)
        merged = tensor.float() + delta
        if update.magnitude is None:
            return merged
        along = 0 if self._transposed else 1  # each output's weights
        length = merged.norm(dim=along, keepdim=True)
        stretched: Tensor = merged * (update.magnitude.float().reshape(length.shape) / length)
        return stretched

    def added(self) -> Mapping[str, Tensor]:
        """A trained head, trained biases."""
        return self._parts.replaced

    def config_changes(self) -> Mapping[str, Any]:
        """None: the model keeps its shape."""
        return {}


def lora_parts(
    tensors: Mapping[str, Tensor], values: Mapping[str, Any], rank_stabilised: bool, folder: Path
) -> Parts:
    """Sorts the tensors of a LoRA folder by PEFT's names.

    Args:
        values: its adapter_config.json.

    Raises:
        AdapterError: an update is not of the rank that the config says.
    """
    named = {module_name(name): tensor for name, tensor in tensors.items()}
    updates, replaced, rows = {}, {}, {}
    for name, tensor in named.items():
        target, found, part = name.partition(".lora_")
        if found and part == "B.weight" and f"{target}.lora_A.weight" in named:
            down = named[f"{target}.lora_A.weight"]
            scale = _scale(target, tensor, down, values, rank_stabilised, folder)
            magnitude = named.get(f"{target}.lora_magnitude_vector")
            updates[f"{target}.weight"] = Update(tensor, down, scale, magnitude)
        elif name.endswith(".token_adapter.trainable_tokens_delta"):
            target = name.removesuffix(".token_adapter.trainable_tokens_delta")
            rows[f"{target}.weight"] = (_token_rows(target, values), tensor)
        elif not found or f"{target}.lora_B.weight" not in named or part == "embedding_A":
            replaced[name.replace(".base_layer.", ".")] = tensor
        elif part == "A.weight" or part == "magnitude_vector":
            continue
        else:
            replaced[name] = tensor  # refused by the merge, by its name
    heads = frozenset(values.get("modules_to_save") or ())
    return Parts(updates, replaced, rows, heads)


def less_first(parts: Parts, first: Mapping[str, Tensor], folder: Path) -> Parts:
    """Parts without what LoftQ began with: the original base has lost nothing to a quantization.

    ``s B A - s B0 A0`` is ``s [B, -B0] [A; A0]``.

    Raises:
        AdapterError: the first update is another adapter's.
    """
    import torch

    updates = dict(parts.updates)
    downs = {module_name(n): t for n, t in first.items() if n.endswith(".lora_A.weight")}
    ups = {module_name(n): t for n, t in first.items() if n.endswith(".lora_B.weight")}
    for name, down in downs.items():
        target = name.removesuffix(".lora_A.weight")
        update, up = updates.get(f"{target}.weight"), ups.get(f"{target}.lora_B.weight")
        if update is None or up is None or (update.up.shape, update.down.shape) != (
            up.shape, down.shape,
        ):  # fmt: skip
            raise AdapterError("What the adapter began with belongs to another adapter.",
                               where=folder, found=name)  # fmt: skip
        updates[f"{target}.weight"] = replace(
            update,
            up=torch.cat([update.up.float(), -up.float()], dim=1),
            down=torch.cat([update.down.float(), down.float()], dim=0),
        )
    return replace(parts, updates=updates)


def _scale(
    target: str,
    up: Tensor,
    down: Tensor,
    values: Mapping[str, Any],
    rank_stabilised: bool,
    folder: Path,
) -> float:
    rank = _by_pattern(target, values.get("rank_pattern"), values["r"])
    if not up.shape[1] == down.shape[0] == rank:
        raise AdapterError(
            "The adapter's weights are not of the rank that its config says.",
            where=f"{folder}: {target}",
            found=f"{up.shape[1]} and {down.shape[0]}, config {rank}",
        )
    alpha = _by_pattern(target, values.get("alpha_pattern"), values["lora_alpha"])
    return float(alpha / (rank**0.5 if rank_stabilised else rank))


def _by_pattern(target: str, pattern: Mapping[str, Any] | None, otherwise: Any) -> Any:
    """PEFT's patterns are regular expressions on the end of a module's name."""
    for expression, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({expression})$", target):
            return value
    return otherwise


def _token_rows(target: str, values: Mapping[str, Any]) -> Sequence[int]:
    indices = values["trainable_token_indices"]
    if isinstance(indices, dict):
        return next(v for k, v in indices.items() if target == k or target.endswith(f".{k}"))  # type: ignore[no-any-return]
    return indices  # type: ignore[no-any-return]
