"""Whole models with zeros: streamed, resumed, metered, through `qft prune`."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qft
from qft.errors import ModelError, RecipeError
from qft.input_hessian import add_inputs_, factorise_, new_hessian
from qft.lean.meter import Meter, meter
from qft.models import ModelSpec
from qft.pruning import smallest, zeros
from qft.pruning.anatomy import open_anatomy
from qft.pruning.smallest import prune_by_magnitude_, prune_by_wanda_
from qft.pruning.sparse_layers import by_sparsegpt, by_wanda, prune_layers
from qft.pruning.sparse_targets import sparse_targets
from qft.pruning.sparsegpt import prune_by_sparsegpt_
from qft.pruning.sparsity import Sparsity, parse_sparsity
from qft.shards import ShardedCheckpoint

SMALL = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0,
}  # fmt: skip
HALF, TWO_OF_FOUR = Sparsity(0.5), parse_sparsity(None, "2:4")
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)  # of a Llama layer, in the order in which they are called
METHODS = ("magnitude", "wanda", "sparsegpt")


def write_model(folder: Path, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **sizes}))
    for parameter in model.parameters():
        parameter.data.mul_(3.0) if parameter.dim() > 1 else None
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import make_tokenizer

    folder = write_model(tmp_path_factory.mktemp("llama"))
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    drawn = random.Random(0)
    lines = [" ".join(str(drawn.random()) for _ in range(2 + n % 3)) for n in range(40)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for number in range(count):
        mask = torch.ones(4, 16, dtype=torch.int64)
        mask[0, 9 + number :] = 0
        ids = torch.randint(1, 260, (4, 16), generator=generator) * mask
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    return found


def whole_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def inputs_of(model: Any, layer: nn.Module) -> dict[str, Tensor]:
    """What comes into each linear layer over all text, ``[tokens, in]``, from the whole model."""
    seen: dict[str, list[Tensor]] = {}
    text: list[Tensor] = []

    def watch(name: str) -> Any:
        def before(_: Any, arguments: Any) -> None:
            seen.setdefault(name, []).append(arguments[0][text[-1]])

        return before

    hooks = [
        m.register_forward_pre_hook(watch(n))
        for n, m in layer.named_modules()
        if isinstance(m, nn.Linear)
    ]
    for batch in batches():
        text.append(batch["attention_mask"].bool())
        with torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def pruned_as_a_whole(folder: Path, method: str, wanted: Sparsity) -> dict[str, Tensor]:
    """The methods with the whole model in memory, every pass from the first token on."""
    model = whole_model(folder)
    for layer in model.model.layers:
        if method == "wanda":
            inputs = inputs_of(model, layer)
            for name, x in inputs.items():
                weight = layer.get_submodule(name).weight.data
                prune_by_wanda_(weight, x.norm(dim=0), wanted)
            continue
        for group in GROUPS:
            inputs = inputs_of(model, layer)
            for name in group:
                held = new_hessian(inputs[name].shape[1])
                add_inputs_(held, inputs[name])
                weight = layer.get_submodule(name).weight.data
                prune_by_sparsegpt_(weight, factorise_(held), wanted)
    return {name: tensor for name, tensor in model.state_dict().items() if "proj" in name}


def streamed(
    folder: Path, method: str, wanted: Sparsity, out: Path, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    anatomy = open_anatomy(folder, ModelSpec(str(folder), dtype=dtype, device="cpu"))
    by = {"wanda": by_wanda, "sparsegpt": by_sparsegpt}[method]
    targets = sparse_targets(anatomy, wanted)
    places = prune_layers(anatomy, targets, batches(), by, wanted, out)
    found: dict[str, Tensor] = {}
    for place in places:
        with ShardedCheckpoint(place) as kept:
            found |= {targets[name].module: kept.read(name) for name in kept.names()}
    return found


@pytest.mark.parametrize("wanted", [HALF, TWO_OF_FOUR], ids=str)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_streamed_model_is_pruned_as_one_in_memory(
    llama: Path, tmp_path: Path, method: str, wanted: Sparsity
):
    expected = pruned_as_a_whole(llama, method, wanted)
    found = streamed(llama, method, wanted, tmp_path / "layers")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name] == 0, tensor == 0), name
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)
        share = (tensor == 0).float().mean()
        assert share == 0.5


def test_what_is_computed_in_16_bits_is_stored_as_it_was(llama: Path, tmp_path: Path):
    before = {n: t for n, t in whole_model(llama).state_dict().items() if "proj" in n}
    found = streamed(llama, "wanda", HALF, tmp_path / "layers", torch.bfloat16)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name].masked_fill(tensor == 0, 0)), "nothing is rounded"


# --- a run that is cut off


def child(folder: str, rows: str, out: str, die_at: int) -> None:
    torch.set_num_threads(1)
    from qft.pruning import sparse_layers

    plain, written = sparse_layers.write_manifest, [0]

    def write_manifest(place: Path) -> None:
        plain(place)
        written[0] += 1
        if written[0] == die_at:  # everything is there but the name
            os.kill(os.getpid(), signal.SIGKILL)

    sparse_layers.write_manifest = write_manifest
    prune_by_half(folder, rows, out)


def prune_by_half(folder: str, rows: str, out: str) -> None:
    qft.prune(folder, out, method="sparsegpt", ratio=0.5, data=rows, report=False, dtype="float32")


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_a_killed_run_goes_on_to_the_same_bytes(
    llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    prune_by_half(str(llama), str(rows), str(whole))
    arguments = (str(llama), str(rows), str(killed), 3)
    process = multiprocessing.get_context("forkserver").Process(target=child, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not killed.exists()
    layers = tmp_path / ".pruning-killed/sparsegpt-0.5"
    assert sorted(p.name for p in layers.glob("layer*")) == ["layer-00000", "layer-00001"]
    damaged = layers / "layer-00001/model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)

    made: list[int] = []

    def watched(layer: Any, *arguments: Any) -> None:
        made.append(layer.index)
        by_sparsegpt(layer, *arguments)

    monkeypatch.setattr(zeros, "by_sparsegpt", watched)
    prune_by_half(str(llama), str(rows), str(killed))
    assert made == [1, 2], "what is whole is used; what is damaged is made again"
    assert hashes(killed) == hashes(whole)
    assert not layers.parent.exists()


# --- memory


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_one_layer_is_in_memory_and_what_the_method_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
):
    """The same peak for twice as many layers, and no more than the parts add up to."""
    monkeypatch.setattr(smallest, "PIECE", 2**10)
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 256, "intermediate_size": 256}
    peaks = []
    for layers in (1, 2):
        folder = write_model(tmp_path / str(layers), num_hidden_layers=layers, **sizes)
        anatomy = open_anatomy(folder, ModelSpec(str(folder), dtype=torch.float32, device="cpu"))
        by = {"wanda": by_wanda, "sparsegpt": by_sparsegpt}[method]
        targets = sparse_targets(anatomy, HALF)
        with Meter(device="cpu") as counting:
            prune_layers(anatomy, targets, batches(), by, HALF, tmp_path / f"out{layers}")
        peaks.append(counting.reading().peak_bytes)
    assert peaks[1] <= peaks[0] * 1.01
    config = LlamaConfig(**{**SMALL, **sizes, "num_hidden_layers": 1})
    alone = LlamaModel(config).eval().requires_grad_(False)
    layer_bytes = sum(p.numel() * 4 for p in alone.layers[0].parameters())
    batch = {k: v for k, v in batches()[0].items() if k != "labels"}
    with torch.no_grad():
        within = meter(lambda: alone(**batch), model=alone)
    # every batch's hidden states and other arguments, and what one needs within the layer
    activations = 3 * 4 * 16 * 256 * 4 + within.peak_bytes - within.most["weights"]
    allowed = (layer_bytes + activations) * 1.1
    assert allowed < 2 * layer_bytes
    if method == "sparsegpt":
        strips = 6 * 128 * 256 * 4
        allowed += 256 * 256 * 4 + strips
    assert layer_bytes < peaks[1] <= allowed


# --- as a user calls it


@pytest.mark.parametrize("asked", [{"ratio": 0.5}, {"pattern": "2:4"}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_prune_writes_an_ordinary_model_with_zeros(
    llama: Path, rows: Path, tmp_path: Path, method: str, asked: dict[str, Any]
):
    result = qft.prune(
        str(llama), tmp_path / "out", method=method, data=str(rows), dtype="float32", **asked
    )
    before, after = whole_model(llama).state_dict(), whole_model(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    found = weights = 0
    for name, tensor in after.items():
        if "proj" not in name:
            assert torch.equal(tensor, before[name]), name
            continue
        assert (tensor == 0).float().mean() == 0.5, name
        if "pattern" in asked:
            assert ((tensor == 0).view(-1, 4).sum(1) == 2).all(), name
        kept = tensor != 0
        assert torch.equal(tensor[kept], before[name][kept]) == (method != "sparsegpt"), name
        found, weights = found + int((tensor == 0).sum()), weights + tensor.numel()
    report = json.loads((tmp_path / "out/pruning.json").read_text())
    assert report["layers"] == result["layers"] == {"zeros": found, "weights": weights}
    assert report["sparsity"] == ("2:4" if "pattern" in asked else "0.5")
    assert report["before"] == report["after"]
    assert report["quality"]["after"]["loss"] > 0
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert not (tmp_path / ".pruning-out").exists()
    if method == "magnitude":
        state = before["model.layers.1.mlp.down_proj.weight"].clone()
        prune_by_magnitude_(state, TWO_OF_FOUR if "pattern" in asked else HALF)
        assert torch.equal(after["model.layers.1.mlp.down_proj.weight"], state)


def test_an_encoder_is_pruned_too(tiny_bert: Path, rows: Path, tmp_path: Path):
    labelled = tmp_path / "rows.jsonl"
    lines = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    labelled.write_text(
        "".join(json.dumps({"text": t, "label": "ab"[n % 2]}) + "\n" for n, t in enumerate(lines))
    )
    found = qft.prune(
        str(tiny_bert), tmp_path / "out", method="sparsegpt", ratio=0.5, data=str(labelled),
        task="classify", dtype="float32", report=False,
    )  # fmt: skip
    assert found["layers"]["zeros"] * 2 == found["layers"]["weights"] > 0


def test_the_command_line(llama: Path, rows: Path, tmp_path: Path):
    from typer.testing import CliRunner

    from qft.cli import app

    runner = CliRunner()
    words = ["prune", str(llama), "--method", "wanda", "--pattern", "2:4", "--data", str(rows)]
    done = runner.invoke(app, [*words, "--out", str(tmp_path / "out"), "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    assert "zeros in the layers" in done.output
    assert "50.0%" in done.output
    dry = runner.invoke(app, [*words, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "100.0%" in dry.output


@pytest.mark.parametrize(
    "asked, said",
    [({"method": "wanda", "pattern": "5:4"}, "n must be less than m"),
     ({"method": "wanda", "pattern": "2:4", "ratio": 0.5}, "one of the two"),
     ({"method": "magnitude"}, "one of the two"),
     ({"method": "sparsegpt", "ratio": 1.5}, "between 0 and 1"),
     ({"method": "magnitude", "pattern": "1:3"}, "cut into the pattern's groups"),
     ({"method": "magnitude", "ratio": 0.5, "size": "1MiB"}, "keeps its shape"),
     ({"method": "magnitude", "ratio": 0.5, "layers": "1"}, "keeps its shape"),
     ({"method": "wanda", "ratio": 0.5, "importance": "taylor"}, "no such importance"),
     ({"method": "wanda", "ratio": 0.5, "data": None}, "rows of yours"),
     ({"method": "depth", "pattern": "2:4"}, "knows no pattern")],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_anything_is(
    llama: Path, rows: Path, tmp_path: Path, asked: dict[str, Any], said: str
):
    with pytest.raises((RecipeError, ModelError), match=said) as caught:
        qft.prune(str(llama), tmp_path / "out", **{"data": str(rows), **asked})
    assert caught.value.fix
    assert caught.value.where
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_folder_is_refused(llama: Path, tmp_path: Path):
    import shutil

    folder = tmp_path / "quantized"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"(?s)stored quantized.*int8"):
        qft.prune(str(folder), tmp_path / "out", method="magnitude", ratio=0.5)


def test_layers_that_are_no_linear_layers_are_refused(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    anatomy = open_anatomy(tmp_path / "gpt2", ModelSpec("gpt2", device="cpu"))
    with pytest.raises(ModelError, match=r"(?s)no linear layer's.*Conv1D"):
        sparse_targets(anatomy, HALF)


def test_a_weight_that_no_row_reaches_is_said(llama: Path, tmp_path: Path):
    anatomy = open_anatomy(llama, ModelSpec(str(llama), device="cpu"))
    targets = sparse_targets(anatomy, HALF)

    def blind(by: Any) -> Any:
        def prune(layer: Any, weights: Any, wanted: Sparsity) -> None:
            weights.linears["never.weight"] = nn.Linear(4, 4)
            by(layer, weights, wanted)

        return prune

    for number, by in enumerate((by_wanda, by_sparsegpt)):
        with pytest.raises(ModelError, match="never come to a weight") as caught:
            prune_layers(anatomy, targets, batches(), blind(by), HALF, tmp_path / str(number))
        assert "never.weight" in caught.value.text()


def test_padding_says_nothing(llama: Path, tmp_path: Path):
    """The same rows with more padding: the same zeros."""
    longer = [
        {k: torch.nn.functional.pad(v, (0, 5)) for k, v in batch.items()} for batch in batches()
    ]
    anatomy = open_anatomy(llama, ModelSpec(str(llama), device="cpu"))
    targets = sparse_targets(anatomy, HALF)
    found: list[Sequence[Path]] = [
        prune_layers(anatomy, targets, rows, by_wanda, HALF, tmp_path / str(number))
        for number, rows in enumerate((batches(), longer))
    ]
    for one, other in zip(*found, strict=True):
        with ShardedCheckpoint(one) as left, ShardedCheckpoint(other) as right:
            for name in left.names():
                assert torch.equal(left.read(name) == 0, right.read(name) == 0)
