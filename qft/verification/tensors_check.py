"""Does an artefact hold every tensor its config asks for, and tie what may be tied?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from qft import models
from qft.errors import ModelError
from qft.verification.diagnosis import Finding
from qft.verification.subject import Subject

_KNOWN = ("int8", "nf4", "fp4", models.COMPRESSED, "torchao")
_PACKED = (".weight_packed", "._weight_qdata")  # what stands for a weight of the last two
_ROWS = 4096  # of two tensors compared at a time


def check_tensors(artefact: Subject) -> list[Finding]:
    """What is missing in a model folder, or told to be one tensor and stored as two.

    A GGUF or ONNX file's loader says itself what it misses, and other packed formats name their
    tensors in ways of their own: nothing is checked there.
    """
    stored = artefact.config().get("quantization_config")
    known = not stored or models.stored_kind(stored) in _KNOWN
    whole = artefact.gguf or artefact.onnx or artefact.adapter
    if whole is not None or not known:
        return []
    models.check_folder(artefact.folder, artefact.spec.trust)
    skeleton = models.open_skeleton(artefact.folder, artefact.spec)
    names = models.module_names(artefact.folder, skeleton)
    return [*_missing(skeleton, names, artefact.folder), *_untied(skeleton, names, artefact)]


def _missing(skeleton: nn.Module, names: dict[str, str], folder: Path) -> list[Finding]:
    held = set(names.values())
    held |= {name.replace(end, ".weight") for name in held for end in _PACKED}
    tied: dict[str, str] = getattr(skeleton, "all_tied_weights_keys", None) or {}
    held |= {one for pair in tied.items() if set(pair) & held for one in pair}
    lost = sorted(set(skeleton.state_dict()) - held)
    if not lost:
        return []
    config = models.read_config(folder)
    described: Any = skeleton.config
    tie = config.get("tie_word_embeddings", getattr(described, "tie_word_embeddings", None))
    text = f"{len(lost)} of the model's tensors missing, first {lost[0]}"
    fix = "write the artefact again from base and adapter"
    if any(name.startswith("lm_head.") for name in lost):
        text += f" (config.json says tie_word_embeddings: {json.dumps(tie)})"
        fix = (
            "the head was dropped: write the artefact again, or, if its base has tied embeddings, "
            "set tie_word_embeddings: true in config.json"
        )
    return [Finding("missing", text, fix)]


def _untied(skeleton: nn.Module, names: dict[str, str], artefact: Subject) -> list[Finding]:
    stored = {module: name for name, module in names.items()}
    tied: dict[str, str] = getattr(skeleton, "all_tied_weights_keys", None) or {}
    findings = []
    for one, other in tied.items():
        if one in stored and other in stored:
            if _same(artefact.folder, stored[one], stored[other]):
                continue
            findings.append(Finding(
                "tensors",
                f"{one} and {other} are stored as two different tensors, and config.json ties them",
                "set tie_word_embeddings: false in config.json, or most runtimes drop the head",
            ))  # fmt: skip
    return findings


def _same(folder: Path, one: str, other: str) -> bool:
    first, second = (_slice(folder, name) for name in (one, other))
    if first.get_shape() != second.get_shape():
        return False
    rows = first.get_shape()[0]
    return all(
        torch.equal(first[at : at + _ROWS], second[at : at + _ROWS]) for at in range(0, rows, _ROWS)
    )


def _slice(folder: Path, name: str) -> Any:
    """A stored tensor, by safetensors' own reader."""
    for file in sorted(folder.glob("*.safetensors")):
        opened: Any = safe_open(file, framework="pt")
        if name in opened.keys():  # noqa: SIM118
            return opened.get_slice(name)
    raise ModelError("The folder has no such tensor.", where=folder, found=name)
