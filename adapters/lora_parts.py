"""Sorts the tensors of a LoRA folder, by PEFT's names, into what each of them does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.low_rank_merge import Parts
from adapters.low_rank_update import ChangedStart, Update
from adapters.peft_backed import module_name
from qft.errors import AdapterError

if TYPE_CHECKING:
    from qft.shards import StoredTensor

_FROZEN = ".original_module."  # what a module trained whole was before
_TOKENS = ".token_adapter.trainable_tokens_delta"
_FOLLOWS_FROM_WEIGHT = ("pissa", "olora")  # starts that can be made again from the base alone


def lora_parts(
    tensors: Mapping[str, StoredTensor], values: Mapping[str, Any], folder: Path
) -> Parts:
    """What the tensors of a LoRA folder do to which tensor of the base.

    Args:
        tensors: by PEFT's names.
        values: the folder's adapter_config.json.

    Raises:
        AdapterError: an update is not of the rank that the config says.
    """
    named = {module_name(n): t for n, t in tensors.items() if _FROZEN not in n}
    updates: dict[str, Update] = {}
    replaced: dict[str, StoredTensor] = {}
    rows: dict[str, tuple[Sequence[int], StoredTensor]] = {}
    shifts: dict[str, tuple[StoredTensor, float]] = {}
    for name, tensor in named.items():
        target, found, part = name.partition(".lora_")
        if found and (pair := _pair(named, target)):
            if part in ("B.weight", "embedding_B"):
                updates[f"{target}.weight"] = _update(target, pair, named, values, folder)
            elif part == "B.bias":
                scale = update_scale(target, *pair, values, folder)
                shifts[f"{target}.bias"] = (tensor, scale)
        elif name.endswith(_TOKENS):
            target = name.removesuffix(_TOKENS)
            rows[f"{target}.weight"] = (_token_rows(target, values), tensor)
        else:  # half an update is refused by the merge, by its name
            replaced[name.replace(".base_layer.", ".")] = tensor
    heads = frozenset(values.get("modules_to_save") or ())
    ties = bool(values.get("ensure_weight_tying"))
    return Parts(updates, replaced, rows, heads, shifts, ties)


_Pair = tuple["StoredTensor", "StoredTensor"]


def _pair(named: Mapping[str, StoredTensor], target: str) -> _Pair | None:
    """The up and the down of a layer, where both are there."""
    for up, down in (("B.weight", "A.weight"), ("embedding_B", "embedding_A")):
        if f"{target}.lora_{up}" in named and f"{target}.lora_{down}" in named:
            return named[f"{target}.lora_{up}"], named[f"{target}.lora_{down}"]
    return None


def _update(
    target: str,
    pair: _Pair,
    named: Mapping[str, StoredTensor],
    values: Mapping[str, Any],
    folder: Path,
) -> Update:
    up, down = pair
    magnitude = named.get(f"{target}.lora_magnitude_vector") or named.get(
        f"{target}.lora_magnitude_vector.weight"
    )
    lookup = f"{target}.lora_embedding_B" in named
    start = None
    if not lookup and values.get("init_lora_weights") in _FOLLOWS_FROM_WEIGHT:
        start = ChangedStart(
            str(values["init_lora_weights"]),
            _rank(target, values),
            _alpha(target, values),
            bool(values.get("use_rslora")),
        )
    scale = update_scale(target, up, down, values, folder)
    return Update(up, down, scale, magnitude, start=start, lookup=lookup)


def less_first(parts: Parts, first: Mapping[str, StoredTensor], folder: Path) -> Parts:
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
    target: str, up: StoredTensor, down: StoredTensor, values: Mapping[str, Any], folder: Path
) -> float:
    """What ``up @ down`` of a layer is multiplied with.

    Raises:
        AdapterError: the matrices are not of the rank that the config says.
    """
    rank = _rank(target, values)
    if len(up.shape) != 2 or len(down.shape) != 2 or not up.shape[1] == down.shape[0] == rank:
        raise AdapterError(
            "The adapter's weights are not of the rank that its config says.",
            where=f"{folder}: {target}",
            found=f"{list(up.shape)} and {list(down.shape)}, config {rank}",
        )
    return float(_alpha(target, values) / (rank**0.5 if values.get("use_rslora") else rank))


def _rank(target: str, values: Mapping[str, Any]) -> Any:
    return _by_pattern(target, values.get("rank_pattern"), values["r"])


def _alpha(target: str, values: Mapping[str, Any]) -> Any:
    return _by_pattern(target, values.get("alpha_pattern"), values["lora_alpha"])


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
