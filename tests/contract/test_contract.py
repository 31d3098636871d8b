"""The contract bears what the full set of strategies will ask of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qft import registry
from qft.models import ModelSpec, module_names, open_model, open_skeleton
from qft.preparation import prepare
from qft.strategy import Context

HERE = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an installed package's entry point would."""
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setitem(registry.BUILT_IN, "throwaway", "throwaway:Throwaway")


def recipe_values(base: Path, folder: Path, name: str) -> dict[str, Any]:
    return {
        "model": str(base),
        "task": "text",
        "data": {"train": str(folder / "train.txt")},
        "strategy": {"name": "throwaway"},
        "quantize": "nf4",
        "dtype": "float32",
        "train": {
            "max_steps": 8, "batch_size": 4, "max_length": 32, "learning_rate": 0.01,
            "save_every": 3, "log_every": 1, "warmup": 0,
        },
        "output": str(folder / name),
    }  # fmt: skip


def child(values: dict[str, Any], resume: bool, die_at: int) -> None:
    sys.path.insert(0, HERE)
    torch.set_num_threads(1)
    registry.BUILT_IN["throwaway"] = "throwaway:Throwaway"
    from throwaway import Throwaway

    from qft.recipe import build_recipe
    from qft.training import train

    plain = Throwaway.after_step

    def after_step(self: Throwaway, model: Any, step: int) -> None:
        plain(self, model, step)
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    Throwaway.after_step = after_step  # type: ignore[method-assign]
    train(build_recipe(values), resume=resume)


def run(values: dict[str, Any], resume: bool = False, die_at: int = 0) -> int:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=child, args=(values, resume, die_at))
    process.start()
    process.join()
    return process.exitcode or 0


def test_a_strategy_may_ask_for_everything(tiny_llama: Path, tmp_path: Path) -> None:
    words = " ".join(f"word{i} is {i * i}" for i in range(300))
    (tmp_path / "train.txt").write_text(words, encoding="utf-8")

    assert run(recipe_values(tiny_llama, tmp_path, "whole")) == 0
    values = recipe_values(tiny_llama, tmp_path, "killed")
    assert run(values, die_at=5) == -signal.SIGKILL
    assert run(values, resume=True) == 0
    for name in (
        "adapter/throwaway.safetensors",
        "checkpoints/checkpoint-8/optimizer.safetensors",
        "checkpoints/checkpoint-8/state.safetensors",
        "checkpoints/checkpoint-8/state.json",
    ):
        whole, killed = (tmp_path / part / name for part in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes(), name
    state = json.loads((tmp_path / "killed/checkpoints/checkpoint-8/state.json").read_text())
    assert state["strategy"] == {"steps": 8}

    from safetensors.torch import load_file

    adapter = load_file(tmp_path / "killed/adapter/throwaway.safetensors")
    gains = {n: t for n, t in adapter.items() if n.endswith(".gain")}
    assert all(t.abs().max() > 0.001 for t in gains.values()), "it trained"
    assert all(t[::2].abs().max() <= 0.0011 + 0.01 for t in gains.values())
    strengths = [t for n, t in adapter.items() if n.endswith(".strength")]
    assert all((t != 1).all() for t in strengths), "original weights and calibration arrived"

    merged_equals_adapter(tiny_llama, tmp_path)


def merged_equals_adapter(base: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from qft.adapter_folder import locate_adapter, open_adapter_model
    from qft.export.delivery import merge

    merge(folder / "killed", folder / "merged", onto="original")
    found = locate_adapter(folder / "killed")
    spec = found.spec(quantize="none", dtype=torch.float32, device="cpu")
    adapted = open_adapter_model(found, spec)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    assert merged.config.throwaway is True
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert (adapted(ids).logits - merged(ids).logits).abs().max() < 1e-5


def test_attaches_on_the_skeleton_and_keeps_what_it_asked_for(tiny_llama: Path) -> None:
    import bitsandbytes as bnb

    strategy = registry.build_strategy({"name": "throwaway"})
    spec = ModelSpec(str(tiny_llama), quantize="nf4", dtype=torch.float32, device="cpu")
    skeleton = open_skeleton(tiny_llama, spec)
    assert all(p.is_meta for p in skeleton.parameters())
    needs = strategy.needs(skeleton)
    assert needs.original_weights
    assert needs.calibration_batches == 2

    model = open_model(tiny_llama, spec, keep=needs.full_precision)
    kept = model.get_submodule(needs.full_precision[0])
    other = model.get_submodule("model.layers.1.self_attn.o_proj")
    assert not isinstance(kept, bnb.nn.Linear4bit)
    assert isinstance(other, bnb.nn.Linear4bit)

    prepared = prepare(skeleton, strategy, context=Context())
    trained = [n for n, p in prepared.named_parameters() if p.requires_grad]
    assert trained
    assert all(n.endswith(".gain") for n in trained)
    assert all(p.is_meta for p in prepared.parameters())
    assert set(module_names(tiny_llama, open_skeleton(tiny_llama, spec)).values())
