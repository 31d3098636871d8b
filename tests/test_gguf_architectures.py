"""Every architecture and setting as GGUF: the same logits by readers that are not the writer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from gguf_families import make_family

from qft import models
from qft.errors import ModelError
from qft.export.formats import write_format
from qft.merging.merge import open_source
from qft.merging.tensors import MergedTensors
from qft.verification.read_back import read_back

torch.set_num_threads(1)


def rope(kind: str, **changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **changes}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # fmt: skip
LINEAR = rope("linear", factor=4.0)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
YARN_SCALED = rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=0.7)


def longrope(width: int, **changes: Any) -> dict[str, Any]:
    """Factors for heads of which ``width`` numbers are rotated; original context 256."""
    steps = range(width // 2)
    values = rope("longrope", short_factor=[1.0 + 0.1 * step for step in steps],
                  long_factor=[2.0 + 0.5 * step for step in steps],
                  original_max_position_embeddings=256, **changes)  # fmt: skip
    return {**values, "original_max_position_embeddings": 256}


PARTIAL = longrope(8, partial_rotary_factor=0.5)
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-heads": ("Llama", {"head_dim": 32}),
    "llama-llama3": ("Llama", LLAMA3),
    "llama-linear": ("Llama", LINEAR),
    "llama-yarn": ("Llama", YARN),
    "llama-yarn-scaled": ("Llama", YARN_SCALED),
    "llama-longrope": ("Llama", {k: v for k, v in longrope(16, factor=2.0).items()
                                 if k == "rope_parameters"}),
    "mistral": ("Mistral", {}),
    "mistral-heads": ("Mistral", {"head_dim": 32}),
    "mistral-window": ("Mistral", {"sliding_window": 256}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 256,
                               "max_window_layers": 1}),
    "qwen2-yarn": ("Qwen2", YARN),
    "qwen3": ("Qwen3", {}),
    "qwen3-yarn": ("Qwen3", {**YARN, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {}),
    "gemma2-pattern": ("Gemma2", {"layer_types": ["full_attention", "sliding_attention",
                                                  "sliding_attention"]}),
    "gemma3": ("Gemma3", {}),
    "gemma3-linear": ("Gemma3", {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}}),
    "gemma3-untied-capped": ("Gemma3", {"tie_word_embeddings": False,
                                        "final_logit_softcapping": 4.0}),
    "phi3": ("Phi3", {}),
    "phi3-window": ("Phi3", {"sliding_window": 256}),
    "phi3-longrope": ("Phi3", longrope(16)),
    "phi3-partial": ("Phi3", PARTIAL),
    "gpt2": ("GPT2", {}),
    "gpt2-inner": ("GPT2", {"n_inner": 96, "tie_word_embeddings": False}),
}  # fmt: skip
# ggml's GELU goes through a table of float16 values
TOLERANCE = {"Gemma2": 2e-2, "Gemma3": 2e-2, "GPT2": 2e-2}


def source_of(folder: Path) -> MergedTensors:
    return open_source(folder, models.open_skeleton(folder, models.ModelSpec(source=str(folder))))


def written(tmp_path: Path, case: str, kind: str = "f32") -> tuple[Path, Path]:
    """The model's folder and its GGUF file."""
    family, changes = DECODERS[case]
    base = make_family(family, tmp_path / "base", **changes)
    return base, write_format(source_of(base), f"gguf:{kind}", tmp_path / "out").path


def prompt(length: int) -> torch.Tensor:
    return torch.randint(4, 260, (1, length), generator=torch.Generator().manual_seed(3))


def lengths(case: str) -> tuple[int, int]:
    """Of a text within, and one beyond, the original context; none beyond a window not run."""
    return 24, 120 if "gpt2" in case else 256 if "window" in case else 400


def expected_logits(base: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits[0]


@pytest.mark.parametrize("case", DECODERS)
def test_the_same_logits_through_the_reader(tmp_path, case):
    base, path = written(tmp_path, case)
    found = read_back(path)
    for length in lengths(case):
        tokens = prompt(length)
        with torch.no_grad():
            logits = found(tokens).logits[0]
        expected = expected_logits(base, tokens)
        assert expected.std() > 0.3
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max(), length


@pytest.mark.slow
@pytest.mark.parametrize("case", DECODERS)
def test_the_same_logits_in_llama_cpp(tmp_path, case):
    pytest.importorskip("llama_cpp")
    import llama_cpp_runs

    base, path = written(tmp_path, case)
    family = DECODERS[case][0]
    for length in lengths(case):
        tokens = prompt(length)
        logits = llama_cpp_runs.logits(path, tokens[0].tolist())
        expected = expected_logits(base, tokens)
        scale = expected.abs().max()
        assert (logits - expected).abs().max() < TOLERANCE.get(family, 2e-4) * scale, length
        assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.99
