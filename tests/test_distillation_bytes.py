"""What a teacher adds to a step's peak, in exact bytes on fake tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from adapters.lora import LoRA
from qft.bench.step import StepSettings, TeacherSettings, meter_step
from qft.lean.meter import Reading

LENGTH, VOCABULARY = 2048, 128256
CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files with a student's config and a larger teacher's."""
    folder = tmp_path_factory.mktemp("shapes")
    larger = {"hidden_size": 128, "num_hidden_layers": 3, "tie_word_embeddings": False}
    made = {"student": CONFIG, "teacher": {**CONFIG, **larger}}
    for name, values in made.items():
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return {name: str(folder / f"{name}.json") for name in made}


def metered(shapes: dict[str, str], teacher: TeacherSettings | None) -> Reading:
    settings = StepSettings(shapes["student"], length=LENGTH, checkpointing="none")
    return meter_step(settings, LoRA(rank=4), teacher)


def parameters_bytes(quantized: bool) -> int:
    """Of the teacher: embeddings and output layer in bf16, three layers."""
    tables = 2 * VOCABULARY * 128 * 2
    linear = 128 * 128 + 128 * 64 * 2 + 128 * 128 + 3 * 64 * 128
    return tables + 3 * linear * (1 if quantized else 2)


@pytest.mark.parametrize("top_k", [8, 128])
def test_a_cached_teacher_costs_next_to_nothing(shapes: dict[str, str], top_k: int):
    plain = metered(shapes, None)
    cached = metered(shapes, TeacherSettings(shapes["teacher"], top_k=top_k))
    kept = (4 + 2) * top_k * LENGTH  # tokens and log-probabilities
    assert cached.peak_bytes <= plain.peak_bytes + kept
    assert cached.peak_bytes <= 1.03 * plain.peak_bytes
    assert cached.static_bytes == plain.static_bytes


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_teacher_in_memory_costs_its_weights_and_its_states(
    shapes: dict[str, str], quantize: Any
):
    """No logits of it, ``tokens x vocabulary``, which were 1 GiB in float32 here."""
    plain = metered(shapes, None)
    live = TeacherSettings(shapes["teacher"], quantize=quantize)
    found = metered(shapes, live)
    weights = found.static_bytes - plain.static_bytes
    assert weights == pytest.approx(parameters_bytes(quantize != "none"), rel=0.01)
    states = LENGTH * 128 * 2
    allowed = plain.peak_bytes + weights + 2 * states
    assert found.peak_bytes <= allowed + 0.01 * plain.peak_bytes
    alone = metered(shapes, replace(live, weight=1.0))
    assert alone.peak_bytes <= found.peak_bytes
