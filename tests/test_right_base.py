"""The base an adapter is folded into: as training saw it, or the original, and which is better."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import bitsandbytes.functional as functional
import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import qft
from adapters.lora import LoRA
from qft import models, quantization
from qft.card import make_card, write_card
from qft.errors import ModelError, RecipeError
from qft.export.right_base import place_and_word
from qft.four_bit import unpack_rows
from qft.merging.merge import open_source
from qft.merging.rounded_base import RoundedBase, Rounding, layers_of
from qft.models import ModelSpec, fingerprint
from qft.progress import Reporter
from qft.registry import settings_of
from qft.shards import ShardedCheckpoint
from qft.verification.thresholds import THRESHOLDS, Thresholds

torch.set_num_threads(1)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few rows, so that small models have many."""
    from qft import shards

    plain = shards.row_blocks
    for module in ("qft.shards", "qft.merging.tensors", "qft.merging.bnb_rounding"):
        monkeypatch.setattr(f"{module}.row_blocks", lambda shape, n=0: plain(shape, 700))


def llama(folder: Path, dtype: torch.dtype = torch.float32, width: int = 40) -> Path:
    """Rows of 40 and 72 weights: groups of 64 do not end with them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=width, intermediate_size=72, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 4
    model.to(dtype).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def gpt2(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_embd=40, n_inner=72, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).to(dtype).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def loaded(base: Path, kind: str, dtype: torch.dtype, **settings: Any) -> nn.Module:
    """The model as transformers and bitsandbytes really load it."""
    config: Any = quantization.loading_config(kind, dtype, ["lm_head"])
    for key, value in settings.items():
        setattr(config, key, value)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
    )
    return model


def dequantized(model: nn.Module) -> dict[str, Tensor]:
    """By the weight's name, what bitsandbytes itself makes of each quantized layer."""
    found = {}
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if type(weight).__name__ == "Params4bit":
            found[f"{name}.weight"] = functional.dequantize_4bit(weight.data, weight.quant_state)
        elif type(weight).__name__ == "Int8Params":
            found[f"{name}.weight"] = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return found


def turned(expected: dict[str, Tensor], base: Path) -> dict[str, Tensor]:
    """As the model's own modules hold them: GPT-2's transposed."""
    transposed = "GPT2LMHeadModel" in models.read_config(base)["architectures"]
    return {name: t.T if transposed else t for name, t in expected.items()}


def skeleton_of(base: Path) -> nn.Module:
    return models.open_skeleton(base, ModelSpec(str(base)))


