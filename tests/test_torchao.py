"""torchao:int8, judged by torchao itself and by plain transformers; both tests skip without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_bases import make_base, open_base, outputs
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from qft import models
from qft.errors import ModelError
from qft.export.formats import write_format
from qft.merging.merge import open_source
from qft.verification.read_back import read_back
from qft.verification.subject import locate
from qft.verification.tensors_check import check_tensors
from qft.verification.thresholds import stored_format

torch.set_num_threads(1)


def written(folder: Path, out: Path, task: str = "text") -> Path:
    spec = models.ModelSpec(source=str(folder), task=task)
    source = open_source(folder, models.open_skeleton(folder, spec))
    write_format(source, "torchao:int8", out)
    return out


def described(folder: Path) -> dict[str, Any]:
    """What each file's header says of its tensors: name → values."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = {k: json.loads(v) for k, v in file.metadata().items() if k != "format"}
    assert sorted(found.pop("tensor_names")) == sorted(found)
    for values in found.values():
        values.get("_tensor_data_names", []).sort()
    return found


def shapes(folder: Path) -> dict[str, tuple[Any, str]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    return {name: (s.get_shape(), s.get_dtype()) for name, s in slices.items()}


def test_the_missing_library_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    out = written(make_base("tied", tmp_path / "base"), tmp_path / "out")
    assert stored_format(out) == "torchao:int8"
    assert check_tensors(locate(out)) == []
    find = importlib.util.find_spec

    def without(name: str, *package: Any) -> Any:
        return None if name == "torchao" else find(name, *package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ModelError, match="torchao") as caught:
        read_back(out)
    assert "qft-toolkit[torchao]" in caught.value.text()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folder_is_what_transformers_saves(tmp_path: Path, dtype: torch.dtype):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    base = make_base("llama", tmp_path / "base", dtype)
    out = written(base, tmp_path / "out")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head"])
    saved = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=config)
    saved.save_pretrained(tmp_path / "saved")
    assert described(out) == described(tmp_path / "saved")
    assert shapes(out) == shapes(tmp_path / "saved")
    configs = [models.read_config(f)["quantization_config"] for f in (out, tmp_path / "saved")]
    assert configs[0] == configs[1]
    opened, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    weight = opened.model.layers[1].mlp.up_proj.weight
    assert type(weight.data).__name__ == "Int8Tensor"
    expected = open_base(base)
    for name, parameter in opened.named_parameters():
        if type(parameter.data).__name__ == "Int8Tensor":
            expected.get_parameter(name).data.copy_(parameter.dequantize())
    assert type(opened.lm_head.weight.data) is torch.Tensor
    close = 1e-2 if dtype == torch.float32 else 6e-2  # bfloat16's own arithmetic
    assert torch.allclose(outputs(opened).float(), outputs(expected), atol=close)


@pytest.mark.slow
def test_an_encoder_with_its_head(tmp_path: Path):
    pytest.importorskip("torchao")
    open_base(make_base("bert", tmp_path / "bare"), "classify").save_pretrained(tmp_path / "base")
    out = written(tmp_path / "base", tmp_path / "out", "classify")
    found = open_base(out, "classify")
    assert type(found.classifier.weight.data) is torch.Tensor
    expected = outputs(open_base(tmp_path / "base", "classify"), "classify")
    assert torch.allclose(outputs(found, "classify"), expected, atol=0.02)
    assert outputs(read_back(out, task="classify"), "classify").shape == expected.shape


@pytest.mark.slow
def test_a_real_model_passes(tmp_path: Path, assets: Path, write_rows: Any):
    pytest.importorskip("torchao")
    import qft

    text = (assets / "data/text/tinyshakespeare/input.txt").read_text("utf-8")
    rows = write_rows([{"text": text[n * 300 : (n + 1) * 300]} for n in range(16)])
    report = qft.export(str(assets / "models/mini-6m"), tmp_path / "out", format="torchao:int8",
                        data=str(rows))  # fmt: skip
    assert report["verification"]["passed"]
    assert report["verification"]["mean_kl"] < 1e-3
    assert len(report["verification"]["layers"]) == 7
