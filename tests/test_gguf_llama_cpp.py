"""GGUF's types and mixes, judged by llama.cpp itself (the extra `gguf-test`)."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from test_export import make_model, source_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.gguf_types import Runner, encode_by_ggml, quantize, types
from qft import models
from qft.export.formats import write_format
from qft.export.gguf_format import GGUFPlan
from qft.gguf.mixes import MIXES
from qft.gguf.rounding import encode
from qft.gguf.types import TYPES
from qft.verification.read_back import read_back

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow
torch.set_num_threads(1)
BLOCKED = [kind for kind, stored in TYPES.items() if stored.block > 1]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    yield
    llama_cpp.llama_log_set(ctypes.cast(None, llama_cpp.llama_log_callback), ctypes.c_void_p(0))


@pytest.fixture(scope="module")
def mini(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """mini-6m as a source, and as an f32 file."""
    source = source_of(assets / "models" / "mini-6m")
    out = tmp_path_factory.mktemp("mini") / "f32"
    return source, write_format(source, "gguf:f32", out).path


def lost(encoded: Tensor, kind: str, rows: Tensor, importance: Tensor | None) -> float:
    """The mean squared error; with importance weighted as both sides then weigh it."""
    number = gguf.GGMLQuantizationType(TYPES[kind].number)
    found = torch.from_numpy(gguf.quants.dequantize(encoded.numpy(), number))
    squares = (found - rows).double() ** 2
    if importance is None:
        return float(squares.mean())
    powers = rows.double().unflatten(-1, (-1, TYPES[kind].block)) ** 2
    beside = (powers.mean(-1, keepdim=True) + powers).sqrt().flatten(-2)
    return float((squares * importance * beside).mean())


@pytest.mark.parametrize("kind", BLOCKED)
def test_no_tensor_of_mini_6m_loses_more_than_by_llama_cpp(mini: Any, kind: str) -> None:
    torch.manual_seed(0)
    checked = 0
    for tensor in gguf.GGUFReader(mini[1]).tensors:
        if len(tensor.shape) < 2:
            continue
        rows = torch.from_numpy(tensor.data[:256].copy())
        skewed = torch.randn(rows.shape[1]).mul(1.5).exp()
        for importance in (None, skewed, torch.where(torch.rand(rows.shape[1]) < 0.3, 0, skewed)):
            ours = lost(encode(rows, kind, importance), kind, rows, importance)
            other = lost(encode_by_ggml(rows, kind, importance), kind, rows, importance)
            assert ours <= other, (tensor.name, importance is not None, ours / other)
            checked += 1
    assert checked == 3 * 43


@pytest.mark.parametrize("kind", BLOCKED)
def test_random_and_degenerate_rows_lose_no_more_than_by_llama_cpp(kind: str) -> None:
    torch.manual_seed(0)
    normal = torch.randn(96, 512)
    cases = {
        "normal": normal,
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample((96, 512)),
        "heavy": torch.distributions.StudentT(2.0).sample((96, 512)),
        "sparse": normal * (torch.rand(96, 512) > 0.7),
        "outliers": torch.where(torch.rand(96, 512) > 0.995, 50 * normal, normal),
        "shifted": normal + 3, "positive": torch.rand(96, 512), "huge": normal * 1000,
        "small": normal * 1e-4, "smaller": normal * 1e-6, "subnormal": normal * 1e-39,
        "columns": normal * torch.randn(512).exp(), "zeros": torch.zeros(4, 512),
    }  # fmt: skip
    importances = (None, torch.randn(512).mul(1.5).exp(), torch.rand(512) ** 2 * 4 + 0.01)
    for name, rows in cases.items():
        for importance in importances:
            ours = lost(encode(rows, kind, importance), kind, rows, importance)
            other = lost(encode_by_ggml(rows, kind, importance), kind, rows, importance)
            # of x² ggml's older types take the mean over a whole row, and so weigh otherwise
            assert ours <= other * (1 if importance is None else 1.02), name
    constant = torch.randn(96, 1).expand(96, 512).contiguous()  # whoever's scale rounds luckier
    relative = lost(encode(constant, kind), kind, constant, None) / float((constant**2).mean())
    assert relative < 2.0**-22


def small_models(folder: Path) -> Iterator[Path]:
    """Other shapes and depths."""
    wide = {"hidden_size": 256, "intermediate_size": 512}
    yield make_model(folder / "a", num_hidden_layers=16, num_attention_heads=8,
                     num_key_value_heads=1, **wide)  # fmt: skip
    yield make_model(folder / "b", num_hidden_layers=9, tie_word_embeddings=True, hidden_size=256,
                     intermediate_size=320)  # fmt: skip
    yield make_model(folder / "c", "qwen2", num_hidden_layers=33, num_key_value_heads=1, **wide)
    yield make_model(folder / "d", "mistral", num_hidden_layers=5, intermediate_size=100)
    yield make_model(folder / "e", num_hidden_layers=80, intermediate_size=64)
    yield make_model(folder / "f", "qwen2", num_hidden_layers=80, intermediate_size=64)


def test_every_tensor_of_every_mix_has_the_type_llama_cpp_gives_it(
    assets: Path, tmp_path: Path
) -> None:
    folders = [assets / "models" / "mini-6m", assets / "models" / "stories260K"]
    for folder in [*folders, *small_models(tmp_path)]:
        source = source_of(folder)
        exact = write_format(source, "gguf:f32", tmp_path / f"{folder.name}-f32").path
        for mix in MIXES:
            quantize(exact, tmp_path / "theirs.gguf", mix)
            ours = {tensor.name: tensor.kind.upper() for tensor in GGUFPlan(source, mix).tensors}
            found = {name: kind.upper() for name, kind in types(tmp_path / "theirs.gguf").items()}
            assert ours == found, (folder.name, mix)


PROMPTS = (
    "Once upon a time", "A dog runs", "Translate to German: A man sleeps.", "The king said",
    "def add(a, b):", "How many apples are left?", "I think this film is", "1 + 1 =",
)  # fmt: skip


def greedy_of(runner: Runner, ids: list[int], count: int) -> list[int]:
    """llama.cpp's own choices, one token after another."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(runner.log_probabilities(ids)[-1].argmax()))
    return ids


