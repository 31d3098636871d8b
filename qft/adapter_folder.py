"""Finds the adapter in what a user names (a run, a checkpoint, an adapter folder), and its base."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qft import models
from qft.card import CARD, read_card
from qft.errors import AdapterError
from qft.registry import build_strategy, strategy_from_folder
from qft.strategy import PARTS, Context, Strategy

BESIDE = "../base"  # how an adapter that is handed over with its base names it
_MARKS = (CARD, "adapter_config.json", "trained_tensors.json", PARTS)
_PEFT_TASKS = {
    "SEQ_CLS": "classify",
    "SEQ_2_SEQ_LM": "seq2seq",
    "QUESTION_ANS": "extract",
    "TOKEN_CLS": "token",
}


@dataclass(frozen=True)
class AdapterFolder:
    """A saved adapter, located and described; no model is open yet.

    Attributes:
        folder: where its files are.
        strategy: rebuilt from the folder.
        base: folder of the base model.
        base_source: the base as the adapter or the user names it.
        card: see :mod:`qft.card`; None where PEFT wrote the folder elsewhere.
        task: from the card or PEFT's task type.
    """

    folder: Path
    strategy: Strategy
    base: Path
    base_source: str
    card: dict[str, Any] | None
    task: str

    def spec(self, **changes: Any) -> models.ModelSpec:
        """How to open the base as training saw it."""
        card = self.card or {}
        labels = card.get("labels")
        settings: dict[str, Any] = {
            "source": self.base_source,
            "task": self.task,
            "labels": tuple(labels) if labels else None,
            "labels_are": card.get("labels_are", "one"),
            "pooling": card.get("pooling", "auto"),
            "quantize": card.get("quantize", "none"),
            "dtype": models.DTYPES.get(str(card.get("dtype"))),
        }
        return models.ModelSpec(**{**settings, **changes})


def adapter_in(path: Path) -> Path | None:
    """The adapter folder a path names, or None.

    It is the path itself, ``adapter/`` in a run or checkpoint, or the one folder that PEFT named
    after its adapter.
    """
    for folder in (path / "adapter", path):
        if any((folder / mark).is_file() for mark in _MARKS):
            return folder
    named = _named_by_peft(path)
    return named[0] if len(named) == 1 else None


def _named_by_peft(path: Path) -> list[Path]:
    return sorted(p.parent for p in path.glob("*/adapter_config.json")) if path.is_dir() else []


def locate_adapter(
    path: Path | str,
    *,
    base: str | None = None,
    strategy: str | None = None,
    trust: models.Trust | None = None,
) -> AdapterFolder:
    """Describes the adapter that ``path`` names and finds its base.

    Args:
        path: a run folder, a checkpoint or an adapter folder.
        base: the base model, where it is not where the adapter remembers it.
        strategy: a third party's strategy, by name; its code is imported only then.

    Raises:
        AdapterError: there is no adapter, or the base is another than it was trained on.
    """
    path = Path(path)
    folder = adapter_in(path)
    if folder is None:
        named = [held.name for held in _named_by_peft(path)]
        if named:
            raise AdapterError(
                "There are several adapters here.",
                where=path,
                found=", ".join(named[:8]),
                fix=f"name one: {path / named[0]}",
            )
        interrupted = path / "checkpoints"
        resume = f"qft train {shlex.quote(str(path / 'recipe.yaml'))} --resume"
        raise AdapterError(
            "There is no adapter here.",
            where=path,
            found="a run that has not finished" if interrupted.is_dir() else None,
            fix=f"{resume}, or name one of its checkpoints"
            if interrupted.is_dir()
            else "name the folder of a qft run or of a PEFT adapter",
        )
    card = read_card(folder)
    found = _strategy(folder, card, strategy)
    peft = _peft_config(folder)
    source = base or (card or {}).get("base") or peft.get("base_model_name_or_path")
    if not source:
        raise AdapterError("The adapter does not say which base it belongs to.", where=folder,
                           fix="add --base FOLDER_OR_HUB_ID")  # fmt: skip
    if source == BESIDE:
        source = str(folder.parent / "base")
    base_folder = models.resolve_folder(str(source), trust)
    models.check_folder(base_folder, trust)
    if card is not None:
        _check_base(card, base_folder, str(source), folder)
    task = (card or {}).get("task") or _PEFT_TASKS.get(str(peft.get("task_type")), "text")
    return AdapterFolder(folder, found, base_folder, str(source), card, str(task))


def open_adapter_model(found: AdapterFolder, spec: models.ModelSpec) -> nn.Module:
    """The base with the adapter attached and loaded, in eval mode, frozen."""
    skeleton = models.open_skeleton(found.base, spec)
    needs = found.strategy.needs(skeleton)
    model = models.open_model(found.base, spec, keep=needs.full_precision)
    model = found.strategy.attach(model, Context(task=found.task))
    found.strategy.load(model, found.folder)
    model.eval()
    return model.requires_grad_(False)


def _strategy(folder: Path, card: dict[str, Any] | None, named: str | None) -> Strategy:
    """By the files, not by the card's word: a card from elsewhere must not import code."""
    if named is not None and card is not None and card["strategy"].get("name") == named:
        return build_strategy(card["strategy"])
    return strategy_from_folder(folder, named=named)


def _peft_config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _check_base(card: dict[str, Any], base: Path, source: str, folder: Path) -> None:
    found = models.fingerprint(base)
    made_of = models.original_fingerprint(models.read_config(base))  # of a copy qft quantized
    wanted = (card["base_fingerprint"], card.get("original_fingerprint"))
    if found not in wanted and made_of != card["base_fingerprint"]:
        raise AdapterError(
            "The adapter was made for another base model.",
            where=folder,
            found=f"{source} has fingerprint {found}, the adapter wants {card['base_fingerprint']}",
            fix=f"--base with the model it was trained on ({card['base']})",
        )
