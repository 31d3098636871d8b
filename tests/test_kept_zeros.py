"""LoRA that keeps a pruned model's zeros: gradients, bytes, folders, merges."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qft
from adapters.lora import LoRA
from adapters.zero_keeping import MARK
from qft.errors import RecipeError
from qft.lean import kept_zeros
from qft.lean.dropout import DropoutClock, SeededDropout
from qft.lean.kept_zeros import KeptZerosForward, kept_zeros_linear
from qft.lean.lora_linear import Dense, Update
from qft.lean.meter import Meter
from qft.models import ModelSpec, module_names, open_model, open_skeleton
from qft.preparation import prepare
from qft.pruning.smallest import prune_by_magnitude_, prune_by_wanda_
from qft.pruning.sparsity import Sparsity
from qft.registry import build_strategy, strategy_from_folder
from qft.strategy import Context

PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
IDS = torch.randint(4, 260, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def pruned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with half of every linear weight at zero, and not just the smallest half."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            norms = 100 ** torch.randn(module.in_features, generator=generator)
            prune_by_wanda_(module.weight.data, norms, Sparsity(0.5))
    folder = tmp_path_factory.mktemp("pruned")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


def opened(folder: Path, **changes: Any) -> nn.Module:
    return open_model(folder, ModelSpec(str(folder), **{**PLAIN, **changes}))


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert found
    assert all(g.abs().max() > 0 for g in found.values())
    return found


# --- the kernel


def layer_and_update(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Update]:
    torch.manual_seed(0)
    layer = nn.Linear(20, 14).to(dtype).requires_grad_(False)
    prune_by_magnitude_(layer.weight, Sparsity(0.5))
    down, up = nn.Parameter(torch.randn(3, 20)), nn.Parameter(torch.randn(14, 3))
    return layer, Update(down, up, 1.7, None)


def reference(
    x: Tensor, layer: nn.Linear, update: Update, gradient: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The result and the gradients of x, A and B: dense, in float64, by autograd."""
    x, down, up = (t.detach().double().requires_grad_() for t in (x, update.down, update.up))
    weight = layer.weight.double()
    delta = (weight != 0) * (update.scale * up @ down)
    dropped = x if keep is None else x * keep.double()
    result = x @ weight.t() + layer.bias.double() + dropped @ delta.t()
    return result, *torch.autograd.grad(result, (x, down, up), gradient.double())


def found_by(x: Tensor, layer: nn.Linear, update: Update, gradient: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    result = kept_zeros_linear(x, layer.weight, Dense(layer), update)
    return result, *torch.autograd.grad(result, (x, update.down, update.up), gradient)


@pytest.mark.parametrize("piece", [2**22, 45])  # all rows at once; two at a time
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_gradients_are_those_of_the_dense_formula(monkeypatch, piece, dtype, tolerance):
    monkeypatch.setattr(kept_zeros, "PIECE", piece)
    layer, update = layer_and_update(dtype)
    x, gradient = torch.randn(2, 5, 20, dtype=dtype), torch.randn(2, 5, 14, dtype=dtype)
    wanted = reference(x, layer, update, gradient)
    found = found_by(x, layer, update, gradient)
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() < tolerance * other.norm()
    plain = reference(x, nn.Linear(20, 14), update, gradient)
    assert (plain[2] - wanted[2]).norm() > 0.1 * wanted[2].norm(), "the mask counts"


def test_dropout_is_the_same_forwards_and_backwards():
    layer, update = layer_and_update()
    dropout = SeededDropout(0.4, DropoutClock(0), "here").train()
    x, gradient = torch.randn(2, 5, 20), torch.randn(2, 5, 14)
    replay = dropout.replay(x)
    assert replay is not None
    keep = replay(torch.ones_like(x))
    assert 0 < (keep == 0).float().mean() < 1
    wanted = reference(x, layer, update, gradient, keep)
    found = found_by(x, layer, replace(update, dropout=replay), gradient)
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() < 1e-5 * other.norm()


def test_nothing_as_large_as_the_weight_is_ever_made(monkeypatch):
    """Kept: the input alone. Made: a piece of the update, its gradient, a mask."""
    monkeypatch.setattr(kept_zeros, "PIECE", 2**14)
    layer = nn.Linear(512, 512, bias=False).requires_grad_(False)
    prune_by_magnitude_(layer.weight, Sparsity(0.5))
    down, up = nn.Parameter(torch.randn(4, 512)), nn.Parameter(torch.randn(512, 4))
    x = torch.randn(8, 512, requires_grad=True)
    with Meter() as counting:
        result = kept_zeros_linear(x, layer.weight, Dense(layer), Update(down, up, 1.0, None))
        result.sum().backward()
    reading = counting.reading()
    given = x.nbytes + layer.weight.nbytes + down.nbytes + up.nbytes
    rows = 4 * 8 * 512 * 4  # results and gradients of x's size
    gradients_of_factors = 3 * (down.nbytes + up.nbytes)
    pieces = 3 * kept_zeros.PIECE * 4
    assert reading.activation_bytes <= given + result.nbytes + 64
    assert reading.peak_bytes <= given + rows + gradients_of_factors + pieces
    assert pieces < layer.weight.nbytes / 5, "the update as a whole would be seen"


# --- in a model


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_engine_computes_what_peft_with_the_variant_does(pruned: Path, checkpointing: str):
    plain = LoRA(rank=4, keep_zeros=True).attach(opened(pruned), Context())
    randomise(plain)
    model = prepare(opened(pruned), LoRA(rank=4, keep_zeros=True), checkpointing=checkpointing)
    randomise(model)
    layers = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), KeptZerosForward)]
    assert len(layers) == 14, "every projection, and none by its siblings"
    found, wanted = gradients(model), gradients(plain)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() < 1e-5 * gradient.norm(), name
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-6)


