"""A base that exists only quantized, kept byte for byte, with the adapter beside it.

``OUT/base`` is the quantized model and ``OUT/adapter`` the adapter, whose files name its base as
``../base``. Nothing is rounded, so nothing is lost. qft's verbs open OUT; without qft::

    model = AutoModelForCausalLM.from_pretrained("OUT/base")
    model = PeftModel.from_pretrained(model, "OUT/adapter")
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qft import models
from qft.adapter_folder import BESIDE, AdapterFolder, locate_adapter
from qft.card import write_card
from qft.files import new_folder, read_json, require_disk, write_json
from qft.merging.merge import Progress
from qft.merging.side_files import side_files
from qft.shards import INDEX, ShardedCheckpoint, inside
from qft.verification.subject import Subject

_ADAPTER_FILES = {".json", ".safetensors", ".jinja", ".txt", ".model"}
_PEFT_CONFIG = "adapter_config.json"
_BLOCK = 1 << 22
_MODE = 0o644


def write_beside(
    found: AdapterFolder,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Copies base and adapter into one folder; returns the base's bytes.

    Raises:
        OutputExistsError: ``out`` is taken.
        SaveError: the disk is full; nothing is left behind.
    """
    base = dict(_base_files(found.base))
    adapter = {p.relative_to(found.folder).as_posix(): p for p in _adapter_files(found.folder)}
    sizes = [path.stat().st_size for path in (*base.values(), *adapter.values())]
    require_disk(out, sum(sizes))
    with new_folder(out, overwrite=overwrite) as folder:
        for part, files in (("base", base), ("adapter", adapter)):
            for name, path in files.items():
                _copy(path, folder / part / name, progress if part == "base" else None)
        if found.card is not None:
            write_card(folder / "adapter", {**found.card, "base": BESIDE})
        for path in (folder / "adapter").rglob(_PEFT_CONFIG):
            write_json(path, {**read_json(path), "base_model_name_or_path": BESIDE})
    return sum(sizes[: len(base)])


def beside_bytes(found: AdapterFolder) -> int:
    """What :func:`write_beside` tells its progress in all."""
    return sum(path.stat().st_size for _, path in _base_files(found.base))


def _base_files(base: Path) -> Iterator[tuple[str, Path]]:
    """Weights, config and tokenizer: no other file of a model from elsewhere is handed on."""
    with ShardedCheckpoint(base) as checkpoint:
        files = checkpoint.files()
    named = ["config.json", *([INDEX] if (base / INDEX).exists() else [])]
    yield from ((name, inside(base, name)) for name in named)
    yield from ((path.name, path) for path in files)
    yield from side_files(base).items()


def _adapter_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in _ADAPTER_FILES:
            yield inside(path.parent, path.name)


def _copy(source: Path, target: Path, progress: Progress | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as written:
        while block := read.read(_BLOCK):
            written.write(block)
            if progress is not None:
                progress(len(block))
    target.chmod(_MODE)


class BesideSubject(Subject):
    """Base and adapter, opened as a user of plain transformers and PEFT opens them."""

    def open(self, dtype: torch.dtype) -> nn.Module:
        """The model in eval mode.

        What PEFT cannot read (freed layers, a head) or runs otherwise is opened by its strategy.
        """
        found = self.adapter
        assert found is not None
        if not (found.strategy.mergeable and (found.folder / _PEFT_CONFIG).is_file()):
            return super().open(dtype)
        from peft import PeftModel

        model: Any = models.open_model(found.base, found.spec(dtype=dtype))
        opened: nn.Module = PeftModel.from_pretrained(model, str(found.folder))
        return opened.eval().requires_grad_(False)


def locate_beside(folder: Path, strategy: str | None) -> BesideSubject:
    """The two parts in one folder, located."""
    found = locate_adapter(folder, strategy=strategy)
    return BesideSubject(str(folder), found.base, found.spec(), found)
