"""Every optimizer and schedule: it learns, and a run that was stopped goes on exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import qft
from qft.recipe import Train
from qft.schedule import OPTIMIZERS, schedule_factor


def job(folder: Path, model: Path, **train: Any) -> Any:
    rows = folder / "rows.txt"
    rows.write_text("a few words to learn by heart\n" * 40)
    return qft.build_recipe({
        "model": str(model), "task": "text", "strategy": {"name": "lora", "rank": 32},
        "data": {"train": str(rows), "max_duplicate_share": 1}, "dtype": "float32",
        "train": {"max_length": 32, "max_steps": 4, "batch_size": 4, "save_every": 2,
                  "log_every": 1, **train},
        "device": "cpu", "output": str(folder / "run"),
    })  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_learns_and_goes_on_exactly(optimizer: str, tiny_llama: Path, tmp_path: Path):
    rate = {"sgd": 1.0, "adafactor": 1e-2}.get(optimizer, 1e-3)
    made = job(tmp_path, tiny_llama, optimizer=optimizer, learning_rate=rate)
    run = qft.train(made)
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert losses[-1] < losses[0]
    kept = {
        name: (run.folder / "checkpoints" / "checkpoint-4" / name).read_bytes()
        for name in ("adapter/adapter_model.safetensors", "optimizer.safetensors")
    }
    shutil.rmtree(run.folder / "checkpoints" / "checkpoint-4")
    again = qft.train(made, resume=True)
    for name, content in kept.items():
        path = again.folder / "checkpoints" / "checkpoint-4" / name
        assert path.read_bytes() == content, name


def factors(total: int = 100, **settings: Any) -> list[float]:
    made = Train(warmup=0, **settings)
    return [schedule_factor(step, made, total) for step in range(total + 1)]


def test_schedules():
    linear, poly = factors(schedule="linear"), factors(schedule="polynomial")
    assert poly[50] == pytest.approx(linear[50] ** 2) == pytest.approx(0.25)
    restarts = factors(schedule="cosine-restarts", cycles=4)
    assert [round(restarts[i], 6) for i in (0, 25, 50, 75)] == [1.0] * 4
    assert restarts[24] < 0.01
    assert restarts[100] == pytest.approx(0, abs=1e-9)
    assert restarts[12] == pytest.approx(factors(25, schedule="cosine")[12])
    assert factors(schedule="constant")[99] == 1.0
