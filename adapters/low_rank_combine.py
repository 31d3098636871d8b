"""Several LoRA folders combined on their factors: what PEFT's ``add_weighted_adapter`` makes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.combined_folder import Source, heads, joined_names, open_folders, write_folder
from adapters.lora_parts import update_scale
from adapters.lora_start import CHANGES_BASE, FIRST_FILE
from adapters.low_rank_factors import Factors, concatenated, decomposed
from adapters.peft_backed import module_name
from adapters.zero_keeping import MARK
from qft.errors import AdapterError
from qft.lean.combining import Combination, add_up, kept_at_random, kept_largest
from qft.shards import row_blocks

if TYPE_CHECKING:
    from torch import Tensor

    from qft.shard_writer import Spec

# A layer's two factors by the ends of PEFT's names: a linear layer's, an embedding's.
_PAIRS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
_NO_FACTORS = ("use_dora", "trainable_token_indices", "lora_bias", "target_parameters", MARK)


Layers = Mapping[str, Sequence[Factors]]  # by the name of the down factor


def combine_lora(folders: Sequence[Path], how: Combination, out: Path) -> None:
    """Writes one LoRA folder for several; one layer's tensors at a time are in memory.

    Raises:
        AdapterError: these adapters cannot be combined by this method.
    """
    sources = open_folders(folders, "LORA")
    _refuse_more_than_factors(sources)
    if len(sources) == 1:  # as in PEFT: alone there is nothing to agree with
        how = Combination(how.weights)
    layers = _layers(sources)
    rank = _rank(sources, layers, how)
    kept = heads(sources, "lora_")
    specs: list[Spec] = [(name, tensor.shape, tensor.dtype) for name, tensor in kept.items()]
    specs += _specs(layers, rank)
    waiting: dict[str, Tensor] = {}  # the up factor that was computed with the down before it

    def produce(name: str) -> Iterator[Tensor]:
        if name in kept:
            yield from (kept[name][part] for part in row_blocks(kept[name].shape))
        elif name in layers:
            down, waiting[up_name(name)] = _combined(name, layers[name], how, rank)
            yield down
        else:
            yield waiting.pop(name)

    write_folder(out, _config(sources, rank), specs, produce)


def up_name(down: str) -> str:
    """The name of the other factor."""
    end = next(end for end in _PAIRS if down.endswith(end))
    return down.removesuffix(end) + _PAIRS[end]


def _refuse_more_than_factors(sources: Sequence[Source]) -> None:
    for source in sources:
        held = [key for key in _NO_FACTORS if source.values.get(key)]
        held += ["bias"] if source.values.get("bias", "none") != "none" else []
        start = source.values.get("init_lora_weights")
        held += [f"a start by {start}"] if start in CHANGES_BASE else []
        held += ["what LoftQ began with"] if (source.folder / FIRST_FILE).exists() else []
        if held:
            raise AdapterError(
                "An adapter is more than a sum of factors.",
                where=source.folder,
                found=", ".join(held),
                fix="merge them into the base's weights: --space weights",
            )


def _layers(sources: Sequence[Source]) -> dict[str, list[Factors]]:
    """Each layer's updates; heads and what else is no factor are left out."""
    import torch

    layers: dict[str, list[Factors]] = {}
    for number, source in enumerate(sources):
        for name, down in source.tensors.items():
            end = next((end for end in _PAIRS if name.endswith(end)), None)
            if end is None:
                continue
            target = module_name(name.removesuffix(end))
            up = source.tensors.get(up_name(name))
            if up is None or len(down.shape) != 2 or len(up.shape) != 2:
                raise AdapterError("An update is not two matrices.",
                                   where=source.folder, found=name)  # fmt: skip
            scale = update_scale(target, up, down, source.values, source.folder)
            layers.setdefault(name, []).append(Factors(number, down, up, scale))
    for name, updates in layers.items():
        shapes = {torch.Size((u.up.shape[0], u.down.shape[1])) for u in updates}
        if len(shapes) > 1:
            raise AdapterError("The adapters were made for different base models.", where=name,
                               found=" and ".join(str(tuple(s)) for s in shapes))  # fmt: skip
    return dict(sorted(layers.items()))


