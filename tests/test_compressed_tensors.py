"""compressed-tensors folders, judged by the library of that name and by plain transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_bases import make_base, open_base, outputs, stir, wrapped
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qft import models, quantization, write_journal
from qft.adapter_folder import locate_adapter
from qft.calibration import Calibration
from qft.column_sweep import sweep_
from qft.errors import ModelError, VerificationError
from qft.export import error_compensation
from qft.export.compressed_schemes import SCHEMES, quantization_config, scheme_in
from qft.export.error_compensation import Target, fit_matrix_
from qft.export.formats import write_format
from qft.export.integer_rounding import IntegerGrid, find_scales, from_integers, pack, to_integers
from qft.input_hessian import add_inputs_, factorise_, new_hessian
from qft.merging import bnb_rounding
from qft.merging.merge import open_source
from qft.merging.tensors import MergedTensors
from qft.verification.read_back import read_back
from qft.verification.subject import locate
from qft.verification.tensors_check import check_tensors
from qft.verification.thresholds import stored_format
from qft.verification.verify import verify

library = pytest.importorskip("compressed_tensors")
compressors = pytest.importorskip("compressed_tensors.compressors")
described = pytest.importorskip("compressed_tensors.quantization")

torch.set_num_threads(1)
SHAPE = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def save_llama(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))
    stir(model, 0.1)
    model.save_pretrained(folder)
    return folder


def source_of(folder: Path, task: str = "text") -> MergedTensors:
    spec = models.ModelSpec(source=str(folder), task=task)
    return open_source(folder, models.open_skeleton(folder, spec))


def written(folder: Path, kind: str, out: Path, task: str = "text", **settings: Any) -> Path:
    source = source_of(folder, task)
    done: list[int] = []
    write_format(source, f"compressed-tensors:{kind}", out, progress=done.append, **settings)
    assert sum(done) == source.total_bytes()
    return out


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = models.read_config(folder)["quantization_config"]
    return values


def rows(seed: int = 0, count: int = 6, length: int = 24) -> Calibration:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    return Calibration((batch,), count, "rows.jsonl", f"seed {seed}")


def layers_in(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Every quantized layer's tensors by their own names, and the scheme that is meant for it."""
    found: dict[str, dict[str, Tensor]] = {}
    stored = load_file(folder / "model.safetensors")
    for name in stored:
        if name.endswith(".weight_scale"):
            owner = name.removesuffix(".weight_scale")
            parts = [n for n in stored if n.startswith(f"{owner}.weight")]
            found[owner] = {n.removeprefix(f"{owner}."): stored[n] for n in parts}
    return found


def scheme_of(folder: Path, owner: str) -> Any:
    checked = described.QuantizationConfig.model_validate(config_of(folder))
    named = [s for s in checked.config_groups.values() if owner in s.targets]
    return named[0] if named else list(checked.config_groups.values())[-1]


def by_library(folder: Path) -> dict[str, Tensor]:
    """The weights as the library's own decompressor gives them."""
    found = {}
    for owner, parts in layers_in(folder).items():
        scheme = scheme_of(folder, owner)
        kind = compressors.BaseCompressor.get_value_from_registry(scheme.format)
        found[f"{owner}.weight"] = kind.decompress(parts, scheme)["weight"]
    return found


# --- what config.json says


@pytest.mark.parametrize("kind, preset", [("w4a16", "W4A16"), ("w8a8", "W8A8")])
def test_the_scheme_is_the_librarys_own_preset(llama: Path, tmp_path: Path, kind: str, preset: str):
    values = config_of(written(llama, kind, tmp_path / "out"))
    checked = described.QuantizationConfig.model_validate(values)
    expected = described.preset_name_to_scheme(preset, ["Linear"])
    expected.format = SCHEMES[kind].format
    assert checked.config_groups == {"group_0": expected}
    assert checked.ignore == ["lm_head"]
    assert checked.quantization_status == "compressed"
    assert checked.format == SCHEMES[kind].format
    assert values["version"] == library.__version__
    ours = {k: v for k, v in values.items() if k in checked.model_dump()}
    assert ours == {k: v for k, v in checked.model_dump(mode="json").items() if k in ours}


def test_w8a16_has_a_scale_a_row(llama: Path, tmp_path: Path):
    (group,) = config_of(written(llama, "w8a16", tmp_path / "out"))["config_groups"].values()
    assert (group["weights"]["num_bits"], group["weights"]["strategy"]) == (8, "channel")
    assert group["input_activations"] is None


