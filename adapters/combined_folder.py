"""Several adapter folders of PEFT's become one: what every kind shares. Streamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.peft_backed import CONFIG_FILE, WEIGHTS_FILE, read_config, stored_tensors
from qft.errors import AdapterError
from qft.shard_writer import Spec, write_shards
from qft.shards import SINGLE, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

_ALIKE = ("task_type", "fan_in_fan_out")  # settings that all must have in common
_ONE_FILE = 2**63


@dataclass(frozen=True)
class Source:
    """One of the adapters.

    Attributes:
        values: its adapter_config.json.
        tensors: by PEFT's name, each in its file until it is read.
    """

    folder: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def open_folders(folders: Sequence[Path], peft_type: str) -> list[Source]:
    """Opens the adapters, none of their tensors.

    Raises:
        AdapterError: one is of another kind, or was made for another task or layer layout.
    """
    sources = []
    for folder in folders:
        values = read_config(folder, peft_type)
        if values is None:
            raise AdapterError(
                "Adapters of different kinds cannot become one adapter.",
                where=folder,
                found=f"it is no {peft_type}, the first one is",
                fix="merge them into the base's weights: --space weights",
            )
        sources.append(Source(folder, values, stored_tensors(folder)))
    for key in _ALIKE:
        found = {str(source.values.get(key) or None) for source in sources}
        if len(found) > 1:
            raise AdapterError("The adapters differ in what they must share.",
                               where=key, found=", ".join(sorted(found)))  # fmt: skip
    return sources


def joined_names(sources: Sequence[Source], key: str) -> str | list[str]:
    """What any of them targets: PEFT's union of names, or alternatives of expressions."""
    held = [source.values.get(key) or [] for source in sources]
    if all(isinstance(names, str) for names in held):
        return "|".join(f"({names})" for names in held)
    if any(isinstance(names, str) for names in held):
        raise AdapterError(
            "One adapter names its layers, another has an expression for them.",
            where=key,
            found="; ".join(str(names)[:80] for names in held),
            fix="merge them into the base's weights: --space weights",
        )
    return sorted({name for names in held for name in names})


def heads(sources: Sequence[Source], mark: str) -> dict[str, StoredTensor]:
    """Tensors of modules that were trained whole: those without ``mark`` in their names.

    Raises:
        AdapterError: two adapters hold the same module; there is no sum of two heads as factors.
    """
    found: dict[str, StoredTensor] = {}
    for source in sources:
        for name, tensor in source.tensors.items():
            if mark in name:
                continue
            if name in found:
                raise AdapterError(
                    "Two of the adapters trained the same module as a whole.",
                    where=source.folder,
                    found=name,
                    fix="merge them into the base's weights: --space weights",
                )
            found[name] = tensor
    return found


def write_folder(
    out: Path,
    values: Mapping[str, Any],
    specs: Sequence[Spec],
    produce: Callable[[str], Iterable[Tensor]],
) -> None:
    """Writes PEFT's two files; one tensor at a time is in memory."""
    write_shards(out, specs, produce, max_shard_bytes=_ONE_FILE)
    (out / SINGLE).rename(out / WEIGHTS_FILE)
    text = json.dumps({**values, "inference_mode": True}, indent=2, sort_keys=True)
    (out / CONFIG_FILE).write_text(text, encoding="utf-8")
