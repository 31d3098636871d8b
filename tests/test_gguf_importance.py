"""The importance of a matrix's columns for GGUF: the mean of the squares that really reach it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from merge_bases import stir, wrapped
from small_models import make_model, texts
from torch import Tensor, nn

import qft
from qft.adapter_folder import locate_adapter
from qft.calibration import Calibration
from qft.errors import RecipeError
from qft.export.calibration import calibrate_on
from qft.gguf.importance import importance_of
from qft.gguf.rounding import encode
from qft.merging.merge import open_source
from qft.merging.tensors import MergedTensors
from qft.models import ModelSpec, open_skeleton
from qft.source_stream import SourceTensors
from qft.verification.subject import locate


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def met_by(model: nn.Module, calibration: Calibration) -> dict[str, Tensor]:
    """The same by transformers alone: each row without its padding, every linear layer hooked."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Any:
        def before(module: Any, given: tuple[Tensor, ...]) -> None:
            squares = given[0].double().square().flatten(0, 1)
            sums[name] = sums.get(name, 0) + squares.sum(0)
            counts[name] = counts.get(name, 0) + len(squares)

        return before

    hooks = [
        module.register_forward_pre_hook(watch(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    with torch.no_grad():
        for batch in calibration.batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                model(input_ids=ids[mask.bool()][None])
    for hook in hooks:
        hook.remove()
    return {name: (value / counts[name]).float() for name, value in sums.items()}


def padded(tokenizer: Any) -> tuple[dict[str, Tensor], ...]:
    """Rows of different lengths in three batches."""
    rows = [row["text"] for row in texts(12)]
    batches = []
    for start in range(0, 12, 4):
        batch = tokenizer(rows[start : start + 4], padding=True, return_tensors="pt")
        assert not bool(batch["attention_mask"].all())
        batches.append({key: batch[key] for key in ("input_ids", "attention_mask")})
    return tuple(batches)


def require_equal(found: Any, expected: dict[str, Tensor], source: MergedTensors) -> None:
    modules = {source.module(name): value for name, value in found.items()}
    assert modules.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(modules[name], value, rtol=1e-3, atol=1e-7), name


def test_on_a_real_model_with_an_adapter(assets: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM, LoraConfig
    from transformers import AutoTokenizer

    base = assets / "models" / "mini-6m"
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = wrapped(base, config)
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    found = locate_adapter(tmp_path / "adapter", base=str(base))
    calibration = Calibration(padded(AutoTokenizer.from_pretrained(base)), 12, "rows.jsonl", "")
    source = open_source(base, open_skeleton(base, found.spec()), adapter=found.folder,
                         strategy=found.strategy, dtype=torch.float32)  # fmt: skip
    importance = importance_of(source, calibration)
    merged = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", dtype=torch.float32
    ).merge_and_unload()
    expected = met_by(merged.eval(), calibration)
    del expected["lm_head.weight"]  # tied: an embedding in the file
    require_equal(importance.columns, expected, source)
    again = importance_of(source, calibration)
    assert all(torch.equal(again.columns[n], v) for n, v in importance.columns.items())
    assert importance.metadata() == {
        "quantize.imatrix.dataset": "rows.jsonl",
        "quantize.imatrix.entries_count": len(expected),
        "quantize.imatrix.chunks_count": 12,
    }


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_head_of_its_own_and_matrices_stored_the_other_way(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "gpt2":
        folder = gpt2(tmp_path / "base")
    else:
        folder = make_model(kind, tmp_path / "base", tie_word_embeddings=False)
    read = []
    former = SourceTensors.read
    monkeypatch.setattr(
        SourceTensors, "read", lambda self, name: read.append(name) or former(self, name)
    )
    data = write_rows(tmp_path / "rows.jsonl", texts(9))
    calibration = calibrate_on(locate(folder, task="text"), str(data))
    skeleton = open_skeleton(folder, ModelSpec(str(folder), dtype=torch.float32))
    source = open_source(folder, skeleton)
    columns = importance_of(source, calibration).columns
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = met_by(model, calibration)
    if kind == "gpt2":
        del expected["lm_head.weight"]
        fused = {source.module(name): value.shape for name, value in columns.items()}
        assert fused["transformer.h.0.attn.c_attn.weight"] == (32,)
        assert fused["transformer.h.0.mlp.c_proj.weight"] == (128,)
    else:
        assert "lm_head.weight" in expected
    require_equal(columns, expected, source)
    assert "lm_head.weight" not in read  # what it is given is known without it


def gpt2(folder: Path) -> Path:
    from conftest import make_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=2, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose columns matter very differently, with rows beside it."""
    from transformers import AutoModelForCausalLM

    room = tmp_path_factory.mktemp("room")
    folder = make_model("llama", room / "base", hidden_size=64, vocab_size=260)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(torch.randn(64).exp())
    model.save_pretrained(folder)
    write_rows(room / "rows.jsonl", texts(16))
    return folder


def export(base: Path, out: Path, **settings: Any) -> tuple[dict[str, Any], gguf.GGUFReader]:
    report = qft.export(base, out, format="gguf:q4_0", verify=False, **settings)
    return report, gguf.GGUFReader(report["path"])


def test_an_export_rounds_by_it_and_says_so(lopsided: Path, tmp_path: Path) -> None:
    rows = str(lopsided.parent / "rows.jsonl")
    _, plain = export(lopsided, tmp_path / "plain")
    report, fitted = export(lopsided, tmp_path / "fitted", calibration_data=rows)
    said = "rounded where it matters on 7 rows of rows.jsonl: 28 matrices"
    assert said in report["notes"], report["notes"]
    fields = {key: field.contents() for key, field in fitted.fields.items() if "imatrix" in key}
    assert fields == {"quantize.imatrix.dataset": "rows.jsonl",
                      "quantize.imatrix.entries_count": 28,
                      "quantize.imatrix.chunks_count": 7}  # fmt: skip
    assert not any("imatrix" in key for key in plain.fields)
    calibration = calibrate_on(locate(lopsided, task="text"), rows)
    source = open_source(lopsided, open_skeleton(lopsided, ModelSpec(str(lopsided))))
    columns = importance_of(source, calibration).columns
    errors = []
    for reader in (plain, fitted):
        stored = {tensor.name: tensor for tensor in reader.tensors}
        held = stored["blk.2.ffn_up.weight"]
        weight = torch.from_numpy(gguf.dequantize(held.data, held.tensor_type))
        name = "model.layers.2.mlp.up_proj.weight"
        apart = (weight - source.read(name).float()).square()
        errors.append(float((apart * columns[name]).sum()))
    assert errors[1] < 0.9 * errors[0]
    written = tmp_path / "fitted" / "model-q4_0.gguf"
    _, _ = export(lopsided, tmp_path / "again", calibration_data=rows)
    assert written.read_bytes() == (tmp_path / "again" / "model-q4_0.gguf").read_bytes()


def test_each_matrix_is_rounded_by_its_own_columns(lopsided: Path, tmp_path: Path) -> None:
    """Also where its rows are reordered, as Llama's queries' and keys' are."""
    rows = str(lopsided.parent / "rows.jsonl")
    _, reader = export(lopsided, tmp_path / "out", calibration_data=rows)
    calibration = calibrate_on(locate(lopsided, task="text"), rows)
    source = open_source(lopsided, open_skeleton(lopsided, ModelSpec(str(lopsided))))
    columns = importance_of(source, calibration).columns
    for name, written in (("self_attn.q_proj", "attn_q"), ("mlp.gate_proj", "ffn_gate")):
        name = f"model.layers.1.{name}.weight"
        stored = next(t for t in reader.tensors if t.name == f"blk.1.{written}.weight")
        weight = source.read(name).float()
        if written == "attn_q":
            weight = weight.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
        kind = stored.tensor_type.name.lower()
        expected = encode(weight, kind, columns[name])
        assert torch.equal(torch.from_numpy(stored.data.copy()).reshape(-1), expected.reshape(-1))
        assert not torch.equal(expected, encode(weight, kind))


def test_it_is_asked_for_and_needs_rows(lopsided: Path, tmp_path: Path) -> None:
    rows = str(lopsided.parent / "rows.jsonl")
    for format in ("gguf:f16", "gguf:q8_0"):
        with pytest.raises(RecipeError, match="rounds each number by itself"):
            qft.export(lopsided, tmp_path / "out", format=format, verify=False, calibrate=True,
                       calibration_data=rows)  # fmt: skip
    with pytest.raises(RecipeError, match="no rows to fit"):
        qft.export(lopsided, tmp_path / "out", format="gguf:q4_0", verify=False, calibrate=True)
    assert not (tmp_path / "out").exists()
