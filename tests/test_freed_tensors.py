"""Strategies that train the base's own tensors: what trains, in which precision, and its merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import qft
from adapters.bitfit import BitFit
from adapters.freed_tensors import FreedTensors
from adapters.full import Full
from adapters.layers import Layers
from qft.errors import AdapterError, RecipeError
from qft.models import ModelSpec, open_model, open_skeleton
from qft.preparation import prepare
from qft.registry import strategy_from_folder

STRATEGIES = [BitFit(), Layers(last=1), Layers(last=1, output_embeddings=True), Full()]


def opened(folder: Path, dtype: torch.dtype = torch.float32, task: str = "text") -> nn.Module:
    torch.manual_seed(0)
    labels = ("a", "b") if task == "classify" else None
    return open_model(folder, ModelSpec(str(folder), task, labels, dtype=dtype, device="cpu"))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 260, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{s.name}-{s.model_dump()}")
def test_gradients_are_those_of_plain_training(strategy: FreedTensors, tiny_llama: Path):
    plain = opened(tiny_llama).train()
    plain(**batch()).loss.backward()
    ours = prepare(opened(tiny_llama), strategy)
    ours(**batch()).loss.backward()
    wanted = {n: p.grad for n, p in plain.named_parameters()}
    found = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert set(found) == set(strategy.trained(plain))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{s.name}-{s.model_dump()}")
def test_a_bfloat16_base_computes_as_before_and_trains_in_float32(
    strategy: FreedTensors, tiny_llama: Path
):
    plain = opened(tiny_llama, torch.bfloat16)
    ours = prepare(opened(tiny_llama, torch.bfloat16), strategy).eval()
    with torch.no_grad():
        inputs = {k: v for k, v in batch().items() if k != "labels"}
        assert torch.equal(ours(**inputs).logits, plain(**inputs).logits)
    ours.train()
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
    before = {n: p.detach().clone() for n, p in trained.items()}
    ours(**batch()).loss.backward()
    optimizer.step()
    moved = [(before[n], p.detach()) for n, p in trained.items()]
    lost = sum(int((a.bfloat16() == b.bfloat16())[a != b].sum()) for a, b in moved)
    assert lost > 0  # steps that bfloat16 would have rounded away


def test_a_bfloat16_t5_computes_as_before(tiny_t5: Path):
    """Its code reads a weight's type and casts the input to that."""
    ids = torch.tensor([[5, 6, 7, 2]])
    plain = opened(tiny_t5, torch.bfloat16, "seq2seq")
    for strategy in (Full(), Layers(last=1)):
        ours = prepare(opened(tiny_t5, torch.bfloat16, "seq2seq"), strategy)
        ours(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in ours.parameters()
                   if p.requires_grad)  # fmt: skip
        with torch.no_grad():
            logits = [m.eval()(input_ids=ids, labels=ids).logits for m in (plain, ours)]
        assert torch.equal(*logits)


def test_biases_of_a_quantized_encoder_train(tiny_bert: Path):
    spec = ModelSpec(
        str(tiny_bert), "classify", ("a", "b"), quantize="nf4", dtype=torch.bfloat16, device="cpu"
    )
    model = prepare(open_model(tiny_bert, spec), BitFit())
    inputs = {**batch(), "labels": torch.tensor([0, 1])}
    model(**inputs).loss.backward()
    quantized = [
        module for module in model.modules() if type(module).__name__ == "Linear4bit"
    ]  # fmt: skip
    assert quantized
    for module in quantized:
        bias = module.bias
        assert bias.dtype == torch.float32
        assert bias.requires_grad
        assert bias.grad is not None


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{s.name}-{s.model_dump()}")
def test_trained_tensors_survive_a_run_and_a_merge(
    strategy: FreedTensors, tiny_llama: Path, tmp_path: Path
):
    rows = tmp_path / "rows.txt"
    rows.write_text("a few words to learn by heart\n" * 30)
    settings = {"name": strategy.name, **strategy.model_dump()}
    run = qft.train(qft.build_recipe({
        "model": str(tiny_llama), "task": "text", "strategy": settings, "dtype": "bfloat16",
        "data": {"train": str(rows), "eval": str(rows), "max_duplicate_share": 1},
        "train": {"max_length": 32, "epochs": 1, "learning_rate": 1e-3, "batch_size": 4},
        "device": "cpu", "output": str(tmp_path / "run"),
    }))  # fmt: skip
    assert strategy_from_folder(run.folder / "adapter") == strategy
    report = qft.merge(run.folder, tmp_path / "merged", verify=True)
    assert report["verification"]["passed"]
    assert report["changed"] == len(strategy.trained(run.model))


def test_more_layers_than_there_are(tiny_llama: Path):
    skeleton = open_skeleton(tiny_llama, ModelSpec(str(tiny_llama)))
    with pytest.raises(RecipeError, match="fewer layers"):
        Layers(last=3).needs(skeleton)
    assert Layers(last=1).needs(skeleton).lowest_trainable_layer == 1
    with pytest.raises(RecipeError, match="nothing that this strategy trains"):
        BitFit(norms=False).trained(skeleton)


def test_a_quantized_weight_is_not_trained(tiny_llama: Path):
    spec = ModelSpec(str(tiny_llama), quantize="nf4", device="cpu")
    with pytest.raises(RecipeError, match="quantized weight cannot train"):
        Full().attach(open_model(tiny_llama, spec), qft.strategy.Context())


def test_a_merge_into_another_base_is_refused(tiny_llama: Path, tmp_path: Path):
    class Wider:
        def names(self) -> list[str]:
            return ["model.norm.weight"]

        def shape(self, name: str) -> tuple[int, ...]:
            return (99,)

    model = opened(tiny_llama)
    BitFit().save(model, tmp_path)
    with pytest.raises(AdapterError, match="another base"):
        BitFit().open_merge(tmp_path, Wider())  # type: ignore[arg-type]
