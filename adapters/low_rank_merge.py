"""Folds low-rank updates into a base, block by block: LoRA's, DoRA's, AdaLoRA's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.peft_backed import module_name
from qft.errors import AdapterError
from qft.strategy import BaseTensors, Rows

if TYPE_CHECKING:
    from torch import Tensor

    from qft.shards import StoredTensor


_MANY_ROWS = 64


@dataclass(frozen=True)
class Update:
    """What is added to one weight: ``scale · up @ down``, read when its turn has come.

    Attributes:
        up: ``[out, rank]``.
        down: ``[rank, in]``.
        magnitude: DoRA's, ``[out]``: the length every row of the sum gets.
        gain: AdaLoRA's, ``[rank, 1]``: what each row of ``down`` is multiplied with.
        first: what LoftQ began with, an up and a down, whose product is taken off again.
    """

    up: Rows
    down: Rows
    scale: float
    magnitude: Rows | None = None
    gain: Rows | None = None
    first: tuple[Rows, Rows] | None = None

    def read_down(self) -> Tensor:
        """All of the right factor, float32, ``[rank, in]``."""
        import torch

        down = self.down[:].float()
        if self.gain is not None:
            down = (self.down[:] * self.gain[:]).float()
        return down if self.first is None else torch.cat([down, self.first[1][:].float()])

    def read_up(self, rows: slice) -> Tensor:
        """Some rows of the left factor, float32, ``[rows, rank]``."""
        import torch

        up = self.up[rows].float()
        return up if self.first is None else torch.cat([up, -self.first[0][rows].float()], dim=1)


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
    replaced: Mapping[str, Rows]
    rows: Mapping[str, tuple[Sequence[int], Rows]]
    heads: frozenset[str]


@dataclass(frozen=True)
class _Held:
    """What is kept while a weight's blocks are merged: small beside the weight."""

    name: str
    down: Tensor
    stretch: Tensor | None = None


class LowRankMerge:
    """Adds each update to its weight; replaces biases, heads and embeddings' rows."""

    def __init__(
        self, parts: Parts, base: BaseTensors, folder: Path, *, transposed: bool,
        keep_zeros: bool = False,
    ) -> None:  # fmt: skip
        self._parts, self._base, self._folder = parts, base, folder
        self._held: _Held | None = None  # of the weight whose blocks are being merged
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

    def edit(self, name: str, rows: Tensor, start: int = 0) -> Tensor:
        """``rows`` themselves, or the merged ones in float32."""
        if name in self._parts.replaced:
            return self._parts.replaced[name][start : start + len(rows)]
        if name in self._parts.rows:
            return self._with_own_rows(name, rows, start)
        update = self._parts.updates.get(name)
        if update is None:
            return rows
        end = start + len(rows)
        if self._held is None or self._held.name != name:
            self._held = None  # frees the weight before
            self._held = self._hold(name, update)
        delta = self._delta(name, update, start, end)
        if self._keep_zeros:
            delta.masked_fill_(rows == 0, 0)
        merged = delta.add_(rows)  # in float32
        if update.magnitude is None:
            return merged
        if self._held.stretch is not None:
            return merged.mul_(self._held.stretch)
        length = merged.norm(dim=1, keepdim=True)
        return merged.mul_(update.magnitude[start:end].float().reshape(length.shape) / length)

    def _delta(self, name: str, update: Update, start: int, end: int) -> Tensor:
        """``scale · up @ down`` for some rows of the stored weight, ``[end - start, …]``.

        A matrix product of a few rows adds up in another order than one of many, and a merge must
        not depend on where its blocks end: of few rows, neighbours are computed too.
        """
        assert self._held is not None
        low = max(0, min(start, self._shapes[name][0] - _MANY_ROWS))
        high = max(end, min(low + _MANY_ROWS, self._shapes[name][0]))
        down = self._held.down
        if self._transposed:
            delta = (update.read_up(slice(None)) @ down[:, low:high]).T
        else:
            delta = update.read_up(slice(low, high)) @ down
        return delta[start - low : end - low].mul_(update.scale)

    def _hold(self, name: str, update: Update) -> _Held:
        """What all blocks of a weight need."""
        down = update.read_down()
        if update.magnitude is None or not self._transposed:
            return _Held(name, down)
        return _Held(name, down, self._stretch(name, update, down))

    def _stretch(self, name: str, update: Update, down: Tensor) -> Tensor:
        """What DoRA multiplies each output of a transposed weight with, ``[1, out]``.

        An output's weights are a column there, so that their length needs every row: read by
        columns before the first block of rows is merged.
        """
        import torch

        from qft.shards import row_blocks

        assert update.magnitude is not None
        height, width = self._shapes[name]
        stretch = torch.empty(width)
        for block in row_blocks((width, height)):
            merged = self._base.read_columns(name, range(block.start, block.stop)).float()
            merged += (update.read_up(block) @ down).mul_(update.scale).T
            stretch[block] = update.magnitude[block].float() / merged.norm(dim=0)
        return stretch[None]

    def _with_own_rows(self, name: str, rows: Tensor, start: int) -> Tensor:
        places, own = self._parts.rows[name]
        here = [(at, place - start) for at, place in enumerate(places)
                if start <= place < start + rows.shape[0]]  # fmt: skip
        if not here:
            return rows
        changed = rows.float()
        changed = changed.clone() if changed is rows else changed
        for at, place in here:
            changed[place] = own[at : at + 1][0].float()
        return changed

    def added(self) -> Mapping[str, Rows]:
        """A trained head, trained biases."""
        return self._parts.replaced

    def config_changes(self) -> Mapping[str, Any]:
        """None: the model keeps its shape."""
        return {}