# --- what is read is what bitsandbytes' loaded model computes with


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize(
    "stored,trained", [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float32")]
)
def test_rounded_as_bitsandbytes_rounds_on_loading(
    tmp_path, small_blocks, make, kind, stored, trained
):
    base = make(tmp_path / "base", DTYPES[stored])
    expected = turned(dequantized(loaded(base, kind, DTYPES[trained])), base)
    layers = layers_of(base, skeleton_of(base), ["lm_head"])
    opened = RoundedBase(ShardedCheckpoint(base), Rounding(kind, layers, DTYPES[trained]))
    assert {n.removeprefix("transformer.") for n in expected} == {
        n.removeprefix("transformer.") for n in layers
    }
    names = models.module_names(base, skeleton_of(base))
    for name in opened.names():
        whole = opened.read(name)
        if names[name] not in expected:
            assert torch.equal(whole, ShardedCheckpoint(base).read(name)), name
            continue
        value = expected[names[name]]
        assert torch.equal(whole, value), name
        assert tuple(value.shape) == opened.shape(name)
        some = [7, 3, len(value) - 1]
        assert torch.equal(opened.read_rows(name, some), value[some])
        assert torch.equal(opened.read_rows(name, range(5, 9)), value[5:9])
        assert torch.equal(opened.read_columns(name, range(2, 5)), value[:, 2:5])
        assert opened.read_rows(name, range(0)).shape == (0, value.shape[1])
        with pytest.raises(IndexError, match="has no row"):
            opened.read_rows(name, [len(value)])


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(
    "kind,settings",
    [
        ("nf4", {}),
        ("fp4", {"bnb_4bit_use_double_quant": False}),
        ("nf4", {"bnb_4bit_quant_storage": torch.bfloat16}),
        ("int8", {}),
    ],
)
def test_what_transformers_has_saved_quantized_reads_as_it_loads(
    tmp_path, small_blocks, make, kind, settings
):
    base = make(tmp_path / "base", torch.bfloat16)
    model = loaded(base, kind, torch.bfloat16, **settings)
    expected = turned(dequantized(model), base)
    model.save_pretrained(tmp_path / "stored", max_shard_size="30KB")
    source = open_source(tmp_path / "stored", skeleton_of(tmp_path / "stored"))
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    tied = {"lm_head.weight"} if make is gpt2 else set()
    assert {source.module(n) for n in source.names()} - tied == plain.keys() - tied
    for name in source.names():
        module = source.module(name)
        value = expected.get(module, plain[module]).to(source.dtype(name))
        assert torch.equal(source.read(name), value), name
        assert torch.equal(torch.cat(list(source.blocks(name))), value), name
    assert not {"quantization_config", "qft_original_fingerprint"} & set(source.config)


@pytest.mark.parametrize(
    "part,change,message",
    [
        ("weight.absmax", lambda t: t[:-1], "wanted"),
        ("weight.nested_absmax", lambda t: t.double(), "wanted"),
        ("weight", lambda t: t[:-1], "for"),
        ("weight.quant_state.bitsandbytes__nf4",
         lambda t: state(t, shape=[1 << 40, 40]), "for"),
        ("weight.quant_state.bitsandbytes__nf4",
         lambda t: state(t, blocksize=3), "blocksize"),
        ("weight.quant_state.bitsandbytes__nf4",
         lambda t: state(t, nested_offset=math.inf), "nested_offset"),
        ("weight.quant_state.bitsandbytes__nf4", lambda t: state(t, dtype="os.system"), "KeyError"),
        ("weight.quant_state.bitsandbytes__nf4", lambda t: t[:-30], "Error"),
        ("weight.quant_state.bitsandbytes__nf4", lambda t: t.repeat(1000), "shape"),
    ],
)  # fmt: skip
def test_a_hostile_quantized_layer_is_refused(nf4_llama, tmp_path, part, change, message):
    folder = tmp_path / "bad"
    folder.mkdir()
    for file in nf4_llama.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(nf4_llama / "model.safetensors")
    name = f"model.layers.0.mlp.up_proj.{part}"
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="broken or not to be trusted") as caught:
        open_source(folder, skeleton_of(nf4_llama))
    assert message in caught.value.text()


def state(tensor: Tensor, **changes: Any) -> Tensor:
    values = json.loads(bytes(tensor.tolist())) | changes
    return torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)


def test_other_quantizers_stay_refused(tmp_path):
    base = llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be undone") as caught:
        open_source(base, nn.Module())
    assert "--base ORIGINAL" in caught.value.text()


def test_where_the_cpu_kernel_takes_the_wrong_scales(small_blocks):
    """Rows of 96 weights: each weight is its code's value times its own group's scale."""
    torch.manual_seed(0)
    weight = torch.randn(64, 96)
    packed, quantized = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes = torch.stack([packed[:, 0] >> 4, packed[:, 0] & 15], 1).reshape(-1)
    values = functional.get_4bit_type("nf4", device="cpu")[codes.int()]
    expected = (values.view(-1, 64) * quantized.absmax[:, None]).reshape(weight.shape)
    found = unpack_rows(packed, quantized.absmax, "nf4", (64, 96), torch.float32)
    assert torch.equal(found, expected)


