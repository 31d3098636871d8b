"""Training checkpoints: complete or not there, without pickles, exact to the byte.

checkpoint-120/
  adapter/                 what the strategy saves: usable as it is
  optimizer.safetensors    every tensor of the optimizer's state
  state.json               optimizer groups, scheduler, random state, the strategy's JSON
  state.safetensors        random states, the strategy's tensors
  trainer_state.json       the Trainer's own counters and history
  manifest.json            sizes and hashes of all of it
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qft.card import write_card
from qft.errors import ModelError
from qft.files import (
    manifest_problem,
    new_folder,
    read_json,
    remove_unfinished,
    write_json,
    write_manifest,
)
from qft.strategy import Strategy

ADAPTER = "adapter"
_NESTED = "/"  # in the path of a value within an optimizer's nested state
_NAME = re.compile(r"^checkpoint-(\d+)$")


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: nn.Module,
    strategy: Strategy,
    optimizer: Any,
    scheduler: Any,
    trainer_state: Any,
    card: Mapping[str, Any],
) -> Path:
    """Writes ``folder/checkpoint-<step>`` atomically and returns it."""
    path = folder / f"checkpoint-{step}"
    with new_folder(path, overwrite=True) as temporary:
        (temporary / ADAPTER).mkdir()
        strategy.save(model, temporary / ADAPTER)
        write_card(temporary / ADAPTER, card)
        optimizer_tensors, optimizer_values = flatten_state(optimizer.state_dict())
        save_file(optimizer_tensors, temporary / "optimizer.safetensors")
        strategy_tensors, strategy_values = strategy.state(model)
        random_tensors, random_values = random_state()
        tensors = {f"strategy.{name}": value for name, value in strategy_tensors.items()}
        tensors |= {f"random.{name}": value for name, value in random_tensors.items()}
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()},
                  temporary / "state.safetensors")  # fmt: skip
        write_json(temporary / "state.json", {
            "optimizer": optimizer_values,
            "scheduler": _plain(scheduler.state_dict()),
            "random": random_values,
            "strategy": dict(strategy_values),
        })  # fmt: skip
        trainer_state.save_to_json(str(temporary / "trainer_state.json"))
        write_manifest(temporary)
    return path


def load_model_state(path: Path, model: nn.Module, strategy: Strategy) -> None:
    """Loads adapter and strategy state of a checkpoint into a model the strategy is attached to."""
    strategy.load(model, path / ADAPTER)
    tensors = load_file(path / "state.safetensors")
    mine = {n.removeprefix("strategy."): t for n, t in tensors.items() if n.startswith("strategy.")}
    strategy.load_state(model, mine, read_json(path / "state.json")["strategy"])


def load_optimizer_state(path: Path, optimizer: Any, scheduler: Any) -> None:
    """Loads optimizer and scheduler state."""
    values = read_json(path / "state.json")
    tensors = load_file(path / "optimizer.safetensors")
    optimizer.load_state_dict(unflatten_state(tensors, values["optimizer"]))
    scheduler.load_state_dict(values["scheduler"])


def load_random_state(path: Path) -> None:
    """Puts every random generator where it was."""
    tensors = load_file(path / "state.safetensors")
    values = read_json(path / "state.json")["random"]
    version, numbers, gauss = values["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, *counters = values["numpy"]
    np.random.set_state((kind, tensors["random.numpy"].numpy().view(np.uint32), *counters))
    torch.set_rng_state(tensors["random.torch"])
    for index in range(torch.cuda.device_count()):
        if f"random.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{index}"], index)


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of Python's, NumPy's and torch's generators as tensors and JSON."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "numpy": torch.from_numpy(np.asarray(keys).view(np.int32).copy()),
        "torch": torch.get_rng_state(),
    }
    for index in range(torch.cuda.device_count()):
        tensors[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    values = {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), int(position), int(has_gauss), float(cached)],
    }
    return tensors, values


def flatten_state(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state dict as named tensors and JSON."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    places: set[int] = set()
    for index, entries in state["state"].items():
        values[str(index)] = {}
        for key, value in _leaves(entries):
            if isinstance(value, Tensor):
                held = value.detach().cpu().contiguous()
                shared = held.data_ptr() in places  # 8-bit states have one table in common
                tensors[f"{index}.{key}"] = held.clone() if shared else held
                places.add(held.data_ptr())
            else:
                values[str(index)][key] = value
    return tensors, {"values": values, "param_groups": _plain(state["param_groups"])}


def unflatten_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flatten_state`."""
    state: dict[int, dict[str, Any]] = {int(index): {} for index in values["values"]}
    leaves = [(int(i), key, value) for i, v in values["values"].items() for key, value in v.items()]
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        leaves.append((int(index), key, tensor))
    for number, key, value in leaves:
        *groups, last = key.split(_NESTED)
        entry = state.setdefault(number, {})
        for group in groups:
            entry = entry.setdefault(group, {})
        entry[last] = value
    return {"state": state, "param_groups": values["param_groups"]}


def _leaves(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by their path; bitsandbytes keeps its quantized states in a mapping of their own."""
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}{_NESTED}")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    """Only what JSON can hold; a scheduler's functions are rebuilt from the recipe."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if not _opaque(v)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value if not _opaque(v)]
    return value.item() if isinstance(value, Tensor) else value


def _opaque(value: Any) -> bool:
    plain = (dict, list, tuple, str, int, float, bool, type(None), Tensor)
    return not isinstance(value, plain)


def checkpoint_step(path: Path) -> int:
    """The optimizer step in a checkpoint's name; -1 for anything else."""
    match = _NAME.match(path.name)
    return int(match.group(1)) if match else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step, complete or not, the newest last."""
    found = [p for p in folder.glob("checkpoint-*") if checkpoint_step(p) >= 0]
    return sorted(found, key=checkpoint_step)


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are as its manifest says; and what was skipped, why."""
    skipped = [f"{name}: an interrupted save" for name in remove_unfinished(folder)]
    for path in reversed(list_checkpoints(folder)):
        problem = manifest_problem(path)
        if problem is None:
            return path, skipped
        skipped.append(f"{path.name}: {problem}")
    return None, skipped


def require_complete(path: Path) -> None:
    """Raises a clear error where a checkpoint cannot be resumed from."""
    problem = manifest_problem(path)
    if problem is not None:
        raise ModelError("This checkpoint is not complete.", where=path, found=problem,
                         fix="--resume without a name takes the newest complete one")  # fmt: skip


def rotate(folder: Path, keep: int, best: Path | None) -> None:
    """Removes the oldest checkpoints beyond ``keep``; the best one always stays."""
    paths = [p for p in list_checkpoints(folder) if best is None or p.name != best.name]
    for path in paths[: max(0, len(paths) - keep)]:
        shutil.rmtree(path, ignore_errors=True)