def lora_parts(
    tensors: Mapping[str, StoredTensor],
    values: Mapping[str, Any],
    rank_stabilised: bool,
    folder: Path,
) -> Parts:
    """Sorts the tensors of a LoRA folder by PEFT's names.

    Args:
        values: its adapter_config.json.

    Raises:
        AdapterError: an update is not of the rank that the config says.
    """
    named = {module_name(name): tensor for name, tensor in tensors.items()}
    updates: dict[str, Update] = {}
    replaced: dict[str, Rows] = {}
    rows: dict[str, tuple[Sequence[int], Rows]] = {}
    for name, tensor in named.items():
        target, found, part = name.partition(".lora_")
        if found and part == "B.weight" and f"{target}.lora_A.weight" in named:
            down = named[f"{target}.lora_A.weight"]
            scale = update_scale(target, tensor, down, values, folder)
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


def less_first(parts: Parts, first: Mapping[str, Rows], folder: Path) -> Parts:
    """Parts without what LoftQ began with: the original base has lost nothing to a quantization.

    ``s B A - s B0 A0`` is ``s [B, -B0] [A; A0]``.

    Raises:
        AdapterError: the first update is another adapter's.
    """
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
        updates[f"{target}.weight"] = replace(update, first=(up, down))
    return replace(parts, updates=updates)


def update_scale(
    target: str, up: Rows, down: Rows, values: Mapping[str, Any], folder: Path
) -> float:
    """What ``up @ down`` of a layer is multiplied with.

    Raises:
        AdapterError: the matrices are not of the rank that the config says.
    """
    rank = _by_pattern(target, values.get("rank_pattern"), values["r"])
    if not up.shape[1] == down.shape[0] == rank:
        raise AdapterError(
            "The adapter's weights are not of the rank that its config says.",
            where=f"{folder}: {target}",
            found=f"{up.shape[1]} and {down.shape[0]}, config {rank}",
        )
    alpha = _by_pattern(target, values.get("alpha_pattern"), values["lora_alpha"])
    return float(alpha / (rank**0.5 if values.get("use_rslora") else rank))


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
