"""What the words of a command say that belongs in its record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qft.bench.facts import Facts, mapping
from qft.bench.scrubbing import name_of
from qft.files import read_json

# The flags that tell two records of a verb apart; texts a user has typed are not among them.
SETTINGS: dict[str, tuple[str, ...]] = {
    "train": ("resume", "folds"),
    "eval": ("task", "max_length", "limit", "dtype", "generate", "max_new_tokens", "micro_batch"),
    "generate": ("max_new_tokens", "temperature", "top_p", "seed", "raw", "dtype"),
    "merge": ("base", "dtype", "verify", "method", "weights", "density", "majority_sign",
              "svd_rank", "space", "adapter_only"),
    "export": ("format", "fuse", "verify", "calibrate", "calibration_rows"),
    "verify": ("task", "format", "limit", "layer_by_layer"),
    "prune": ("method", "ratio", "pattern", "params", "size", "layers", "width", "importance",
              "multiple_of", "calibration_rows", "max_length", "dtype", "dry_run"),
    "bench step": ("shape", "length", "batch", "rank", "quantize", "checkpointing", "offload",
                   "optimizer", "labels", "option", "plain"),
    "plan": ("memory", "max_length", "maximize", "probe", "device"),
}  # fmt: skip


def settings_of_command(verb: str, words: Mapping[str, Any]) -> Facts:
    """What the flags of a command say, where they say anything."""
    return {key: words[key] for key in SETTINGS.get(verb, ())
            if words.get(key) not in (None, False, [], ())}  # fmt: skip


def source_of_command(words: Mapping[str, Any]) -> Facts:
    """The name of what a command works on; of a run, also what was trained in it, and how."""
    for key in ("source", "sources", "reference", "shape", "model"):
        found = words.get(key)
        if found:
            names = [str(one) for one in (found if isinstance(found, (list, tuple)) else [found])]
            told = {"model": ", ".join(name_of(name) for name in names)}
            return told | (_of_source(Path(names[0])) if len(names) == 1 else {})
    return {}


def _of_source(folder: Path) -> Facts:
    """What a run folder says of itself; a broken one is the command's to complain of."""
    try:
        report = mapping(read_json(folder / "run.json"))
    except (OSError, ValueError, RecursionError):
        return {}
    kept = ("task", "strategy", "base_fingerprint", "data_fingerprint")
    told = {key: report[key] for key in kept if report.get(key) is not None}
    return {"source": folder.resolve().name, "model": report.get("base"), **told}
