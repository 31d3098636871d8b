"""A frozen tensor that moves and a trained one that no loss reaches stop the run after one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qft
from adapters.lora import LoRA
from qft.errors import QftError
from qft.first_step import without_gradient


def recipe(base: Path, folder: Path) -> Any:
    (folder / "text.txt").write_text("some words to learn, and some more of them. " * 20)
    return qft.build_recipe({
        "model": str(base), "task": "text", "data": {"train": str(folder / "text.txt")},
        "strategy": {"name": "lora", "rank": 2}, "dtype": "float32",
        "train": {"max_steps": 2, "batch_size": 2, "max_length": 32},
        "output": str(folder / "run"),
    })  # fmt: skip


def test_an_honest_run_is_left_alone(tiny_llama, tmp_path):
    assert qft.train(recipe(tiny_llama, tmp_path)).report["training"]["steps"] == 2


def test_a_frozen_tensor_that_changes(tiny_llama, tmp_path, monkeypatch):
    plain = LoRA.penalty

    def penalty(self: LoRA, model: nn.Module) -> Any:
        with torch.no_grad():
            dict(model.named_parameters())["base_model.model.model.norm.weight"].add_(1.0)
        return plain(self, model)

    monkeypatch.setattr(LoRA, "penalty", penalty)
    with pytest.raises(QftError, match="should be frozen changed") as caught:
        qft.train(recipe(tiny_llama, tmp_path))
    assert "model.norm.weight" in caught.value.found


def test_a_trained_tensor_that_no_loss_reaches(tiny_llama, tmp_path, monkeypatch):
    plain = LoRA.attach

    def attach(self: LoRA, model: nn.Module, context: Any) -> nn.Module:
        attached = plain(self, model, context)
        attached.register_parameter("idle", nn.Parameter(torch.zeros(3)))
        return attached

    monkeypatch.setattr(LoRA, "attach", attach)
    with pytest.raises(QftError, match="got no gradient") as caught:
        qft.train(recipe(tiny_llama, tmp_path))
    assert "idle" in caught.value.found


def test_an_expert_without_tokens_is_no_fault():
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    model["experts"][0](torch.ones(1, 2)).sum().backward()
    assert without_gradient(model) == []
    model["gate"] = nn.Linear(2, 2)
    assert without_gradient(model) == ["gate.weight", "gate.bias"]
