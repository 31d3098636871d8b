"""Several (IA)³ folders combined: the weighted sum of their vectors, as in PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.combined_folder import heads, joined_names, open_folders, write_folder
from qft.errors import AdapterError
from qft.lean.combining import Combination
from qft.shards import StoredTensor, row_blocks

if TYPE_CHECKING:
    from torch import Tensor

    from qft.shard_writer import Spec


def combine_ia3(folders: Sequence[Path], how: Combination, out: Path) -> None:
    """Writes one (IA)³ folder for several.

    A layer that only some of them scale gets their weighted sum alone, so that its weights should
    be 1 there: this is PEFT's way.

    Raises:
        AdapterError: another method than linear, or adapters that do not fit together.
    """
    import torch

    if how.method != "linear":
        raise AdapterError(
            "Vectors that scale a layer can only be added.",
            where="--method",
            found=how.method,
            fix="--method linear, or merge them into the base's weights: --space weights",
        )
    sources = open_folders(folders, "IA3")
    kept = heads(sources, "ia3_l")
    held: dict[str, list[tuple[float, StoredTensor]]] = {}
    for source, weight in zip(sources, how.weights, strict=True):
        for name, tensor in source.tensors.items():
            if name not in kept:
                held.setdefault(name, []).append((weight, tensor))
    for name, parts in held.items():
        shapes = sorted({tensor.shape for _, tensor in parts})
        if len(shapes) > 1:
            raise AdapterError("The adapters were made for different base models.", where=name,
                               found=" and ".join(map(str, shapes)))  # fmt: skip

    def produce(name: str) -> Iterator[Tensor]:
        if name in kept:
            yield from (kept[name][part] for part in row_blocks(kept[name].shape))
            return
        parts = held[name]
        total = torch.zeros(parts[0][1].shape)
        for weight, tensor in parts:
            total += tensor.read().float() * weight
        yield total

    specs: list[Spec] = [(name, tensor.shape, tensor.dtype) for name, tensor in kept.items()]
    specs += [(name, held[name][0][1].shape, torch.float32) for name in sorted(held)]
    values = {**sources[0].values, **{
        key: joined_names(sources, key) for key in ("target_modules", "feedforward_modules")
    }, "modules_to_save": joined_names(sources, "modules_to_save") or None}  # fmt: skip
    write_folder(out, values, specs, produce)