# --- adapters on quantized bases


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def nf4_llama(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stored") / "nf4"
    qft.export(base, out, format="bnb:nf4", verify=False)
    return out


def make_adapter(
    folder: Path,
    base: Path,
    updates: dict[str, tuple[Tensor, Tensor]],
    *,
    of: Path | None = None,
    quantize: str = "nf4",
    dtype: str = "float32",
) -> Path:
    """A LoRA folder with a card, as training on ``base`` (quantized on loading) leaves it."""
    up, down = next(iter(updates.values()))
    strategy = LoRA(rank=down.shape[0], alpha=down.shape[0])
    folder.mkdir()
    tensors = {}
    for name, (up, down) in updates.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in updates})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": strategy.rank,
        "lora_alpha": strategy.alpha, "target_modules": targets, "bias": "none",
        "base_model_name_or_path": str(base),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    card = make_card(
        base=str(base), base_fingerprint=fingerprint(base),
        original_fingerprint=None if of is None else fingerprint(of), task="text", labels=None,
        pooling="auto", quantize=quantize, dtype=dtype, strategy=settings_of(strategy),
        max_length=64,
    )  # fmt: skip
    write_card(folder, card)
    return folder


def random_updates(
    base: Path, size: float = 0.02, rank: int = 4
) -> dict[str, tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    weights = {n: t for n, t in load_file(base / "model.safetensors").items() if "proj" in n}
    return {
        name: (torch.randn(t.shape[0], rank) * size, torch.randn(rank, t.shape[1]) * size)
        for name, t in weights.items()
    }


def lost_updates(base: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """What makes up for the rounding wholly: of full rank, W - Q(W)."""
    rounded = dequantized(loaded(base, "nf4", torch.float32))
    original = load_file(base / "model.safetensors")
    found = {}
    for name, value in rounded.items():
        lost = original[name].float() - value.float()
        up, sizes, down = torch.linalg.svd(lost, full_matrices=False)
        root = sizes.sqrt()
        short = 40 - len(root)
        found[name] = (
            nn.functional.pad(up * root, (0, short)),
            nn.functional.pad(root[:, None] * down, (0, 0, 0, short)),
        )
    return found


@pytest.fixture(scope="module")
def rows(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Letters that the original base itself has drawn, so that it is the best model of them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(5)
    ids = model.generate(
        torch.randint(40, 90, (40, 2)), max_new_tokens=100, do_sample=True, top_k=0,
        eos_token_id=None, pad_token_id=0, suppress_tokens=[*range(4), *range(98, 260)],
    )  # fmt: skip
    tokenizer = models.open_tokenizer(base)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [tokenizer.decode(row) for row in ids]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_auto_takes_what_measures_better(base, rows, tmp_path, capsys):
    making_up = make_adapter(tmp_path / "making-up", base, lost_updates(base))
    zero = {n: (up * 0, down) for n, (up, down) in random_updates(base).items()}
    nothing = make_adapter(tmp_path / "nothing", base, zero)
    for adapter, expected in ((making_up, "dequantized"), (nothing, "original")):
        out = tmp_path / f"{adapter.name}-merged"
        report = qft.merge(adapter, out, data=str(rows), reporter=Reporter())
        found = report["base"]
        assert found["onto"] == expected
        assert found["loss"][expected] == min(found["loss"].values())
        assert found["rows"] > 0
        printed = capsys.readouterr().out
        assert f"base: {expected} (loss of the unmerged adapter: " in printed
        for name, loss in found["loss"].items():
            other = qft.merge(adapter, tmp_path / f"{adapter.name}-{name}", onto=name)
            assert other["base"]["loss"] is None
            judged = qft.evaluate(other["out"], data=str(rows), dtype="float32")
            assert judged["loss"] == pytest.approx(loss, abs=2e-4)
    merged = load_file(tmp_path / "making-up-merged" / "model.safetensors")
    original = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    rounded = dequantized(loaded(base, "nf4", torch.float32))[name]
    assert (merged[name] - original[name]).norm() < 1e-3 * (rounded - original[name]).norm()


def test_a_copy_that_qft_quantized_is_a_base_too(base, rows, tmp_path):
    """Of a run whose base was quantized on loading: nothing need be rounded."""
    adapter = make_adapter(tmp_path / "adapter", base, random_updates(base))
    qft.export(base, tmp_path / "copy", format="bnb:nf4", verify=False)
    out = tmp_path / "out"
    report = qft.export(adapter, out, format="bnb:nf4", base=str(tmp_path / "copy"), verify=False)
    assert report["base"]["onto"] == "beside"
    assert (out / "base/model.safetensors").read_bytes() == (
        tmp_path / "copy/model.safetensors"
    ).read_bytes()


def test_without_rows_auto_says_so(base, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", base, random_updates(base))
    report = qft.merge(adapter, tmp_path / "out")
    assert report["base"]["onto"] == "dequantized"
    assert "no held-out rows" in report["base"]["why"]
    assert report["base"]["loss"] is None


def test_merged_into_what_training_saw(base, nf4_llama, tmp_path):
    """Quantized on loading in bfloat16, and stored quantized: base + change, rounded once."""
    updates = random_updates(base)
    name = "model.layers.1.mlp.down_proj.weight"
    change = updates[name][0] @ updates[name][1]
    cases = {
        "loading": (make_adapter(tmp_path / "a", base, updates, dtype="bfloat16"), {},
                    loaded(base, "nf4", torch.bfloat16)),
        "stored": (make_adapter(tmp_path / "b", nf4_llama, updates, of=base), {},
                   loaded(base, "nf4", torch.float32)),
        # a base that was stored quantized, made again from its original
        "again": (tmp_path / "b", {"base": str(base)}, loaded(base, "nf4", torch.float32)),
    }  # fmt: skip
    for case, (adapter, place, model) in cases.items():
        report = qft.merge(adapter, tmp_path / case, onto="dequantized", **place)
        assert report["changed"] == 14
        found = load_file(tmp_path / case / "model.safetensors")
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], change + dequantized(model)[name])
    assert qft.merge(tmp_path / "b", tmp_path / "c")["base"]["onto"] == "dequantized"
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("stored", "c"))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_dora_measures_its_rows_on_the_dequantized_base(base, tmp_path):
    """Against the plain formula: m (W + Δ) / ‖W + Δ‖."""
    updates = random_updates(base)
    adapter = make_adapter(tmp_path / "adapter", base, updates)
    tensors = load_file(adapter / "adapter_model.safetensors")
    lengths = {n: torch.rand(len(up)) + 0.5 for n, (up, _) in updates.items()}
    for name, length in lengths.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_magnitude_vector"] = length
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"use_dora": True}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    qft.merge(adapter, tmp_path / "out", onto="dequantized")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in dequantized(loaded(base, "nf4", torch.float32)).items():
        up, down = updates[name]
        merged = value + up @ down
        expected = lengths[name][:, None] * merged / merged.norm(dim=1, keepdim=True)
        assert (found[name] - expected).abs().max() < 1e-6


