"""Base ⊕ adapter = a model folder that needs neither.

The base's tensors come from its safetensors files one at a time, pass through the strategy's
:class:`qft.strategy.Merge` and go straight to the new files. A merged value is computed in float32
and rounded once, to the dtype it is stored in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qft import models
from qft.errors import AdapterError
from qft.files import folder_bytes, new_folder, require_absent, require_disk, unfinished
from qft.hardware import versions
from qft.lean.model_parts import transposed_weights
from qft.merging.rounded_base import BaseCheckpoint, RoundedBase, Rounding
from qft.merging.side_files import copy_files, files_bytes, side_files
from qft.merging.stored_base import open_stored
from qft.merging.tensors import MergedTensors, ModuleTensors, TensorSource
from qft.merging.tied import fit_config, rebuilt, require_complete, tied_as_stored
from qft.shard_writer import MAX_SHARD_BYTES, write_shards
from qft.shards import ShardedCheckpoint, tensor_bytes
from qft.strategy import Merge, Strategy
from qft.write_journal import WriteJournal

Progress = Callable[[int], None]  # called with the bytes just done

_HEAD_KEYS = ("id2label", "label2id", "problem_type", "qft_pooling")
_HEADER_SLACK_BYTES = 4 * 2**20


def open_source(
    base: Path,
    skeleton: nn.Module,
    *,
    adapter: Path | None = None,
    strategy: Strategy | None = None,
    dtype: torch.dtype | None = None,
    rounding: Rounding | None = None,
) -> MergedTensors:
    """Opens a model folder, or a base with an adapter on it, for merge or export.

    Args:
        base: folder of the model; what is stored quantized is dequantized while it is read.
        skeleton: the model on the meta device as the task wants it, from
            :func:`qft.models.open_skeleton`.
        adapter: a saved adapter's folder.
        strategy: rebuilt from it.
        dtype: of the floating tensors; None keeps each one's own.
        rounding: how training quantized an unquantized base, where the adapter is to be folded
            into what training saw; None takes the weights as they are stored.

    Raises:
        ModelError: the base is broken, or stored quantized by another than bitsandbytes.
        AdapterError: the adapter is for another base, or cannot be merged.
    """
    if adapter is not None:
        if strategy is None:
            raise AdapterError("An adapter cannot be opened without its strategy.", where=adapter)
        require_mergeable(strategy, adapter)
    config = models.read_config(base)
    names = models.module_names(base, skeleton)
    checkpoint = _open_base(base, config, skeleton, names, rounding)
    held = set(checkpoint.names())
    names = {name: module for name, module in names.items() if name in held}
    if adapter is not None:
        names = _used(names, skeleton, config)
    tied = kept = tied_as_stored(skeleton, names, checkpoint)
    merge: Merge | None = None
    tensors = ModuleTensors(checkpoint, names, tied, transposed_weights(skeleton))
    if adapter is not None:
        assert strategy is not None
        merge = strategy.open_merge(adapter, tensors)
    written = _merged_config(config, skeleton, merge, dtype)
    if merge is not None:
        require_complete(skeleton, names, tied, merge)
        written, kept = fit_config(written, skeleton, names, tied, merge, tensors)
    return MergedTensors(
        checkpoint,
        names,
        merge,
        tied=kept,
        twins={absent: present for absent, present in tied.items() if absent not in kept},
        dtype=dtype,
        config=written,
        files=side_files(base, adapter),
        sources=strategy.files(adapter) if adapter and strategy else (),
        settings=repr(strategy),
    )


def _used(
    names: Mapping[str, str], skeleton: nn.Module, config: Mapping[str, Any]
) -> dict[str, str]:
    """What the merged model has a module for, where it is of another class than the base.

    A classifier made of a language model has no use for that one's head; what a model of the same
    class does not know either (layers for another runtime) is kept.
    """
    if config.get("architectures") == [type(skeleton).__name__]:
        return dict(names)
    known = rebuilt(skeleton, {}).state_dict()  # with a pooler that pooling does without
    prefix = str(getattr(skeleton, "base_model_prefix", ""))
    return {
        name: module
        for name, module in names.items()
        if module in known or f"{prefix}.{module}" in known
    }


def require_mergeable(strategy: Strategy, adapter: Path) -> None:
    """Raises AdapterError where a strategy changes no weights of the base."""
    if not strategy.mergeable:
        raise AdapterError(
            f"What the strategy {strategy.name!r} trains cannot be folded into the base's tensors.",
            where=adapter,
            fix=strategy.advice,
        )


def _open_base(
    base: Path,
    config: Mapping[str, Any],
    skeleton: nn.Module,
    names: Mapping[str, str],
    rounding: Rounding | None,
) -> BaseCheckpoint:
    if config.get("quantization_config"):
        return open_stored(base, config, skeleton, names)
    checkpoint = ShardedCheckpoint(base)
    return checkpoint if rounding is None else RoundedBase(checkpoint, rounding)


def _merged_config(
    config: Mapping[str, Any],
    skeleton: nn.Module,
    merge: Merge | None,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """The base's config with what the task's head, the adapter and the dtype change."""
    quantized = ("quantization_config", models.ORIGINAL_KEY)
    values = {key: value for key, value in config.items() if key not in quantized}
    values["architectures"] = [type(skeleton).__name__]
    described: Any = getattr(skeleton, "config", None)
    if type(skeleton).__name__.endswith("ForSequenceClassification") and described is not None:
        full = described.to_dict()
        values |= {key: full[key] for key in _HEAD_KEYS if full.get(key) is not None}
    if dtype is not None:
        values.pop("torch_dtype", None)
        values["dtype"] = str(dtype).removeprefix("torch.")
    if merge is not None:
        values |= merge.config_changes()
    return values


def write_model(
    source: TensorSource,
    out: Path | str,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Writes a source as a model folder that transformers opens; returns the tensors' bytes.

    A write that was killed or interrupted goes on where it was, to the same bytes.

    Raises:
        OutputExistsError: ``out`` is taken.
        SaveError: the disk is full; nothing is left behind and nothing that existed has changed.
    """
    out = Path(out)
    require_absent(out, overwrite=overwrite)
    total = sum(tensor_bytes(source.shape(n), source.dtype(n)) for n in source.names())
    require_room(source, out, there=folder_bytes(unfinished(out)))
    with new_folder(out, overwrite=overwrite, go_on=True) as folder:
        journal = WriteJournal(folder, identity(source, max_shard_bytes=max_shard_bytes))
        fill_folder(
            source, folder, max_shard_bytes=max_shard_bytes, progress=progress, journal=journal
        )
        journal.close()
    return total


