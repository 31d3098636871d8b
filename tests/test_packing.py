"""Packed training is the training of its examples one by one, to the last digit but rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qft
from qft.data.examples import Example
from qft.data.packing import collate_packed, pack
from qft.data.tasks import TASKS
from qft.demo.job import BASE
from qft.errors import RecipeError
from qft.inputs import open_inputs
from qft.lean.noise import install_noise
from qft.models import ModelSpec, open_model
from qft.packing_check import require_exact_packing
from qft.preparation import prepare, prepared
from qft.registry import build_strategy
from qft.step import Layout, accumulate_gradients

LENGTHS = (17, 5, 30, 9, 22, 3, 12)


def examples(lengths: tuple[int, ...] = LENGTHS) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, length in enumerate(lengths):
        ids = torch.randint(4, 260, (length,), generator=generator).tolist()
        labels = [-100] * (length // 3) + ids[length // 3 :]
        made.append(Example(index, {"input_ids": ids, "labels": labels}))
    return made


def opened(folder: Path, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    spec = ModelSpec(str(folder), **{"dtype": torch.float32, "device": "cpu", **changes})
    return open_model(folder, spec)


def gradients(
    model: nn.Module, layout: Layout, micro_batch: int = 2
) -> tuple[dict[str, Tensor], Any]:
    model.zero_grad(set_to_none=True)
    result = accumulate_gradients(
        model, examples(), TASKS["text"], step=3, micro_batch=micro_batch, pad_token_id=0,
        layout=layout,
    )  # fmt: skip
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, result


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """At fp32 equal to 1e-6, and to 2e-6 of each tensor's largest entry: most are far below 1.

    In float64 to 1e-12 of it: what is left at fp32 is rounding alone.
    """
    assert set(found) == set(wanted)
    for name, gradient in found.items():
        largest = float(wanted[name].abs().max())
        difference = float((gradient - wanted[name]).abs().max())
        assert largest > 0, name
        share = 1e-12 if gradient.dtype == torch.float64 else 2e-6
        assert difference <= min(1e-6, share * largest), (name, difference, largest)


STRATEGIES = {
    "lora": {"name": "lora", "rank": 4},
    "lora-dropout": {"name": "lora", "rank": 4, "dropout": 0.3},
    "prefix": {"name": "prefix", "length": 3},
    "full": {"name": "full"},
    "ia3": {"name": "ia3"},
}


def ready(folder: Path, strategy: str, checkpointing: Any = "auto") -> nn.Module:
    """Prepared, and past LoRA's start at zero, where its A would have no gradient."""
    model = prepare(
        opened(folder), build_strategy(STRATEGIES[strategy]), checkpointing=checkpointing
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def in_float64(model: nn.Module) -> nn.Module:
    """In float64 throughout: transformers' norm and loss go by way of float32, these do not."""

    class Norm(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            mean = hidden.square().mean(-1, keepdim=True)
            return self.weight * hidden * torch.rsqrt(mean + self.variance_epsilon)

    def loss(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )

    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.loss_function = loss
    norms = [module for module in model.modules() if type(module).__name__ == "LlamaRMSNorm"]
    assert norms
    for module in norms:
        module.__class__ = Norm
    return model.double()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_packed_gradients_are_the_unpacked_ones(
    strategy: str, checkpointing: Any, tiny_llama: Path
):
    model = ready(tiny_llama, strategy, checkpointing)
    wanted, plain = gradients(model, Layout())
    found, packed = gradients(model, Layout(pack_to=32))
    close(found, wanted)
    assert packed.loss == pytest.approx(float(plain.loss), rel=1e-6)
    assert (packed.items, packed.tokens) == (plain.items, plain.tokens)
    close(gradients(model, Layout(pack_to=64), micro_batch=1)[0], wanted)
    close(gradients(model, Layout(grouped=True), micro_batch=3)[0], wanted)
    if strategy != "prefix":  # it puts its own keys before each row's
        close(gradients(model, Layout(flat=True), micro_batch=3)[0], wanted)
        close(gradients(model, Layout(pack_to=32, flat=True), micro_batch=2)[0], wanted)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_differs_is_rounding_alone(strategy: str, tiny_llama: Path):
    model = in_float64(ready(tiny_llama, strategy))
    wanted, _ = gradients(model, Layout())
    assert all(gradient.dtype == torch.float64 for gradient in wanted.values())
    close(gradients(model, Layout(pack_to=32))[0], wanted)
    close(gradients(model, Layout(pack_to=64), micro_batch=1)[0], wanted)
    close(gradients(model, Layout(grouped=True), micro_batch=3)[0], wanted)
    if strategy != "prefix":
        close(gradients(model, Layout(flat=True), micro_batch=3)[0], wanted)


def test_embedding_noise_does_not_depend_on_the_layout(tiny_llama: Path):
    model = ready(tiny_llama, "lora")
    silent, _ = gradients(model, Layout())
    state = prepared(model)
    assert state is not None
    install_noise(model.get_input_embeddings(), state.clock, 50.0)  # type: ignore[operator]
    wanted, _ = gradients(model, Layout())
    name = next(iter(silent))
    assert (silent[name] - wanted[name]).abs().max() > 1e-4
    close(gradients(model, Layout(pack_to=40))[0], wanted)
    close(gradients(model, Layout(grouped=True), micro_batch=7)[0], wanted)
    close(gradients(model, Layout(flat=True), micro_batch=4)[0], wanted)
    model.eval()
    ids = torch.tensor([examples()[0].inputs["input_ids"]])
    with torch.no_grad():
        quiet = model(input_ids=ids).logits
        assert torch.equal(quiet, model(input_ids=ids).logits)


def test_rows_are_filled_first_fit_the_longest_first():
    rows = pack(examples(), 32)
    sizes = [[len(e.inputs["input_ids"]) for e in row] for row in rows]
    assert sizes == [[30], [22, 9], [17, 12, 3], [5]]
    assert sorted(e.index for row in rows for e in row) == list(range(7))
    assert [len(row) for row in pack(examples((40, 1)), 32)] == [1, 1]


def test_positions_begin_anew_and_no_label_crosses_a_border():
    a, b = examples((3, 4))
    batch = collate_packed([[a, b], [b]], 0)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2]]
    assert batch["labels"][0].tolist() == [
        -100, *a.inputs["labels"][1:], -100, *b.inputs["labels"][1:]
    ]  # fmt: skip
    assert batch["labels"][1, 4:].tolist() == [-100] * 3
    assert "attention_mask" not in batch


