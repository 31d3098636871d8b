"""A model quantized once: saved, opened and trained on without quantizing again, then merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

import qft
from qft.errors import AdapterError, ModelError, RecipeError
from qft.models import ModelSpec, fingerprint, open_model

WORDS = " ".join(f"word{i} is {i * i}" for i in range(120))
IDS = torch.arange(4, 60)[None]


@pytest.fixture(scope="module")
def stored(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, saved in 4 bits."""
    folder = tmp_path_factory.mktemp("stored") / "nf4"
    qft.export(tiny_llama, folder, format="bnb:nf4", verify=False)
    return folder


def job(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    (folder / "train.txt").write_text(WORDS, encoding="utf-8")
    return {
        "model": str(model),
        "task": "text",
        "data": {"train": str(folder / "train.txt"), "eval_share": 0.2},
        "strategy": {"name": "lora", "rank": 4},
        "dtype": "float32",
        "device": "cpu",
        "train": {"max_steps": 4, "batch_size": 2, "max_length": 32, "learning_rate": 1e-2},
        "output": str(folder / "run"),
        **changes,
    }


def four_bit(model: nn.Module) -> dict[str, bnb.nn.Linear4bit]:
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def test_the_folder_says_what_it_was_made_from(tiny_llama: Path, stored: Path) -> None:
    config = json.loads((stored / "config.json").read_text(encoding="utf-8"))
    assert config["qft_original_fingerprint"] == fingerprint(tiny_llama)
    assert fingerprint(stored) != fingerprint(tiny_llama)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_trained_without_quantizing_again(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str
) -> None:
    def never(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("the weights were quantized again")

    monkeypatch.setattr(bnb.functional, "quantize_4bit", never)
    result = qft.train(qft.build_recipe(job(stored, tmp_path, quantize=quantize)))
    assert result.report["quantize"] == "nf4"
    plain = open_model(stored, ModelSpec(str(stored), dtype=torch.float32, device="cpu"))
    before, after = four_bit(plain), four_bit(result.model)
    assert len(before) == 14
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].weight.data, after[n].weight.data) for n in before)
    again = qft.open_any(str(result.folder), dtype=torch.float32, device="cpu")
    assert torch.equal(logits(again.model), logits(result.model))


def test_merged_with_the_original_that_is_named(
    tiny_llama: Path, stored: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    run = qft.train(qft.build_recipe(job(stored, tmp_path))).folder
    with pytest.raises(ModelError, match="--base ORIGINAL"):
        qft.merge(run, tmp_path / "merged", onto="original")
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    change_one_value(other)
    with pytest.raises(AdapterError, match="another base"):
        qft.merge(run, tmp_path / "merged", base=str(other))
    assert not (tmp_path / "merged").exists()

    report = qft.merge(run, tmp_path / "merged", base=str(tiny_llama), onto="original", verify=True)
    assert report["changed"] == 14
    assert report["verification"]["passed"]
    name = "model.layers.1.mlp.down_proj"
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    up, down = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "BA")
    expected = load_file(tiny_llama / "model.safetensors")[f"{name}.weight"] + 2.0 * (up @ down)
    found = load_file(tmp_path / "merged/model.safetensors")[f"{name}.weight"]
    assert (found - expected).abs().max() < 1e-6
    config = json.loads((tmp_path / "merged/config.json").read_text(encoding="utf-8"))
    assert not {"quantization_config", "qft_original_fingerprint"} & set(config)


def change_one_value(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_run_is_exported_from_the_original(
    tiny_llama: Path, stored: Path, tmp_path: Path
) -> None:
    """In 4 bits again, rounded once; and that folder is a base like any other."""
    run = qft.train(qft.build_recipe(job(stored, tmp_path))).folder
    with pytest.raises(ModelError, match="--base ORIGINAL"):
        qft.export(run, tmp_path / "out", format="bnb:nf4", onto="original")
    report = qft.export(run, tmp_path / "out", format="bnb:nf4", base=str(tiny_llama))
    assert report["verification"]["passed"]
    qft.merge(run, tmp_path / "merged", base=str(tiny_llama), onto="original")
    config = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    assert config["qft_original_fingerprint"] == fingerprint(tmp_path / "merged")

    from_merged = tmp_path / "from-merged"
    qft.export(tmp_path / "merged", from_merged, format="bnb:nf4", verify=False)
    spec = ModelSpec("", dtype=torch.float32, device="cpu")
    models = [open_model(folder, spec) for folder in (tmp_path / "out", from_merged)]
    assert torch.equal(*map(logits, models))


def test_a_new_head_on_a_stored_base_is_not_quantized(stored: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{w} {i}", "label": w} for i in range(4) for w in ("yes", "no")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    values = job(stored, tmp_path, task="classify", data={"train": str(tmp_path / "rows.jsonl")})
    for strategy in ("head", "lora"):
        changes = {"strategy": {"name": strategy}, "output": str(tmp_path / strategy)}
        model = qft.train(qft.build_recipe(values | changes)).model
        heads = [m for n, m in model.named_modules() if "score" in n and not list(m.children())]
        assert heads
        assert all(type(head) is nn.Linear for head in heads)
        assert len(four_bit(model)) == 14


def test_stored_in_another_way_than_asked(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="stored nf4, asked int8"):
        qft.train(qft.build_recipe(job(stored, tmp_path, quantize="int8")))


def test_what_needs_original_weights_says_so(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapters.lora import LoRA
    from qft.strategy import Needs

    monkeypatch.setattr(LoRA, "needs", lambda self, skeleton: Needs(original_weights=True))
    with pytest.raises(RecipeError, match="needs the unquantized weights"):
        qft.train(qft.build_recipe(job(stored, tmp_path)))