def identity(source: TensorSource, **how: Any) -> str:
    """Of everything that decides the bytes of a written model: what it is made from, and how."""
    facts = {
        "made_from": source.made_from(),
        "tensors": [(n, source.shape(n), str(source.dtype(n))) for n in source.names()],
        "config": dict(source.config),
        "how": how,
        "software": {**versions(), "threads": torch.get_num_threads()},
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def fill_folder(
    source: TensorSource,
    folder: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    journal: WriteJournal | None = None,
) -> None:
    """Writes config, tokenizer and tensors of a source into a folder that is being made."""
    specs = [(name, source.shape(name), source.dtype(name)) for name in source.names()]
    write_config(source, folder)
    copy_files(source.files, folder)
    write_shards(
        folder, specs, source.blocks, max_shard_bytes=max_shard_bytes, progress=progress,
        journal=journal,
    )  # fmt: skip


def require_room(source: TensorSource, out: Path, there: int = 0) -> None:
    """Refuses to begin a write that the disk has no room for.

    Args:
        there: bytes of it that are on the disk already.

    Raises:
        SaveError: it has not.
    """
    total = sum(tensor_bytes(source.shape(n), source.dtype(n)) for n in source.names())
    require_disk(out, max(0, total + files_bytes(source.files) - there) + _HEADER_SLACK_BYTES)


def write_config(source: TensorSource, folder: Path, **changes: Any) -> None:
    """Writes the source's config.json, with ``changes``, into a folder that is being made."""
    text = json.dumps({**source.config, **changes}, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
