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
from qft.first_step import without_gradient, zero_gradients
from qft.progress import Reporter


def recipe(base: Path, folder: Path, strategy: Any = None, steps: int = 2) -> Any:
    (folder / "text.txt").write_text("some words to learn, and some more of them. " * 20)
    return qft.build_recipe({
        "model": str(base), "task": "text", "data": {"train": str(folder / "text.txt")},
        "strategy": strategy or {"name": "lora", "rank": 2}, "dtype": "float32",
        "train": {"max_steps": steps, "batch_size": 2, "max_length": 32},
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


class Listener(Reporter):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def zeros(self) -> list[str]:
        return [line for line in self.lines if "exactly zero" in line]


def silence(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Lets the trained tensors whose names hold one of the words get zeros for a gradient."""
    plain = LoRA.attach

    def attach(self: LoRA, model: nn.Module, context: Any) -> nn.Module:
        attached = plain(self, model, context)
        for name, parameter in attached.named_parameters():
            if parameter.requires_grad and any(word in name for word in words):
                parameter.register_hook(torch.zeros_like)
        return attached

    monkeypatch.setattr(LoRA, "attach", attach)


def test_a_gradient_that_is_zero_everywhere(tiny_llama, tmp_path, monkeypatch):
    silence(monkeypatch, "lora_")
    with pytest.raises(QftError, match="Every gradient is exactly zero") as caught:
        qft.train(recipe(tiny_llama, tmp_path))
    assert "lora_A" in caught.value.found


def test_a_tensor_whose_gradient_stays_zero_is_named(tiny_llama, tmp_path, monkeypatch):
    silence(monkeypatch, "layers.0.self_attn.q_proj.lora_A", "layers.1.mlp.up_proj.lora_B")
    listener = Listener()
    qft.train(recipe(tiny_llama, tmp_path), reporter=listener)
    (note,) = listener.zeros()
    # the A below a silenced B waits for it
    wanted = {"layers.0.self_attn.q_proj.lora_A", "layers.1.mlp.up_proj.lora_A",
              "layers.1.mlp.up_proj.lora_B"}  # fmt: skip
    assert all(name in note for name in wanted)
    assert " 3: " in note


STRATEGIES: list[dict[str, Any]] = [
    {"name": "lora", "rank": 2}, {"name": "lora", "rank": 2, "dora": True},
    {"name": "adalora"}, {"name": "ia3"}, {"name": "prefix", "length": 2},
    {"name": "bitfit"}, {"name": "layers", "last": 1}, {"name": "full"},
]  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: "-".join(map(str, s.values())))
def test_a_beginning_at_zero_is_no_alarm(strategy, tiny_llama, tiny_bert, tmp_path):
    listener = Listener()
    made = recipe(tiny_llama, tmp_path, strategy, steps=10)
    if strategy["name"] == "bitfit":  # a Llama has no biases
        rows = "".join(f"text {i}\t{i % 2}\n" for i in range(8))
        (tmp_path / "rows.tsv").write_text(rows)
        columns = {"text": 0, "label": 1}
        made = qft.build_recipe({
            **made.to_dict(), "model": str(tiny_bert), "task": "classify",
            "data": {"train": str(tmp_path / "rows.tsv"), "columns": columns},
        })  # fmt: skip
    qft.train(made, reporter=listener)
    assert listener.lines
    assert listener.zeros() == []


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
    for parameter in model["experts"][1].parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert zero_gradients(model) == []
    model["experts"][0].weight.grad = torch.zeros(2, 2)
    assert zero_gradients(model) == ["experts.0.weight", "experts.1.weight"]
    model["gate"] = nn.Linear(2, 2)
    assert without_gradient(model) == ["gate.weight", "gate.bias"]
