"""Several strategies at once: they train together, and are saved and opened part by part."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import qft
from adapters.bitfit import BitFit
from adapters.ia3 import IA3
from adapters.lora import LoRA
from adapters.prefix import Prefix
from adapters.stack import Stack, StackMerge
from qft.cli import app
from qft.errors import AdapterError, RecipeError
from qft.merging.merge import open_source, write_model
from qft.recipe_reference import json_schema
from qft.registry import build_strategy, settings_of, strategy_from_folder
from qft.strategy import Context
from qft.strategy_table import strategy_table

SETTINGS = {"name": "stack", "of": [{"name": "prefix", "length": 4}, {"name": "lora", "rank": 2}]}


def rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    words = [("good", "yes"), ("bad", "no")] * 8
    path.write_text("".join(
        json.dumps({"text": f"{word} {i}", "label": label}) + "\n"
        for i, (word, label) in enumerate(words)
    ))  # fmt: skip
    return path


def recipe(model: Path, folder: Path, strategy: dict[str, Any]) -> qft.recipe.Recipe:
    path = str(rows(folder))
    return qft.build_recipe({
        "model": str(model), "task": "classify", "strategy": strategy, "dtype": "float32",
        "data": {"train": path, "eval": path, "max_duplicate_share": 1},
        "train": {"max_length": 32, "epochs": 2, "batch_size": 4, "save_every": 4},
        "device": "cpu", "output": str(folder / "run"),
    })  # fmt: skip


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(4, 200, (2, 8), generator=torch.Generator().manual_seed(0))
    model.eval()
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return out


@pytest.mark.parametrize(
    "strategy",
    [SETTINGS, {"name": "stack", "of": [{"name": "lora", "rank": 2}, "bitfit"]}],
    ids=["prefix-lora", "lora-bitfit"],
)
def test_a_stack_trains_all_its_parts_and_opens_again(
    strategy: dict[str, Any], tiny_bert: Path, tmp_path: Path
):
    run = qft.train(recipe(tiny_bert, tmp_path, strategy))
    trained = {n for n, p in run.model.named_parameters() if p.requires_grad}
    other = "prefix_encoder" if strategy is SETTINGS else "LayerNorm"
    assert any("lora_A" in name for name in trained)
    assert any(other in name for name in trained)
    assert not any("original_module" in name for name in trained)
    heads = [name for name in trained if "classifier" in name]
    assert len(heads) == 2  # once, not once a part
    again = qft.open_any(str(run.folder), dtype=torch.float32, device="cpu")
    assert torch.equal(logits(again.model), logits(run.model))
    found = strategy_from_folder(run.folder / "adapter")
    assert {part.name for part in found.of} == {
        "lora",
        "prefix" if strategy is SETTINGS else "bitfit",
    }  # type: ignore[attr-defined]
    if strategy is SETTINGS:
        with pytest.raises(AdapterError, match="cannot be folded"):
            qft.merge(run.folder, tmp_path / "merged")
    else:
        report = qft.merge(run.folder, tmp_path / "merged", verify=True)
        assert report["verification"]["passed"]


def test_a_stack_resumes_exactly(tiny_bert: Path, tmp_path: Path):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    for folder in (whole, parted):
        folder.mkdir()
    qft.train(recipe(tiny_bert, whole, SETTINGS))
    run = qft.train(recipe(tiny_bert, parted, SETTINGS)).folder
    last = max((run / "checkpoints").iterdir(), key=lambda p: int(p.name.split("-")[1]))
    for path in sorted(last.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    last.rmdir()
    qft.train(recipe(tiny_bert, parted, SETTINGS), resume=True)
    for name in ("prefix/adapter_model.safetensors", "lora/adapter_model.safetensors"):
        saved = [(f / "run" / "adapter" / name).read_bytes() for f in (whole, parted)]
        assert saved[0] == saved[1], name


OVERLAPS: dict[str, tuple[Any, ...]] = {
    "lora-layers": ({"name": "lora", "rank": 2}, {"name": "layers", "last": 1}),
    "layers-lora": ({"name": "layers", "last": 1}, {"name": "lora", "rank": 2}),
    "dora-layers": ({"name": "lora", "rank": 2, "dora": True}, {"name": "layers", "last": 1}),
    "ia3-layers": ({"name": "ia3"}, {"name": "layers", "last": 1}),
    "bitfit-layers": ("bitfit", {"name": "layers", "last": 1}),
    "biases-bitfit": ({"name": "lora", "rank": 2, "bias": "all"}, "bitfit"),
}


def train_a_little(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    ids = torch.randint(4, 200, (4, 8), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("parts", OVERLAPS)
def test_parts_that_share_tensors_merge_to_what_was_trained(
    parts: str, tiny_bert: Path, tmp_path: Path
):
    strategy = build_strategy({"name": "stack", "of": OVERLAPS[parts]})
    spec = qft.models.ModelSpec(
        str(tiny_bert), "classify", ("no", "yes"), dtype=torch.float32, device="cpu"
    )
    model = strategy.attach(qft.models.open_model(tiny_bert, spec), Context(total_steps=3))
    train_a_little(model)
    saved = tmp_path / "adapter"
    saved.mkdir()
    strategy.save(model, saved)
    skeleton = qft.models.open_skeleton(tiny_bert, spec)
    source = open_source(tiny_bert, skeleton, adapter=saved, strategy=strategy_from_folder(saved))
    write_model(source, tmp_path / "merged")
    merged = qft.models.open_model(
        tmp_path / "merged", dataclasses.replace(spec, source=str(tmp_path / "merged"))
    )
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    plain = qft.models.open_model(tiny_bert, spec)
    plain.load_state_dict(merged.state_dict() | {
        n: p for n, p in plain.state_dict().items() if n.startswith("bert.encoder.layer.1")
    })  # fmt: skip
    assert (logits(plain) - logits(merged)).abs().max() > 1e-3  # the shared tensors do tell


def test_parts_that_contradict_each_other_are_refused(tiny_bert: Path, tmp_path: Path):
    strategy = build_strategy({"name": "stack", "of": ["bitfit", {"name": "layers", "last": 1}]})
    spec = qft.models.ModelSpec(str(tiny_bert), "classify", ("no", "yes"), device="cpu")
    strategy.save(strategy.attach(qft.models.open_model(tiny_bert, spec), Context()), tmp_path)
    file = tmp_path / "bitfit" / "trained_tensors.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    skeleton = qft.models.open_skeleton(tiny_bert, spec)
    with pytest.raises(AdapterError, match="other values of the same tensor"):
        open_source(tiny_bert, skeleton, adapter=tmp_path, strategy=strategy)


def test_a_merge_computes_the_rows_it_needs_of_a_replaced_tensor(tmp_path: Path):
    asked: list[tuple[str, int, int]] = []

    class Part:
        def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
            self.tensors = tensors

        def added(self) -> dict[str, torch.Tensor]:
            return self.tensors

        def edit(self, name: str, rows: torch.Tensor, start: int = 0) -> torch.Tensor:
            asked.append((name, start, len(rows)))
            return rows * 2

    freed = {"a": torch.ones(2), "b": torch.ones(2)}
    added = StackMerge([Part({}), Part(freed)], tmp_path).added()  # type: ignore[list-item]
    assert (list(added), "a" in added, asked) == (["a", "b"], True, [])
    assert torch.equal(added["b"][1:], torch.full((1,), 2.0))
    assert asked == [("b", 1, 1)]


def test_settings_go_round_and_wrong_ones_are_named():
    strategy = build_strategy(SETTINGS)
    assert strategy == Stack(of=(Prefix(length=4), LoRA(rank=2)))
    assert build_strategy(settings_of(strategy)) == strategy
    with pytest.raises(RecipeError, match=r"of\.1\.rnk: no such setting"):
        build_strategy({"name": "stack", "of": [{"name": "prefix"}, {"name": "lora", "rnk": 2}]})
    with pytest.raises(RecipeError, match="both wrap the model"):
        build_strategy({"name": "stack", "of": ["lora", "ia3"]})
    with pytest.raises(RecipeError, match="named twice"):
        build_strategy({"name": "stack", "of": ["lora", "lora"]})


def test_the_table_takes_an_encoder_for_a_classifier(tiny_bert: Path, tiny_t5: Path):
    table = {row["name"]: row for row in strategy_table(str(tiny_bert))}
    assert table["head"]["trained_parameters"] == 2 * 64 + 2
    assert "refused" not in table["lora"]
    assert {row["task"] for row in table.values() if "task" in row} == {"classify"}
    table = {row["name"]: row for row in strategy_table(str(tiny_t5))}
    assert "seq2seq" in table["head"]["refused"]


def test_a_stack_without_parts_is_refused(tiny_llama: Path):
    for entry in ({"name": "stack"}, {"name": "stack", "of": []}):
        with pytest.raises(RecipeError, match=r"  of: "):
            build_strategy(entry)
    schema = json_schema()["properties"]["strategy"]["anyOf"]
    stack = next(s for s in schema if s["properties"]["name"]["const"] == "stack")
    assert stack["required"] == ["name", "of"]
    row = next(row for row in strategy_table(str(tiny_llama)) if row["name"] == "stack")
    assert row["depends_on"] == ["of"]
    assert not {"trained_share", "mergeable", "tasks"} & set(row)
    shown = CliRunner().invoke(app, ["strategies", str(tiny_llama)])
    assert shown.exit_code == 0, shown.output
    assert "as of says" in shown.output


def test_facts_of_the_whole_come_from_the_parts():
    assert Stack(of=(BitFit(), IA3())).mergeable
    stack = Stack(of=(Prefix(length=3), LoRA()))
    assert not stack.mergeable
    assert "lora" in stack.advice


def test_the_table_counts_what_each_would_train(tiny_llama: Path):
    table = {row["name"]: row for row in strategy_table(str(tiny_llama))}
    assert table["full"]["trained_share"] == 1.0
    assert 0 < table["ia3"]["trained_share"] < table["lora"]["trained_share"] < 1
    assert "refused" in table["head"]
    assert table["prefix"]["instead_of_merging"]
    counted = table["lora"]["trained_parameters"]
    run = LoRA().attach(
        qft.models.open_skeleton(tiny_llama, qft.models.ModelSpec(str(tiny_llama))),
        qft.strategy.Context(),
    )
    assert counted == sum(p.numel() for p in run.parameters() if p.requires_grad)