def test_loftq_keeps_its_whole_update_on_the_dequantized_base(tiny_llama, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(f"word{i} is {i * i}" for i in range(120)))
    recipe = qft.build_recipe({
        "model": str(tiny_llama), "task": "text", "quantize": "nf4", "dtype": "float32",
        "data": {"train": str(tmp_path / "text.txt"), "eval_share": 0.2}, "device": "cpu",
        "strategy": {"name": "lora", "rank": 4, "initialisation": "loftq"},
        "train": {"max_steps": 2, "batch_size": 2, "max_length": 32, "learning_rate": 1e-3},
        "output": str(tmp_path / "run"),
    })  # fmt: skip
    result = qft.train(recipe)
    report = qft.merge(result.folder, tmp_path / "out", onto="dequantized", verify=True)
    assert report["verification"]["mean_kl"] < 1e-6
    measured = qft.merge(result.folder, tmp_path / "auto")["base"]
    assert set(measured["loss"]) == {"original", "dequantized"}  # the run knows its own rows
    assert measured["rows"] > 0


# --- bnb formats


def merged_in_memory(source: Path, updates: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    tensors = load_file(source / "model.safetensors")
    return {n: t + updates[n][0] @ updates[n][1] if n in updates else t for n, t in tensors.items()}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_original_and_change_are_quantized_together(
    base, rows, tmp_path, small_blocks, monkeypatch, kind
):
    """The packed tensors, and the figures, against a plain computation in memory."""
    # a random model's first choices are close calls
    monkeypatch.setitem(THRESHOLDS, f"bnb:{kind}", Thresholds(1.0, 9.0, 0.0, 9.0))
    updates = random_updates(base, 0.05)
    adapter = make_adapter(tmp_path / "adapter", base, updates, quantize=kind)
    said: list[str] = []
    reporter = Reporter()
    reporter.say = said.append  # type: ignore[method-assign]
    report = qft.export(
        adapter, tmp_path / "out", format=f"bnb:{kind}", data=str(rows), reporter=reporter
    )
    assert report["base"]["onto"] == "original"
    found = load_file(tmp_path / "out" / "model.safetensors")
    merged, plain = merged_in_memory(base, updates), load_file(base / "model.safetensors")
    error = change = along = 0.0
    for name in updates:
        stored, packed = round_whole(merged[name], kind)
        assert torch.equal(found[name], packed)
        alone, _ = round_whole(plain[name], kind)
        delta = (merged[name] - plain[name]).double()
        error += (stored - merged[name]).double().pow(2).sum().item()
        change += delta.pow(2).sum().item()
        along += ((stored - alone).double() * delta).sum().item()
    figures = report["delta_rounding"]
    assert figures["rounding"] == pytest.approx(math.sqrt(error / change), rel=1e-5)
    assert figures["kept"] == pytest.approx(along / change, rel=1e-5)
    written = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert written["delta_rounding"] == figures
    assert written["base"]["onto"] == "original"
    assert math.exp(report["loss"]["result"]) == pytest.approx(written["perplexity"])
    assert any("of which" in line and "loss" in line for line in said)


def round_whole(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """What a weight is stored as, dequantized, and the packed tensor; in one call."""
    if kind == "int8":
        values, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return functional.int8_vectorwise_dequant(values, scales), values
    packed, quantized = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type=kind
    )
    return functional.dequantize_4bit(packed, quantized), packed


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_streamed_export_is_what_transformers_saves(tmp_path, small_blocks, make, kind):
    from qft.export.bnb_format import BnbPlan, write_bnb

    base = make(tmp_path / "base", torch.bfloat16)
    plan = BnbPlan(open_source(base, skeleton_of(base)), kind)
    (tmp_path / "out").mkdir()
    write_bnb(plan, tmp_path / "out", 1 << 30)
    assert plan.delta_rounding() is None
    loaded(base, kind, torch.bfloat16).save_pretrained(tmp_path / "saved")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(tmp_path / "saved" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if "quant_state" in name:  # padded JSON
            assert json.loads(bytes(ours[name].tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            assert torch.equal(ours[name], tensor), name


def hashes(folder: Path, pattern: str = "*") -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob(pattern)}


def test_a_base_that_is_only_stored_quantized_is_kept_byte_for_byte(
    base, nf4_llama, rows, tmp_path
):
    from peft import PeftModel

    updates = random_updates(base)
    adapter = make_adapter(tmp_path / "adapter", nf4_llama, updates, of=base)
    out = tmp_path / "out"
    report = qft.export(adapter, out, format="bnb:nf4", data=str(rows))
    assert report["base"]["onto"] == "beside"
    assert report["delta_rounding"] == {"rounding": 0.0, "kept": 1.0}
    assert report["verification"]["mean_kl"] < 1e-9
    assert (out / "verification.json").is_file()
    assert hashes(out / "base", "*.safetensors") == hashes(nf4_llama, "*.safetensors")
    assert hashes(out / "base") == {
        name: text for name, text in hashes(nf4_llama).items() if name in hashes(out / "base")
    }
    assert hashes(out / "adapter", "*.safetensors") == hashes(adapter, "*.safetensors")

    moved = out.rename(tmp_path / "moved")  # it names nothing outside itself
    nf4_llama_away = nf4_llama.rename(nf4_llama.with_name("away"))
    try:
        ids = torch.arange(10, 40)[None]
        plain = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(moved / "base"), moved / "adapter"
        )
        quantization.guard_cpu_kernels(plain)
        opened = qft.open_any(str(moved))
        with torch.no_grad():
            assert torch.equal(plain(ids).logits, opened.model(ids).logits)
        assert qft.evaluate(str(moved), data=str(rows))["loss"] > 0
        again = qft.export(moved, tmp_path / "again", format="bnb:nf4", verify=False)
        assert again["base"]["onto"] == "beside"
        assert hashes(tmp_path / "again/base") == hashes(moved / "base")
        qft.export(moved, tmp_path / "gguf", format="gguf:f16", data=str(rows))
    finally:
        nf4_llama_away.rename(nf4_llama)


def test_fuse_is_verified_and_warned_about(base, nf4_llama, rows, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", nf4_llama, random_updates(base, 0.02), of=base)
    report = qft.export(adapter, tmp_path / "out", format="bnb:nf4", fuse=True, data=str(rows))
    (note,) = [note for note in report["notes"] if "--fuse" in note]
    figures = report["delta_rounding"]
    assert f"{figures['kept']:.1%} is kept" in note
    assert report["base"]["onto"] == "dequantized"
    assert report["verification"]["passed"]
    together = qft.export(
        adapter, tmp_path / "together", format="bnb:nf4", base=str(base), data=str(rows)
    )
    assert together["base"]["onto"] == "original"
    # a small change of weights on the grid snaps back; of the original ones it survives
    assert figures["kept"] < 0.5 < together["delta_rounding"]["kept"]


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"format": "bnb:nf4", "fuse": True, "verify": False}, "always verified"),
        ({"format": "gguf:f16", "fuse": True}, "--base dequantized"),
        ({"format": "bnb:nf4", "fuse": True, "onto": "original"}, "upon the dequantized base"),
        ({"format": "bnb:int8"}, "--format bnb:nf4 keeps it"),
        ({"format": "bnb:nf4", "onto": "original"}, "--base ORIGINAL"),
        ({"format": "bnb:nf4", "onto": "best"}, "auto, dequantized, original"),
        ({"format": "safetensors:bf16", "onto": "original"}, "--base dequantized"),
    ],
)
def test_refusals_say_what_to_do(base, nf4_llama, rows, tmp_path, arguments, message):
    adapter = make_adapter(tmp_path / "adapter", nf4_llama, random_updates(base), of=base)
    with pytest.raises((RecipeError, ModelError)) as caught:
        qft.export(adapter, tmp_path / "out", **{"data": str(rows), **arguments})
    assert message in caught.value.text()
    assert not (tmp_path / "out").exists()


