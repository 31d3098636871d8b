"""The main job on a real model: stories260K learns Shakespeare, is merged, and leaves as GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qft
from qft.scoring import evaluate as score
from qft.shards import ShardedCheckpoint

HEADS, KV_HEADS = 8, 4
IDS = torch.arange(3, 67).reshape(2, 32)


@pytest.fixture(scope="module")
def run(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> qft.training.RunResult:  # type: ignore[name-defined]
    """Trained on the beginning of the text, held out its end."""
    folder = tmp_path_factory.mktemp("stories")
    text = (assets / "data/text/tinyshakespeare/input.txt").read_text(encoding="utf-8")
    (folder / "train.txt").write_text(text[:-60_000], encoding="utf-8")
    (folder / "eval.txt").write_text(text[-25_000:], encoding="utf-8")
    values: dict[str, Any] = {
        "model": str(assets / "models/stories260K"),
        "task": "text",
        "data": {"train": str(folder / "train.txt"), "eval": str(folder / "eval.txt")},
        "strategy": {"name": "lora", "rank": 16},
        "dtype": "float32",
        "device": "cpu",
        "memory": {"checkpointing": "none", "micro_batch": 8},
        "train": {"max_steps": 20, "batch_size": 16, "max_length": 256, "learning_rate": 5e-3},
        "output": str(folder / "run"),
    }
    return qft.train(qft.build_recipe(values))


@pytest.fixture(scope="module")
def merged(run: Any) -> Path:
    folder: Path = run.folder.parent / "merged"
    report = qft.merge(run.folder, folder, verify=True)
    assert report["verification"]["passed"]
    return folder


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def test_the_held_out_loss_falls(assets: Path, run: Any) -> None:
    before = score(
        str(assets / "models/stories260K"), data=str(run.folder.parent / "eval.txt"),
        max_length=256,
    )  # fmt: skip
    assert 4.5 < before["loss"] < 5.1
    assert run.metrics["loss"] < 3.3
    assert run.metrics["bits_per_byte"] < before["bits_per_byte"]


def test_merged_and_adapter_agree(run: Any, merged: Path) -> None:
    adapted = qft.open_any(str(run.folder), dtype=torch.float32, device="cpu").model
    whole = qft.open_any(str(merged), dtype=torch.float32, device="cpu").model
    torch.testing.assert_close(logits(whole), logits(adapted), rtol=1e-6, atol=1e-5)
    assert torch.equal(logits(run.model), logits(adapted))
    base = run.report["base"]
    assert base == "stories260K"


def test_the_gguf_holds_every_tensor_of_the_merged_model(run: Any, merged: Path) -> None:
    """Straight from base and adapter, without the merged folder; read back by `gguf` alone."""
    report = qft.export(run.folder, run.folder.parent / "gguf", format="gguf:f16")
    assert report["verification"]["passed"]
    assert abs(report["verification"]["perplexity"] - run.metrics["perplexity"]) < 0.05
    stored = {t.name: t for t in gguf.GGUFReader(report["path"]).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 5)
    checkpoint = ShardedCheckpoint(merged)
    assert len(checkpoint.names()) == 47
    for name in checkpoint.names():
        found = stored.pop(names.get_name(name, try_suffixes=(".weight",)))
        values = np.array(found.data, dtype=np.float32)
        expected = checkpoint.read(name).numpy()
        if expected.ndim == 2:
            assert found.tensor_type == gguf.GGMLQuantizationType.F16
            expected = expected.astype(np.float16).astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            values = unpermuted(values, HEADS if "q_proj" in name else KV_HEADS)
        assert np.array_equal(values, expected), name
    assert not stored, "the tied head is not stored twice"


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """From llama.cpp's order (pairs beside each other) to transformers' (two halves)."""
    width = rows.shape[0] // heads
    pairs = rows.reshape(heads, width // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)
