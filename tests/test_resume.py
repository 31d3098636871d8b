"""A run killed at any point and resumed ends byte-equal to one that was never interrupted.

Each run is a process of its own, ended by SIGKILL from inside: in the middle of a save (at the k-th
file operation below the checkpoint folder), of an evaluation, or of a step's backward passes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from qft.checkpoints import list_checkpoints

# kind, and after how many events of that kind the process dies
POINTS = [
    ("save", 1), ("save", 9), ("eval", 2), ("step", 5),  # these four in `make test`
    ("save", 3), ("save", 5), ("save", 7), ("save", 12), ("save", 15), ("save", 18), ("save", 21),
    ("save", 24), ("eval", 1), ("eval", 5), ("eval", 8), ("eval", 9), ("step", 1), ("step", 8),
    ("step", 14), ("step", 17),
]  # fmt: skip
QUICK = 3


def recipe_values(assets: Path, folder: Path, name: str) -> dict[str, Any]:
    return {
        "model": str(assets / "models/stories260K"),
        "task": "text",
        "data": {"train": str(folder / "train.txt"), "eval": str(folder / "eval.txt")},
        "strategy": {"name": "lora", "rank": 4, "dropout": 0.1},
        "dtype": "float32",
        "memory": {"micro_batch": 2},
        "train": {
            "epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "max_length": 64, "warmup": 2,
            "save_every": 4, "eval_every": 5, "log_every": 1, "weight_decay": 0.01,
        },
        "output": str(folder / name),
    }  # fmt: skip


def run_child(values: dict[str, Any], resume: bool, kind: str, count: int) -> None:
    """In a process of its own: trains, and dies where it is told to."""
    import torch

    from qft.recipe import build_recipe
    from qft.training import train

    torch.set_num_threads(1)
    plant_death(kind, count)
    train(build_recipe(values), resume=resume)


def plant_death(kind: str, count: int) -> None:
    left = [count]

    def tick() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if kind == "save":

        def on_file(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("open", "os.rename", "os.mkdir") and "checkpoint-" in str(arguments[0]):
                tick()

        sys.addaudithook(on_file)
    elif kind == "eval":
        import qft.training as module

        plain = module.evaluate
        module.evaluate = lambda *a, progress, **k: plain(  # type: ignore[assignment]
            *a, **k, progress=lambda n=1: (tick(), progress(n))
        )
    elif kind == "step":
        import qft.trainer as module

        inner = module.accumulate_gradients

        def dying(*a: Any, backward: Any, **k: Any) -> Any:
            return inner(*a, **k, backward=lambda loss: (backward(loss), tick()))

        module.accumulate_gradients = dying  # type: ignore[assignment]


def run(values: dict[str, Any], *, resume: bool = False, kind: str = "", count: int = 0) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qft.training", "peft", "adapters.lora"])
    process = context.Process(target=run_child, args=(values, resume, kind, count))
    process.start()
    process.join()
    return process.exitcode or 0


def state_of(folder: Path) -> dict[str, bytes]:
    """Every byte that must be equal: the adapter, and optimizer and random state at the end."""
    last = list_checkpoints(folder / "checkpoints")[-1]
    files = [
        folder / "adapter/adapter_model.safetensors",
        last / "optimizer.safetensors",
        last / "state.json",
        last / "state.safetensors",
        last / "adapter/adapter_model.safetensors",
    ]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def uninterrupted(
    assets: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("resume")
    text = (assets / "data/text/tinyshakespeare/input.txt").read_text(encoding="utf-8")
    (folder / "train.txt").write_text(text[:4600], encoding="utf-8")
    (folder / "eval.txt").write_text(text[-1600:], encoding="utf-8")
    assert run(recipe_values(assets, folder, "whole")) == 0
    return folder, state_of(folder / "whole")


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        pytest.param(kind, count, marks=[pytest.mark.slow] if index >= QUICK else [])
        for index, (kind, count) in enumerate(POINTS)
    ],
)
def test_killed_and_resumed_is_byte_equal(
    assets: Path, uninterrupted: tuple[Path, dict[str, bytes]], kind: str, count: int
) -> None:
    folder, expected = uninterrupted
    values = recipe_values(assets, folder, f"{kind}-{count}")
    assert run(values, kind=kind, count=count) == -signal.SIGKILL, "the process was to be killed"
    assert not (Path(values["output"]) / "adapter").exists()
    assert run(values, resume=True) == 0
    found = state_of(Path(values["output"]))
    different = [name for name in expected if found[name] != expected[name]]
    assert not different


def test_points_are_what_was_promised() -> None:
    kinds = [kind for kind, _ in POINTS]
    assert len(set(POINTS)) == 20
    assert kinds.count("save") >= 8
    assert kinds.count("eval") >= 4


def test_another_micro_batch_gives_the_same_update(
    assets: Path, uninterrupted: tuple[Path, dict[str, bytes]]
) -> None:
    """Dropout is drawn by sample, so the split changes rounding only."""
    from safetensors.torch import load

    folder, expected = uninterrupted
    values = recipe_values(assets, folder, "split")
    values["memory"] = {"micro_batch": 3}
    assert run(values) == 0
    name = "adapter/adapter_model.safetensors"
    before, after = load(expected[name]), load(state_of(folder / "split")[name])
    for key, tensor in before.items():
        assert (tensor - after[key]).abs().max() < 1e-4 * tensor.abs().max() + 1e-6, key