def _rank(sources: Sequence[Source], layers: Layers, how: Combination) -> int:
    """The result's rank, of every layer.

    Raises:
        AdapterError: factors are to be added, and the ranks differ.
    """
    ranks = [_largest_rank(source.values) for source in sources]
    if how.method == "cat":
        return sum(ranks)
    if how.svd:
        return how.svd_rank or max(ranks)
    beside = [ranks, *([u.down.shape[0] for u in updates] for updates in layers.values())]
    differing = next((found for found in beside if len(set(found)) > 1), None)
    if differing:
        raise AdapterError(
            f"{how.method!r} adds factor to factor, and the adapters' ranks differ.",
            where="--method",
            found=" and ".join(map(str, differing)),
            fix="cat or svd, or merge them into the base's weights: --space weights",
        )
    return ranks[0]


def _largest_rank(values: Mapping[str, Any]) -> int:
    ranks: list[int] = [values["r"], *(values.get("rank_pattern") or {}).values()]
    return max(ranks)


def _specs(layers: Layers, rank: int) -> Iterator[Spec]:
    import torch

    for name, updates in layers.items():
        yield name, (rank, updates[0].down.shape[1]), torch.float32
        yield up_name(name), (updates[0].up.shape[0], rank), torch.float32


def _config(sources: Sequence[Source], rank: int) -> dict[str, Any]:
    """The first adapter's, with a scale of 1 and what any of them targets.

    PEFT leaves ``use_rslora`` on, which multiplies its result by the root of the rank.
    """
    return {
        **sources[0].values,
        "r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
        "layers_to_transform": None, "layers_pattern": None,
        "target_modules": _targets(sources),
        "modules_to_save": joined_names(sources, "modules_to_save") or None,
    }  # fmt: skip


def _targets(sources: Sequence[Source]) -> str | list[str]:
    """The union of the settings; whole names where some hold only for some layers."""
    if not any(source.values.get("layers_to_transform") is not None for source in sources):
        return joined_names(sources, "target_modules")
    names = {module_name(name) for source in sources for name in source.tensors}
    return sorted({n.removesuffix(end) for n in names for end in _PAIRS if n.endswith(end)})


def _combined(
    name: str, updates: Sequence[Factors], how: Combination, rank: int
) -> tuple[Tensor, Tensor]:
    """The combined down and up factor of a layer, filled up with zeros to ``rank``."""
    if how.svd:
        down, up = decomposed(name, updates, how, rank)
    elif how.method == "cat":
        down, up = concatenated(updates, how)
    else:
        down, up = _added(name, updates, how)
    return _widened(down, rank, 0), _widened(up, rank, 1)


def _added(name: str, updates: Sequence[Factors], how: Combination) -> tuple[Tensor, Tensor]:
    """Down added to down and up to up: each carries the root of its weight, one its sign."""
    downs, ups = zip(*(update.read() for update in updates), strict=True)
    weights = [how.weights[update.number] * update.scale for update in updates]
    roots = [math.sqrt(abs(weight)) for weight in weights]
    signed = [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
    numbers = [update.number for update in updates]
    return (
        add_up(_sparse(downs, numbers, how, name), signed, how),
        add_up(_sparse(ups, numbers, how, up_name(name)), roots, how),
    )


def _sparse(
    parts: Sequence[Tensor], numbers: Sequence[int], how: Combination, name: str
) -> list[Tensor]:
    """What density leaves of each adapter's factor."""
    density = how.density or 1.0
    if how.by_magnitude:
        return [kept_largest(part, density) for part in parts]
    if how.at_random:
        return [kept_at_random(part, density, how.key(number, name))
                for number, part in zip(numbers, parts, strict=True)]  # fmt: skip
    return list(parts)


def _widened(factor: Tensor, rank: int, along: int) -> Tensor:
    import torch

    missing = rank - factor.shape[along]
    if not missing:
        return factor.contiguous()
    shape = list(factor.shape)
    shape[along] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim=along)