def test_a_model_that_mixes_packed_examples_is_refused(tiny_llama: Path):
    model = opened(tiny_llama)
    require_exact_packing(model, examples(), 0)

    class Blind(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, position_ids: Any = None, **inputs: Any) -> Any:
            return self.inner(**inputs)

    with pytest.raises(RecipeError, match="see one another"):
        require_exact_packing(Blind(model), examples(), 0)


def test_rounding_in_bfloat16_is_no_refusal():
    """Full training holds its weights in float32, and computes in bfloat16 as before."""
    full = prepare(opened(BASE, dtype=torch.bfloat16), build_strategy(STRATEGIES["full"])).eval()
    assert next(full.parameters()).dtype == torch.float32
    tried = examples((24, 24))
    with torch.no_grad():
        alone = [full(**shown(collate_packed([[e]], 0))).logits for e in tried]
        together = full(**shown(collate_packed([tried], 0))).logits
    wanted = torch.cat(alone, dim=1)
    assert (together - wanted).abs().max() > 1e-3 * wanted.abs().max()  # else this tests nothing
    require_exact_packing(full, tried, 0)


def shown(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {"use_cache": False, **{k: v for k, v in batch.items() if k != "labels"}}


def job(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(
        json.dumps({"instruction": f"say {i}", "output": "yes " * (1 + i % 5)}) + "\n"
        for i in range(20)
    ))  # fmt: skip
    return {
        "model": str(model), "task": "instruct", "strategy": "lora", "dtype": "float32",
        "data": {"train": str(rows), "eval_share": 0.2, "max_duplicate_share": 1},
        "train": {"max_length": 128, "epochs": 2, "batch_size": 8, **changes},
        "device": "cpu", "output": str(folder / "run"),
    }  # fmt: skip


def test_a_packed_run_learns_what_the_plain_one_learns(tiny_llama: Path, tmp_path: Path):
    losses = []
    for packing in (False, True):
        folder = tmp_path / str(packing)
        folder.mkdir()
        run = qft.train(qft.build_recipe(job(folder, tiny_llama, packing=packing)))
        losses.append(run.metrics["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_packed_documents_of_plain_text_do_not_see_one_another(tiny_llama: Path, tmp_path: Path):
    rows = tmp_path / "documents.jsonl"
    texts = ["a first document", "another", "and a third one, longer than these"]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = job(tmp_path, tiny_llama, packing=True, max_steps=1)
    values |= {"task": "text", "data": {"train": str(rows)}}
    inputs = open_inputs(qft.build_recipe(values))
    assert len(inputs.train.examples) == 3
    model = prepare(opened(tiny_llama), build_strategy({"name": "lora"})).eval()
    settings = {"step": 1, "micro_batch": 4, "pad_token_id": 0}
    loss = accumulate_gradients(
        model, inputs.train.examples, inputs.task, layout=Layout(pack_to=128), **settings
    ).loss
    sums = count = 0.0
    for example in inputs.train.examples:
        ids = torch.tensor([example.inputs["input_ids"]])
        sums += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert float(loss) == pytest.approx(sums / count, rel=1e-5)
    assert qft.train(qft.build_recipe(values)).folder.is_dir()


def test_where_packing_cannot_be(tiny_llama: Path, tmp_path: Path):
    values = job(tmp_path, tiny_llama, packing=True)
    with pytest.raises(RecipeError, match="before each row"):
        qft.train(qft.build_recipe({**values, "strategy": "prompt"}))
    with pytest.raises(RecipeError, match="not for this task"):
        qft.train(qft.build_recipe({**values, "task": "classify"}))