def test_the_masked_update_is_another_than_lora_s(pruned: Path):
    found = []
    for keep in (True, False):
        model = prepare(opened(pruned), LoRA(rank=4, keep_zeros=keep))
        randomise(model)
        found.append((logits(model), gradients(model)))
    assert (found[0][0] - found[1][0]).abs().max() > 1e-2
    assert found[0][1].keys() == found[1][1].keys()


def test_an_evaluation_in_between_and_switching_off_change_nothing(pruned: Path):
    base = logits(opened(pruned))
    model = prepare(opened(pruned), LoRA(rank=4, keep_zeros=True))
    torch.testing.assert_close(logits(model), base)
    randomise(model)
    first = gradients(model)
    after = logits(model)
    assert (after - base).abs().max() > 1e-3
    with model.disable_adapter():  # type: ignore[operator]
        torch.testing.assert_close(logits(model), base)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, first[name])


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rank_stabilised": True},
    "gaussian": {"initialisation": "gaussian"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}},
    "rows": {"token_rows": (5, 9), "targets": "attention"},
    "some": {"layers": (-1,), "targets": "mlp"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_it_is_the_same_model_with_the_same_zeros(
    pruned: Path, tmp_path: Path, variant: str
):
    strategy = LoRA(rank=3, keep_zeros=True, **VARIANTS[variant])
    model = strategy.attach(opened(pruned), Context())
    randomise(model)
    expected = logits(model)
    folder = tmp_path / "adapter"
    folder.mkdir()
    strategy.save(model, folder)
    assert json.loads((folder / "adapter_config.json").read_text())[MARK] is True

    again = strategy_from_folder(folder)
    assert isinstance(again, LoRA)
    assert again.keep_zeros
    other = again.attach(opened(pruned), Context())
    again.load(other, folder)
    assert torch.equal(logits(other), expected)

    report = qft.merge(folder, tmp_path / "merged", base=str(pruned))
    assert report["changed"] > 0
    merged = opened(tmp_path / "merged")
    assert (logits(merged) - expected).abs().max() < 1e-6 * expected.abs().max()
    assert_same_zeros(merged, opened(pruned))

    by_peft = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    assert (logits(by_peft) - expected).abs().max() < 1e-6 * expected.abs().max()
    assert_same_zeros(by_peft, opened(pruned))


def assert_same_zeros(found: nn.Module, wanted: nn.Module) -> None:
    state = found.state_dict()
    zeros = 0
    for name, tensor in wanted.state_dict().items():
        if "proj" in name:
            assert torch.equal(state[name] == 0, tensor == 0), name
            zeros += int((tensor == 0).sum())
    assert zeros > 10_000


def test_a_merge_in_peft_can_be_taken_back(pruned: Path):
    model: Any = LoRA(rank=3, keep_zeros=True).attach(opened(pruned), Context())
    randomise(model)
    expected = logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert_same_zeros(model.unload(), opened(pruned))


def test_plain_peft_says_that_it_ignores_the_setting(pruned: Path, tmp_path: Path):
    """Its folder has no word for a masked update; what it computes is another model."""
    from peft import PeftModel

    strategy = LoRA(rank=3, keep_zeros=True)
    model = strategy.attach(opened(pruned), Context())
    randomise(model)
    strategy.save(model, tmp_path)
    with pytest.warns(UserWarning, match=MARK):
        foreign = PeftModel.from_pretrained(opened(pruned), str(tmp_path))
    assert (logits(foreign) - logits(model)).abs().max() > 1e-2


def test_a_run_trains_and_merges(pruned: Path, tmp_path: Path):
    words = " ".join(f"word{i} is {i * i}" for i in range(100))
    (tmp_path / "train.txt").write_text(words, encoding="utf-8")
    recipe = qft.build_recipe(
        {
            "model": str(pruned), "task": "text", "data": {"train": str(tmp_path / "train.txt")},
            "strategy": {"name": "lora", "rank": 4, "keep_zeros": True}, "dtype": "float32",
            "train": {"max_steps": 3, "batch_size": 4, "max_length": 32, "learning_rate": 0.01},
            "output": str(tmp_path / "run"),
        }
    )  # fmt: skip
    qft.train(recipe)
    qft.merge(tmp_path / "run", tmp_path / "merged")
    merged = opened(tmp_path / "merged")
    assert_same_zeros(merged, opened(pruned))
    assert (logits(merged) - logits(opened(pruned))).abs().max() > 1e-3


# --- what it cannot be combined with


@pytest.mark.parametrize(
    "settings, said",
    [({"dora": True}, "dora"), ({"initialisation": "pissa"}, "pissa"),
     ({"initialisation": "loftq"}, "loftq"), ({"initialisation": "orthogonal"}, "orthogonal")],
)  # fmt: skip
def test_settings_that_make_no_sense_together(settings, said):
    with pytest.raises(RecipeError, match=f"keep_zeros.*{said}"):
        build_strategy({"name": "lora", "keep_zeros": True, **settings})


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantized_base_is_refused_because_it_has_more_zeros(pruned: Path, quantize: str):
    """Zeros stay zero, but small weights become zero beside them: the pattern is lost."""
    from qft.quantization import dequantized

    quantized, plain = opened(pruned, quantize=quantize), opened(pruned)
    name = "model.layers.0.mlp.down_proj"
    before = plain.get_submodule(name).weight == 0
    after = dequantized(quantized.get_submodule(name)) == 0
    assert bool(after[before].all())
    assert int(after.sum()) > int(before.sum())
    with pytest.raises(RecipeError, match="quantized base") as caught:
        LoRA(rank=4, keep_zeros=True).attach(quantized, Context())
    assert "quantize: none" in caught.value.text()


def test_a_model_without_zeros_is_refused(tiny_llama: Path):
    with pytest.raises(RecipeError, match="no zeros to keep"):
        LoRA(rank=4, keep_zeros=True).attach(opened(tiny_llama), Context())


def test_layers_of_another_kind_are_refused(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(RecipeError, match="ordinary linear layers") as caught:
        LoRA(rank=2, keep_zeros=True).attach(model, Context())
    assert "Conv1D" in caught.value.text()


def test_a_skeleton_can_be_planned_with_it(pruned: Path):
    skeleton = open_skeleton(pruned, ModelSpec(str(pruned)))
    model = prepare(skeleton, LoRA(rank=4, keep_zeros=True))
    assert all(p.is_meta for p in model.parameters())
    assert module_names(pruned, open_skeleton(pruned, ModelSpec(str(pruned))))