@pytest.mark.parametrize("kind", list(SCHEMES))
def test_a_folder_says_its_own_name(llama: Path, tmp_path: Path, kind: str):
    out = written(llama, kind, tmp_path / "out")
    assert stored_format(out) == f"compressed-tensors:{kind}"
    assert scheme_in(config_of(out)) == kind


def test_another_scheme_is_none_of_ours():
    values = quantization_config(SCHEMES["w4a16"], {"a": 128}, [])
    values["config_groups"]["group_0"]["weights"]["num_bits"] = 3
    assert scheme_in(values) is None
    assert scheme_in({"config_groups": {"group_0": ["Linear"]}}) is None


# --- layout and values


@pytest.mark.parametrize("kind", list(SCHEMES))
def test_the_tensors_are_what_the_library_makes_of_the_same_scales(
    llama: Path, tmp_path: Path, kind: str
):
    out = written(llama, kind, tmp_path / "out")
    before = load_file(llama / "model.safetensors")
    layers = layers_in(out)
    assert len(layers) == 14
    for owner, parts in layers.items():
        given = {"weight": before[f"{owner}.weight"], "weight_scale": parts["weight_scale"]}
        scheme = scheme_of(out, owner)
        maker = compressors.BaseCompressor.get_value_from_registry(scheme.format)
        expected = maker.compress(given, scheme)
        assert expected.keys() == parts.keys()
        for name, tensor in expected.items():
            assert tensor.dtype == parts[name].dtype
            assert torch.equal(tensor, parts[name]), f"{owner}.{name}"
    untouched = {n: t for n, t in load_file(out / "model.safetensors").items() if n in before}
    assert all(torch.equal(t, before[n]) for n, t in untouched.items() if t.dtype != torch.int8)
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= set(untouched)


@pytest.mark.parametrize("width", [128, 90, 7])
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_undone_by_the_library(bits: int, width: int):
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    integers = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, width), dtype=torch.int8)
    assert torch.equal(unpack_from_int32(pack(integers, bits), bits, integers.shape), integers)