def test_f16_answers_are_transformers_own(mini: Any, assets: Path, tmp_path: Path) -> None:
    source, _ = mini
    report = write_format(source, "gguf:f16", tmp_path / "out")
    runner = Runner(report.path)
    folder = assets / "models" / "mini-6m"
    tokenizer = models.open_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        assert runner.token_ids(prompt) == ids
        made = model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False,
                              eos_token_id=None, pad_token_id=0)[0].tolist()  # fmt: skip
        assert greedy_of(runner, ids, 64) == made


@pytest.mark.parametrize("model", ["mini-6m", "stories260K"])
@pytest.mark.parametrize("mix", list(MIXES))
def test_every_mix_runs_in_llama_cpp_as_it_is_read_by_gguf(
    assets: Path, tmp_path: Path, mix: str, model: str
) -> None:
    folder = assets / "models" / model
    report = write_format(source_of(folder), f"gguf:{mix}", tmp_path / "out")
    tokenizer = models.open_tokenizer(folder)
    runner, read = Runner(report.path), read_back(report.path)
    text = json.dumps(PROMPTS)
    assert runner.token_ids(text) == tokenizer(text)["input_ids"]
    ids = tokenizer(" ".join(PROMPTS))["input_ids"]
    with torch.no_grad():
        expected = read(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = runner.log_probabilities(ids)
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    # llama.cpp keeps keys and values in float16, and rounds what meets quantized weights.
    exact = {"f32": 2e-5, "f16": 2e-5, "bf16": 2e-3}
    assert kl < exact.get(mix, 5e-3)
