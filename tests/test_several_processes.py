"""Two processes, under DDP and under FSDP2, compute what one computes alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor

PROGRAM = Path(__file__).parent / "multiprocess" / "several.py"
ROOT = PROGRAM.parents[2]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run(job: dict[str, Any], folder: Path) -> tuple[dict[str, Tensor], list[float]]:
    name = f"{job['way']}{'-broken' if job.get('broken') else ''}"
    out, order = folder / f"{name}.safetensors", folder / f"{name}.json"
    order.write_text(json.dumps({**job, "out": str(out)}), encoding="utf-8")
    command = [sys.executable, str(PROGRAM), str(order)]
    if job["way"] != "alone":
        options = {
            "num_processes": 2, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no",
            "main_process_ip": "127.0.0.1", "main_process_port": free_port(),
        }  # fmt: skip
        listed = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *listed]
        command = [*launch, str(PROGRAM), str(order)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
             "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    with safe_open(out, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["losses"])


def largest_difference(found: dict[str, Tensor], wanted: dict[str, Tensor], kind: str) -> float:
    assert set(found) == set(wanted)
    names = [name for name in wanted if name.startswith(kind)]
    assert names
    return max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in names)


@pytest.mark.parametrize("strategy", ["lora", pytest.param("head", marks=pytest.mark.slow)])
def test_two_processes_equal_one(strategy: str, tmp_path: Path, tiny_llama: Path, tiny_bert: Path):
    job = {
        "base": str(tiny_llama if strategy == "lora" else tiny_bert),
        "task": "text" if strategy == "lora" else "classify",
        "strategy": strategy, "dtype": "float64", "checkpointing": "full", "steps": 3,
    }  # fmt: skip
    wanted, losses = run({**job, "way": "alone"}, tmp_path)
    for way in ("ddp", "fsdp2"):
        found, their_losses = run({**job, "way": way}, tmp_path)
        assert largest_difference(found, wanted, "gradient.") < 1e-10, way
        assert largest_difference(found, wanted, "weight.") < 1e-10, way
        assert their_losses == pytest.approx(losses, rel=1e-5)


def test_in_float32_one_steps_gradients_are_equal_but_for_rounding(
    tmp_path: Path, tiny_llama: Path
):
    job = {"base": str(tiny_llama), "task": "text", "strategy": "lora", "dtype": "float32",
           "checkpointing": "none", "steps": 1}  # fmt: skip
    wanted, _ = run({**job, "way": "alone"}, tmp_path)
    found, _ = run({**job, "way": "ddp"}, tmp_path)
    assert largest_difference(found, wanted, "gradient.") < 1e-6


def test_gradients_that_were_not_exchanged_are_noticed(tmp_path: Path, tiny_llama: Path):
    """The comparison can fail: with DDP's wrapper bypassed each process has its own."""
    job = {"base": str(tiny_llama), "task": "text", "strategy": "lora", "dtype": "float64",
           "checkpointing": "none", "steps": 1}  # fmt: skip
    wanted, _ = run({**job, "way": "alone"}, tmp_path)
    found, _ = run({**job, "way": "ddp", "broken": True}, tmp_path)
    assert largest_difference(found, wanted, "gradient.") > 1e-2
