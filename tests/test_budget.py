"""memory.budget: what fits is kept, what does not is recomputed, and less than that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qft
from adapters.lora import LoRA
from qft.budget import keep_what_fits
from qft.errors import RecipeError, WillNotFitError
from qft.lean.checkpointing import checkpointed_layers
from qft.lean.meter import Meter
from qft.preparation import inner_model, prepare


def big(layers: int = 6) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=160, num_hidden_layers=layers, vocab_size=300,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip


def test_more_budget_keeps_more_layers_and_is_kept_to():
    kept = []
    ids = torch.randint(3, 300, (2, 64))
    model = prepare(big(), LoRA(rank=4))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    _, least = keep_what_fits(model, step, 2**40, "adamw")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for budget in (2**40, least, least * 3 // 4):
        found, taken = keep_what_fits(model, step, budget, "adamw")
        kept.append(found)
        assert taken <= budget
        recomputed = [layer.gradient_checkpointing for layer in
                      checkpointed_layers(inner_model(model))]  # fmt: skip
        assert recomputed == [True] * (6 - found) + [False] * found
        with Meter(model) as counting:
            step()
        model.zero_grad(set_to_none=True)
        assert counting.reading().peak_bytes + 8 * trained == taken
    assert kept[0] == kept[1] == 6
    assert 0 <= kept[2] < 6
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(WillNotFitError) as refused:
        keep_what_fits(model, step, least // 4, "adamw")
    assert refused.value.exit_code == 3


def test_a_training_within_its_budget_learns_the_same(tiny_llama: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    texts = [{"text": f"line {n} says {n * n}"} for n in range(24)]
    rows.write_text("".join(json.dumps(r) + "\n" for r in texts), encoding="utf-8")

    def trained(name: str, memory: dict[str, Any]) -> float:
        recipe = qft.build_recipe({
            "model": str(tiny_llama), "task": "text", "strategy": {"name": "lora", "rank": 4},
            "data": {"train": str(rows), "eval": str(rows), "max_duplicate_share": 1},
            "train": {"max_steps": 3, "batch_size": 4, "max_length": 48}, "dtype": "float32",
            "device": "cpu", "memory": memory, "output": str(tmp_path / name),
        })  # fmt: skip
        return qft.train(recipe).metrics["loss"]

    assert trained("a", {"budget": "1GiB"}) == trained("b", {"checkpointing": "full"})
    with pytest.raises(WillNotFitError, match=r"memory\.budget"):
        trained("c", {"budget": "100KiB"})
    with pytest.raises(WillNotFitError, match="as it is"):
        trained("c", {"budget": "100KiB", "checkpointing": "none"})
    with pytest.raises(RecipeError, match="not a size"):
        trained("d", {"budget": "much"})


def test_a_packed_row_is_rehearsed_full(tiny_llama: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    texts = [{"text": f"line {n} says {n * n}"} for n in range(24)]
    rows.write_text("".join(json.dumps(r) + "\n" for r in texts), encoding="utf-8")

    def needed(packing: bool) -> float:
        recipe = qft.build_recipe({
            "model": str(tiny_llama), "task": "text", "strategy": {"name": "lora", "rank": 4},
            "data": {"train": str(rows), "eval": None},
            "train": {"max_steps": 1, "max_length": 128, "packing": packing}, "dtype": "float32",
            "device": "cpu", "output": str(tmp_path / str(packing)),
            "memory": {"checkpointing": "none", "micro_batch": 1},
        })  # fmt: skip
        return qft.train(recipe).report["measured"]["train"]["live_bytes"]

    # without packing, the texts run on in blocks of 128 tokens; packed, rows are as full as can be
    assert needed(True) == pytest.approx(needed(False), rel=0.25)