def test_more_refusals(base, nf4_llama, tmp_path):
    on_loading = make_adapter(tmp_path / "a", base, random_updates(base))
    with pytest.raises(RecipeError, match="rounds the adapter away"):
        qft.export(on_loading, tmp_path / "o", format="bnb:nf4", onto="dequantized", verify=False)
    plain = make_adapter(tmp_path / "b", base, random_updates(base), quantize="none")
    with pytest.raises(RecipeError, match="not trained on a quantized base"):
        qft.merge(plain, tmp_path / "o", onto="dequantized")
    assert qft.merge(plain, tmp_path / "o")["base"]["onto"] == "original"
    with pytest.raises(ModelError, match="round it twice"):
        qft.export(nf4_llama, tmp_path / "p", format="bnb:nf4", verify=False)
    report = qft.export(nf4_llama, tmp_path / "p", format="safetensors:bf16", verify=False)
    assert report["base"]["onto"] == "dequantized"


def test_the_command_lines_base_is_a_place_a_word_or_both():
    assert place_and_word([]) == (None, "auto")
    assert place_and_word(["original"]) == (None, "original")
    assert place_and_word(["dequantized", "./original"]) == ("./original", "dequantized")
    for values in (["a", "b"], ["auto", "original"]):
        with pytest.raises(RecipeError, match="one place and one word"):
            place_and_word(values)