@pytest.mark.parametrize("kind", list(SCHEMES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_transformers_runs_the_dequantized_weights(
    llama: Path, tmp_path: Path, kind: str, dtype: torch.dtype
):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(llama, dtype=dtype).save_pretrained(base)
    out = written(base, kind, tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
    found = outputs(model.eval())
    expected = AutoModelForCausalLM.from_pretrained(base).eval()
    plain = outputs(expected)
    for name, weight in by_library(out).items():
        assert torch.equal(model.get_parameter(name), weight)
        assert weight.dtype == dtype
        expected.get_parameter(name).data.copy_(weight)
    if kind != "w8a8":  # which rounds inputs as well
        assert torch.equal(found, outputs(expected))
    assert 0 < (found - plain).float().abs().max() < 0.5 * plain.float().abs().max()


def test_rows_that_128_does_not_divide(tmp_path: Path):
    base = save_llama(tmp_path / "base", hidden_size=192, intermediate_size=90)
    source = source_of(base)
    notes = write_format(source, "compressed-tensors:w4a16", tmp_path / "out").notes
    assert [note.split(" have")[0] for note in notes] == [
        "2 layer(s) with rows of 90 weights", "12 layer(s) with rows of 192 weights",
    ]  # fmt: skip
    assert "one scale a row" in notes[0]
    assert "a scale for 64 weights" in notes[1]
    layers = layers_in(tmp_path / "out")
    assert layers["model.layers.1.mlp.down_proj"]["weight_scale"].shape == (192, 1)
    assert layers["model.layers.1.mlp.up_proj"]["weight_scale"].shape == (90, 3)
    groups = config_of(tmp_path / "out")["config_groups"]
    assert [g["targets"] for g in groups.values()] == [
        ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"], ["Linear"],
    ]  # fmt: skip
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = open_base(base)
    for name, weight in by_library(tmp_path / "out").items():
        expected.get_parameter(name).data.copy_(weight)
    assert torch.equal(outputs(opened), outputs(expected))


def test_searched_scales_lose_less_than_those_of_the_largest_weight():
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    weight[:, 5] *= 6
    for grid, share in ((IntegerGrid(4, 128), 0.95), (IntegerGrid(8), 0.99)):
        found = find_scales(weight, grid, torch.bfloat16)
        largest = weight.unflatten(1, (grid.groups(256), -1)).abs().amax(-1) / grid.most
        errors = [
            (from_integers(to_integers(weight, s, grid), s).float() - weight).square().sum()
            for s in (found, largest.to(torch.bfloat16))
        ]
        assert errors[0] < share * errors[1]
    counts = torch.ones(256)
    counts[5] = 1e4  # all that matters now
    found = find_scales(weight, IntegerGrid(8), torch.float32, counts)
    exact = from_integers(to_integers(weight, found, IntegerGrid(8)), found)
    plain = find_scales(weight, IntegerGrid(8), torch.float32)
    other = from_integers(to_integers(weight, plain, IntegerGrid(8)), plain)
    assert (exact - weight)[:, 5].square().sum() < 0.5 * (other - weight)[:, 5].square().sum()


@pytest.mark.parametrize("value, message", [(math.nan, "not finite"), (math.inf, "not finite")])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, value: float, message: str):
    base = save_llama(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message) as caught:
        write_format(source_of(base), "compressed-tensors:w4a16", tmp_path / "out")
    assert "model.layers.1.mlp.up_proj.weight" in caught.value.text()
    assert not (tmp_path / "out").exists()


def test_zeros_stay_zeros():
    zeros = torch.zeros(2, 128)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        scales = find_scales(zeros, IntegerGrid(4, 64), dtype)
        assert bool((scales > 0).all())
        assert not from_integers(to_integers(zeros, scales, IntegerGrid(4, 64)), scales).any()


# --- other models


def test_a_tied_head_stays_the_embeddings(tmp_path: Path):
    base = save_llama(tmp_path / "base", tie_word_embeddings=True)
    out = written(base, "w4a16", tmp_path / "out")
    assert config_of(out)["ignore"] == ["lm_head"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_encoder_with_its_head(tmp_path: Path):
    open_base(make_base("bert", tmp_path / "bare"), "classify").save_pretrained(tmp_path / "base")
    source = source_of(tmp_path / "base", "classify")
    report = write_format(source, "compressed-tensors:w8a16", tmp_path / "out", calibration=rows())
    assert report.notes == ("12 layers were fitted to 6 rows of rows.jsonl",)
    assert config_of(tmp_path / "out")["ignore"] == ["classifier"]
    found, info = open_base(tmp_path / "out", "classify", output_loading_info=True)
    assert not info["missing_keys"]
    expected = outputs(open_base(tmp_path / "base", "classify"), "classify")
    assert not torch.equal(outputs(found, "classify"), expected)
    assert torch.allclose(outputs(found, "classify"), expected, atol=0.02)


@pytest.mark.parametrize(
    "kind, task, message",
    [("gpt2", "text", "transposed"), ("t5", "seq2seq", "Encoder-decoders")],
)
def test_what_the_format_cannot_express_is_refused(
    tmp_path: Path, kind: str, task: str, message: str
):
    base = make_base(kind, tmp_path / "base")
    with pytest.raises(ModelError, match=message):
        write_format(source_of(base, task), "compressed-tensors:w4a16", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_straight_from_base_and_adapter(tmp_path: Path):
    from peft import LoraConfig

    base = save_llama(tmp_path / "base")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = wrapped(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    found = locate_adapter(tmp_path / "adapter")
    source = open_source(base, models.open_skeleton(base, found.spec()),
                         adapter=found.folder, strategy=found.strategy)  # fmt: skip
    report = write_format(source, "compressed-tensors:w8a16", tmp_path / "out")
    assert report.delta_rounding is not None
    assert report.delta_rounding.kept == pytest.approx(1, abs=0.02)
    merged = adapted.merge_and_unload()
    for name, weight in by_library(tmp_path / "out").items():
        wanted = merged.get_parameter(name).data
        assert (weight - wanted).abs().max() <= 0.02 * wanted.abs().max()


# --- error compensation


def test_error_compensation_is_what_the_paper_says(monkeypatch: pytest.MonkeyPatch):
    """Against GPTQ written down plainly: the inverse, its Cholesky factor, column after column."""
    monkeypatch.setattr(error_compensation, "_BLOCK", 64)
    torch.manual_seed(0)
    x = torch.randn(200, 128) @ torch.randn(128, 128)
    weight = torch.randn(16, 128)
    hessian = new_hessian(128)
    add_inputs_(hessian, x)
    diagonal = hessian.diagonal().flip(0).clone()
    target = Target((16, 128), IntegerGrid(4, 32), torch.float32)
    own = weight.clone()
    integers, scales = fit_matrix_(own, factorise_(hessian), diagonal, target)
    assert torch.equal(from_integers(integers, scales), own)

    plain = (x.T @ x).double()
    plain += 0.01 * plain.diagonal().mean() * torch.eye(128)
    upper = torch.linalg.cholesky(torch.linalg.inv(plain), upper=True)
    rest, expected = weight.double(), torch.empty(16, 128, dtype=torch.int8)
    for j in range(128):
        if j % 32 == 0:
            part = rest[:, j : j + 32].float()
            scale = find_scales(part, IntegerGrid(4), torch.float32, diagonal[j : j + 32]).double()
        expected[:, j] = (rest[:, j] / scale[:, 0]).round().clamp(-8, 7)
        lost = (rest[:, j] - expected[:, j] * scale[:, 0]) / upper[j, j]
        rest[:, j:] -= lost[:, None] * upper[None, j, j:]
    assert (integers != expected).float().mean() < 0.01  # where a half is rounded either way
    nearest = find_scales(weight, IntegerGrid(4, 32), torch.float32)
    plainly = from_integers(to_integers(weight, nearest, IntegerGrid(4, 32)), nearest)
    errors = [(x @ (w - weight).T).square().sum() for w in (own, plainly)]
    assert errors[0] < 0.5 * errors[1]


def test_what_changes_nothing_makes_nothing_move():
    torch.manual_seed(0)
    weight, hessian = torch.randn(4, 20), new_hessian(20)
    add_inputs_(hessian, torch.randn(50, 20))
    before = weight.clone()
    sweep_(weight, factorise_(hessian), 8, lambda begin, at, columns, pivots: columns[at].clone())
    assert torch.equal(weight, before)


def test_layers_are_fitted_to_rows(llama: Path, tmp_path: Path):
    calibration = rows()
    source = source_of(llama)
    report = write_format(source, "compressed-tensors:w4a16", tmp_path / "fitted",
                          calibration=calibration)  # fmt: skip
    assert report.notes == ("14 layers were fitted to 6 rows of rows.jsonl",)
    assert report.delta_rounding is None
    names = {path.name for path in (tmp_path / "fitted").iterdir()}
    assert names <= {"config.json", "generation_config.json", "model.safetensors"}
    plain = written(llama, "w4a16", tmp_path / "plain")
    written(llama, "w4a16", tmp_path / "again", calibration=calibration)
    other = written(llama, "w4a16", tmp_path / "other", calibration=rows(1))
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("fitted", "again")]
    assert files[0] == files[1] != (other / "model.safetensors").read_bytes()
    assert layers_in(plain).keys() == layers_in(other).keys()
    given = {k: v for k, v in calibration.batches[0].items() if k != "labels"}
    text = given["attention_mask"].bool()
    with torch.no_grad():
        wanted = open_base(llama)(**given).logits[text].log_softmax(-1)
        lost = [
            nn.functional.kl_div(model(**given).logits[text].log_softmax(-1), wanted,
                                 log_target=True, reduction="batchmean")
            for model in (read_back(tmp_path / "fitted"), read_back(plain))
        ]  # fmt: skip
    assert lost[0] < 0.7 * lost[1]


def test_a_fit_that_was_killed_goes_on(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = written(llama, "w4a16", tmp_path / "whole", calibration=rows())
    fit, fitted = error_compensation.fit_layer, []

    def killed(layer: Any, *arguments: Any) -> Any:
        if layer.index == 1:
            raise KeyboardInterrupt
        return fit(layer, *arguments)

    def counted(layer: Any, *arguments: Any) -> Any:
        fitted.append(layer.index)
        return fit(layer, *arguments)

    monkeypatch.setattr(error_compensation, "fit_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        written(llama, "w4a16", tmp_path / "out", calibration=rows())
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(error_compensation, "fit_layer", counted)
    out = written(llama, "w4a16", tmp_path / "out", calibration=rows())
    assert fitted == [1]  # the other one was kept
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


# --- writing


@pytest.mark.parametrize("kind", list(SCHEMES))
def test_blocks_of_rows_make_the_same_file(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    whole = written(llama, kind, tmp_path / "whole")
    monkeypatch.setattr(bnb_rounding, "_NUMBERS", 128 * 5)
    parts = written(llama, kind, tmp_path / "parts")
    one, other = ((f / "model.safetensors").read_bytes() for f in (whole, parts))
    assert one == other


def test_a_write_that_was_killed_goes_on(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(write_journal, "_EVERY_BYTES", 1)
    expected = written(llama, "w4a16", tmp_path / "whole")
    source, asked = source_of(llama), []
    pair, stop = source.pair, "model.layers.1.mlp.up_proj.weight"

    def watched(name: str, part: slice) -> Any:
        if name == stop:
            raise KeyboardInterrupt
        asked.append(name)
        return pair(name, part)

    monkeypatch.setattr(source, "pair", watched)
    with pytest.raises(KeyboardInterrupt):
        write_format(source, "compressed-tensors:w4a16", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    stop, done = "", asked[:]
    asked.clear()
    out = tmp_path / "out"
    write_format(source, "compressed-tensors:w4a16", out)
    assert done
    assert not set(done) & set(asked)
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


# --- reading back


def test_the_missing_library_is_one_clear_error(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import importlib.util

    out = written(llama, "w8a8", tmp_path / "out")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda n, *a: None if n == "compressed_tensors" else find(n, *a),
    )
    with pytest.raises(ModelError, match="compressed-tensors") as caught:
        read_back(out)
    assert "qft-toolkit[compressed-tensors]" in caught.value.text()
    with pytest.raises(ModelError):
        quantization.require_library("compressed-tensors", out)


def test_a_missing_tensor_is_found(llama: Path, tmp_path: Path):
    out = written(llama, "w4a16", tmp_path / "out")
    assert check_tensors(locate(out)) == []
    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight_packed"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (finding,) = check_tensors(locate(out))
    assert "model.layers.0.self_attn.q_proj.weight" in finding.text


@pytest.fixture(scope="module")
def mini(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """mini-6m as w4a16, its reference, and text."""
    folder = assets / "models/mini-6m"
    out = written(folder, "w4a16", tmp_path_factory.mktemp("mini") / "out")
    text = (assets / "data/text/tinyshakespeare/input.txt").read_text("utf-8")[:5000]
    ids = models.open_tokenizer(folder)(text)["input_ids"][: 4 * 128]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {"out": out, "reference": reference,
            "batches": [{"input_ids": torch.tensor(ids).view(4, 128)}]}  # fmt: skip


def judged(mini: dict[str, Any], folder: Path) -> Any:
    artefact = read_back(folder, dtype=torch.float32)
    format = "compressed-tensors:w4a16"
    return verify(mini["reference"], artefact, mini["batches"], format=format)


def test_a_real_model_passes(mini: dict[str, Any]):
    found = judged(mini, mini["out"])
    found.check()
    assert found.mean_kl < 0.02
    assert len(found.layers) == 7  # weights are there before anything runs


def swapped(parts: dict[str, Tensor]) -> None:
    """Scales of the other group of the same row, as a reader of another order would take them."""
    parts["weight_scale"] = parts["weight_scale"].flip(1).contiguous()


def doubled(parts: dict[str, Tensor]) -> None:
    """A wrong scale."""
    parts["weight_scale"] *= 2


def turned(parts: dict[str, Tensor]) -> None:
    """The high four bits of each byte first."""
    packed = parts["weight_packed"].view(torch.uint8)
    parts["weight_packed"] = ((packed << 4) | (packed >> 4)).view(torch.int32)


@pytest.mark.parametrize("fault, everywhere", [(doubled, False), (turned, False), (swapped, True)])
def test_planted_faults_are_caught(
    mini: dict[str, Any], tmp_path: Path, fault: Any, everywhere: bool
):
    import shutil

    bad = Path(shutil.copytree(mini["out"], tmp_path / "bad"))
    tensors = load_file(bad / "model.safetensors")
    for owner, parts in layers_in(bad).items():
        if everywhere or owner.startswith("model.layers.3."):
            fault(parts)
            tensors |= {f"{owner}.{name}": tensor for name, tensor in parts.items()}
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError):
        judged(mini, bad).check()


def test_a_wrong_group_is_caught(mini: dict[str, Any], tmp_path: Path):
    import shutil

    bad = Path(shutil.copytree(mini["out"], tmp_path / "bad"))
    values = json.loads((bad / "config.json").read_text())
    values["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64
    (bad / "config.json").write_text(json.dumps(values))
    with pytest.raises(Exception, match=r"size|shape|mismatch"):  # transformers' own words
        read_back(bad, dtype=torch.float32)
