"""LoRA's kin: each against plain PEFT, saved and reopened, and merged into the original base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qft
from adapters.lora import LoRA
from adapters.lora_start import FIRST_FILE, FIRST_MARK, lora_layers
from adapters.low_rank_targets import linear_names, resolve
from adapters.peft_backed import change_config
from qft.errors import AdapterError, RecipeError
from qft.merging.tensors import ModuleTensors
from qft.models import ModelSpec, module_names, open_model, open_skeleton
from qft.preparation import prepare
from qft.registry import strategy_from_folder
from qft.shards import ShardedCheckpoint
from qft.strategy import Context, Strategy

VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"rank_stabilised": True},
    "dora": {"dora": True},
    "gaussian": {"initialisation": "gaussian"},
    "pissa": {"initialisation": "pissa"},
    "pissa-rs": {"initialisation": "pissa", "rank_stabilised": True},
    "olora": {"initialisation": "olora"},
    "orthogonal": {"initialisation": "orthogonal"},
    "eva": {"initialisation": "eva"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}},
    "rows": {"token_rows": (5, 9), "targets": "attention"},
    "layers": {"layers": (-1,), "targets": "mlp"},
    "globs": {"targets": ("*.0.self_attn.?_proj", "down_proj")},
}
SAME_IN_PEFT: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}},
    "rows": {
        "trainable_token_indices": [5, 9],
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    },
    "layers": {
        "layers_to_transform": [1], "target_modules": ["gate_proj", "up_proj", "down_proj"],
    },
}  # fmt: skip


def opened(folder: Path, **changes: Any) -> nn.Module:
    spec = ModelSpec(str(folder), **{"dtype": torch.float32, "device": "cpu", **changes})
    return open_model(folder, spec)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 260, (4, 24), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=batch()["input_ids"]).logits
    return out


def context(folder: Path, skeleton: nn.Module) -> Context:
    tensors = ModuleTensors(ShardedCheckpoint(folder), module_names(folder, skeleton))
    return Context(calibration=(batch(),) * 2, original_weight=tensors.read)


def attached(strategy: LoRA, folder: Path, **changes: Any) -> nn.Module:
    skeleton = open_skeleton(folder, ModelSpec(str(folder)))
    torch.manual_seed(1)
    return prepare(opened(folder, **changes), strategy, context=context(folder, skeleton))


def train(model: nn.Module, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_begins_where_the_base_is_and_is_saved_and_merged_whole(
    variant: str, tiny_llama: Path, tmp_path: Path
):
    strategy = LoRA(rank=4, **VARIANTS[variant])
    model = attached(strategy, tiny_llama)
    before = logits(opened(tiny_llama))
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=2e-5)
    train(model)
    after = logits(model)
    assert (after - before).abs().max() > 1e-3
    strategy.save(model, tmp_path)

    again = strategy_from_folder(tmp_path)  # as anybody opens it: against the original base
    other = again.attach(opened(tiny_llama), Context())
    again.load(other, tmp_path)
    torch.testing.assert_close(logits(other), after, rtol=1e-4, atol=2e-5)

    resumed = attached(strategy, tiny_llama)  # as a training goes on
    strategy.load(resumed, tmp_path)
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in resumed.named_parameters():
        if name in wanted:
            assert torch.equal(parameter, wanted[name]), name

    merged = merged_into_the_original(again, tmp_path, tiny_llama)
    torch.testing.assert_close(logits(merged), after, rtol=1e-4, atol=2e-5)


def merged_into_the_original(strategy: Strategy, adapter: Path, base: Path) -> nn.Module:
    plain = opened(base)
    tensors = ModuleTensors(ShardedCheckpoint(base), module_names(base, plain))
    merge = strategy.open_merge(adapter, tensors)
    with torch.no_grad():
        for name, value in plain.state_dict().items():
            if name in tensors.names():
                value.copy_(merge.edit(name, value.clone()))
    return plain


SOME = "model.layers.1.mlp.down_proj.weight"


def update_of(model: nn.Module) -> torch.Tensor:
    layer = dict(lora_layers(model))[SOME.removesuffix(".weight")]
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    return layer.scaling["default"] * up @ down


LOFTQ: dict[str, dict[str, Any]] = {
    "loftq": {},
    "loftq-rs": {"rank_stabilised": True, "rank_pattern": {"q_proj": 2}},
    "loftq-dora": {"dora": True},
    "loftq-int8": {},
}


@pytest.mark.parametrize("variant", LOFTQ)
def test_loftq_fits_the_original_and_the_quantized_base(
    variant: str, tiny_llama: Path, tmp_path: Path
):
    from peft import PeftModel

    held = "int8" if variant == "loftq-int8" else "nf4"
    strategy = LoRA(rank=4, initialisation="loftq", **LOFTQ[variant])
    model = attached(strategy, tiny_llama, quantize=held)
    untrained, trained, copied = (tmp_path / name for name in ("untrained", "trained", "copied"))
    for folder in (untrained, trained, copied):
        folder.mkdir()
    strategy.save(model, untrained)
    before = logits(opened(tiny_llama))
    merged = merged_into_the_original(strategy, untrained, tiny_llama)
    torch.testing.assert_close(logits(merged), before, rtol=1e-5, atol=1e-6)

    train(model)
    after = logits(model)
    strategy.save(model, trained)
    again = strategy_from_folder(trained)
    other = again.attach(opened(tiny_llama, quantize=held), Context())
    again.load(other, trained)
    assert torch.equal(logits(other), after)
    again.save(other, copied)
    for file in ("adapter_model.safetensors", FIRST_FILE):
        assert (copied / file).read_bytes() == (trained / file).read_bytes()

    resumed = attached(strategy, tiny_llama, quantize=held)
    strategy.load(resumed, trained)
    assert torch.equal(logits(resumed), after)

    with_peft = PeftModel.from_pretrained(opened(tiny_llama, quantize=held), str(trained))
    assert torch.equal(logits(with_peft), after)

    original = again.attach(opened(tiny_llama), Context())
    again.load(original, trained)
    again.load(original, trained)  # a second time changes nothing
    merged = merged_into_the_original(again, trained, tiny_llama)
    torch.testing.assert_close(logits(merged), logits(original), rtol=1e-4, atol=2e-5)
    learned = update_of(model) - update_of(attached(strategy, tiny_llama, quantize=held))
    if variant != "loftq-dora":  # its rows are stretched as well
        change = merged.get_parameter(SOME) - opened(tiny_llama).get_parameter(SOME)
        torch.testing.assert_close(change, learned, rtol=1e-2, atol=3e-8)
    assert learned.norm() > 1e-5


def test_a_loftq_folder_without_its_beginning_is_refused(tiny_llama: Path, tmp_path: Path):
    strategy = LoRA(rank=4, initialisation="loftq")
    model = attached(strategy, tiny_llama, quantize="nf4")
    strategy.save(model, tmp_path)
    first = load_file(tmp_path / FIRST_FILE)
    save_file({name: tensor[:2].contiguous() for name, tensor in first.items()},
              tmp_path / FIRST_FILE)  # fmt: skip
    with pytest.raises(AdapterError, match="another adapter"):
        merged_into_the_original(strategy, tmp_path, tiny_llama)
    (tmp_path / FIRST_FILE).unlink()
    with pytest.raises(AdapterError, match="what it began with is missing"):
        merged_into_the_original(strategy, tmp_path, tiny_llama)


def test_a_loftq_folder_of_pefts_is_refused(tiny_llama: Path, tmp_path: Path):
    LoRA(rank=4).save(attached(LoRA(rank=4), tiny_llama), tmp_path)
    change_config(tmp_path, {"init_lora_weights": "loftq", "loftq_config": FIRST_MARK})
    with pytest.raises(AdapterError, match="does not save what LoftQ began with"):
        strategy_from_folder(tmp_path)


@pytest.mark.parametrize("variant", SAME_IN_PEFT)
def test_loss_and_gradients_are_pefts(variant: str, tiny_llama: Path):
    from peft import LoraConfig, get_peft_model

    settings = {"target_modules": "all-linear", **SAME_IN_PEFT[variant]}
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    theirs = get_peft_model(opened(tiny_llama), config)
    ours = attached(LoRA(rank=4, **VARIANTS[variant]), tiny_llama)
    own = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    their = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert set(own) == set(their)
    with torch.no_grad():
        for name, parameter in own.items():
            if variant not in ("pissa", "olora"):  # those are computed from the weight
                parameter.add_(0.01)
                their[name].copy_(parameter)
    losses = [model(**batch()).loss for model in (theirs, ours)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for name, parameter in own.items():
        wanted = their[name].grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)


def test_loftq_brings_the_quantized_model_nearer_to_the_original(tiny_llama: Path):
    exact = logits(opened(tiny_llama))
    plain = logits(opened(tiny_llama, quantize="nf4"))
    mended = logits(attached(LoRA(rank=8, initialisation="loftq"), tiny_llama, quantize="nf4"))
    assert (mended - exact).norm() < 0.9 * (plain - exact).norm()


def test_plain_peft_opens_a_converted_start(tiny_llama: Path, tmp_path: Path):
    from peft import PeftModel

    strategy = LoRA(rank=4, initialisation="pissa", rank_stabilised=True)
    model = attached(strategy, tiny_llama)
    train(model)
    strategy.save(model, tmp_path)
    theirs = PeftModel.from_pretrained(opened(tiny_llama), str(tmp_path))
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("start", "quantize", "words"),
    [
        ("pissa", "nf4", "not quantized"),
        ("orthogonal", "int8", "not quantized"),
        ("loftq", "none", "is not quantized"),
    ],
)
def test_a_start_that_cannot_be(start: Any, quantize: str, words: str, tiny_llama: Path):
    with pytest.raises(RecipeError, match=words):
        attached(LoRA(initialisation=start), tiny_llama, quantize=quantize)


def test_a_start_without_what_it_needs(tiny_llama: Path):
    with pytest.raises(RecipeError, match="none is given"):
        prepare(opened(tiny_llama), LoRA(initialisation="eva"))
    with pytest.raises(RecipeError, match="original weights"):
        prepare(opened(tiny_llama, quantize="nf4"), LoRA(initialisation="loftq"))


def test_targets_by_kind_layer_and_glob(tiny_llama: Path, tiny_bert: Path, tiny_t5: Path):
    llama = open_skeleton(tiny_llama, ModelSpec(str(tiny_llama)))
    assert resolve(llama, "all-linear") == "all-linear"
    attention, mlp = resolve(llama, "attention"), resolve(llama, "mlp")
    assert len(attention), len(mlp) == (8, 6)
    assert set(attention) | set(mlp) == set(linear_names(llama))
    assert resolve(llama, ("*.q_proj",), (0,)) == ["model.layers.0.self_attn.q_proj"]
    bert = open_skeleton(tiny_bert, ModelSpec(str(tiny_bert), "classify", ("a", "b")))
    assert "bert.encoder.layer.0.attention.output.dense" in resolve(bert, "attention")
    assert "bert.encoder.layer.0.output.dense" in resolve(bert, "mlp")
    t5 = open_skeleton(tiny_t5, ModelSpec(str(tiny_t5), "seq2seq"))
    assert len(resolve(t5, "attention")) == 2 * 4 + 2 * 8
    with pytest.raises(RecipeError, match="fewer layers"):
        resolve(llama, "mlp", (2,))
    with pytest.raises(RecipeError, match="No linear layer"):
        resolve(llama, ("*.nothing",))


@pytest.mark.parametrize("start", ["eva", "loftq", "pissa"])
def test_a_recipe_gives_a_start_what_it_needs(start: str, tiny_llama: Path, tmp_path: Path):
    rows = tmp_path / "rows.txt"
    rows.write_text("a few words to learn by heart\n" * 30)
    run = qft.train(qft.build_recipe({
        "model": str(tiny_llama), "task": "text", "dtype": "float32",
        "strategy": {"name": "lora", "rank": 4, "initialisation": start},
        "quantize": "nf4" if start == "loftq" else "none",
        "data": {"train": str(rows), "eval": str(rows), "max_duplicate_share": 1},
        "train": {"max_length": 32, "epochs": 1, "batch_size": 4},
        "device": "cpu", "output": str(tmp_path / "run"),
    }))  # fmt: skip
    again = qft.open_any(str(run.folder), dtype=torch.float32, device="cpu")
    torch.testing.assert_close(logits(again.model), logits(run.model), rtol=1e-4, atol=2e-5)
    assert qft.merge(run.folder, tmp_path / "merged", verify=True)["verification"]["passed"]
