"""Head-only: the head trains, nothing below it moves, and the folder opens in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qft
from adapters.head import Head
from qft.errors import AdapterError, RecipeError
from qft.models import ModelSpec, open_model, open_skeleton
from qft.strategy import Context

ROWS = [
    {"text": f"{word} {i}", "label": label}
    for i in range(6)
    for word, label in (("good", "yes"), ("bad", "no"), ("odd", "unsure"))
]
BASES = ["tiny_bert", "tiny_llama"]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]])
MASK = (IDS != 0).long()


def job(base: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return {
        "model": str(base),
        "task": "classify",
        "data": {"train": str(rows), "eval": str(rows), "max_duplicate_share": 1},
        "strategy": {"name": "head"},
        "dtype": "float32",
        "device": "cpu",
        "train": {
            "max_steps": 6, "batch_size": 4, "learning_rate": 0.05, "max_length": 16,
            "save_every": 3, "log_every": 1, "warmup": 0,
        },
        "output": str(folder / "run"),
        **changes,
    }  # fmt: skip


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, attention_mask=MASK).logits
    return found.float()


def head_of(name: str) -> str:
    return {"tiny_bert": "classifier", "tiny_llama": "score"}[name]


FRESH = """
import sys, torch, qft
model = qft.open_any(sys.argv[1]).model
ids = torch.tensor({ids})
with torch.no_grad():
    found = model(input_ids=ids, attention_mask=(ids != 0).long()).logits.float()
torch.save(found, sys.argv[2])
"""


def in_a_fresh_process(run: Path, out: Path) -> Tensor:
    code = FRESH.format(ids=IDS.tolist())
    subprocess.run([sys.executable, "-c", code, str(run), str(out)], check=True, timeout=120)
    found: Tensor = torch.load(out, weights_only=True)
    return found


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_only_the_head_trains(
    base: str, quantize: str, dtype: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(base)
    values = job(folder, tmp_path, quantize=quantize, dtype=dtype)
    result = qft.train(qft.build_recipe(values))
    head = head_of(base)
    trained = {n for n, p in result.model.named_parameters() if p.requires_grad}
    assert trained
    assert {name.split(".")[0] for name in trained} == {head}
    spec = ModelSpec(
        str(folder), task="classify", labels=("no", "unsure", "yes"), quantize=quantize,
        dtype=getattr(torch, dtype), device="cpu",
    )  # fmt: skip
    before = open_model(folder, spec).state_dict()
    after = result.model.state_dict()
    below = [name for name in before if not name.startswith(f"{head}.")]
    assert len(below) >= 20
    assert all(torch.equal(before[name], after[name]) for name in below)
    assert after[f"{head}.weight"].dtype == torch.float32
    losses = [
        json.loads(line)["loss"]
        for line in (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if '"loss"' in line
    ]
    assert losses[-1] < losses[0]
    again = qft.open_any(str(result.folder), dtype=spec.dtype, device="cpu")
    assert again.labels == ("no", "unsure", "yes")
    assert torch.equal(logits(again.model), logits(result.model))


@pytest.mark.parametrize(("base", "quantize"), [("tiny_bert", "nf4"), ("tiny_llama", "none")])
def test_the_folder_opens_in_a_fresh_process(
    base: str, quantize: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    values = job(request.getfixturevalue(base), tmp_path, quantize=quantize, dtype="auto")
    result = qft.train(qft.build_recipe(values))
    assert {p.name for p in (result.folder / "adapter").iterdir()} == {
        "trained_tensors.safetensors", "trained_tensors.json", "qft.json",
    }  # fmt: skip
    found = in_a_fresh_process(result.folder, tmp_path / "logits.pt")
    assert torch.equal(found, logits(result.model))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("pooling", ["model", "mean", "last"])
def test_the_head_is_merged(
    base: str, pooling: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(base)
    result = qft.train(qft.build_recipe(job(folder, tmp_path, pooling=pooling)))
    report = qft.merge(result.folder, tmp_path / "merged", verify=True)
    tensors = len(load_file(result.folder / "adapter/trained_tensors.safetensors"))
    assert report["changed"] == tensors == {"tiny_bert": 2, "tiny_llama": 1}[base]
    merged = qft.open_any(str(tmp_path / "merged"), dtype=torch.float32, device="cpu")
    assert merged.task == "classify"
    assert merged.labels == ("no", "unsure", "yes")
    assert (logits(merged.model) - logits(result.model)).abs().max() < 1e-5


def test_resume_is_exact(tiny_bert: Path, tmp_path: Path) -> None:
    """Stopped after its first checkpoint, it ends where an uninterrupted run ends."""
    import shutil

    whole = qft.train(qft.build_recipe(job(tiny_bert, tmp_path, output=str(tmp_path / "whole"))))
    values = job(tiny_bert, tmp_path)
    parted = Path(shutil.copytree(whole.folder, tmp_path / "run"))
    for name in ("adapter", "checkpoints/checkpoint-6"):
        shutil.rmtree(parted / name)
    assert [p.name for p in (parted / "checkpoints").iterdir()] == ["checkpoint-3"]
    qft.train(qft.build_recipe(values), resume=True)
    for name in (
        "adapter/trained_tensors.safetensors",
        "checkpoints/checkpoint-6/optimizer.safetensors",
    ):
        assert (whole.folder / name).read_bytes() == (parted / name).read_bytes(), name


def test_a_trained_head_is_replaced_by_a_further_training(tiny_bert: Path, tmp_path: Path) -> None:
    """A merged classifier is a base like any other; its head goes on from where it was."""
    result = qft.train(qft.build_recipe(job(tiny_bert, tmp_path, pooling="mean")))
    qft.merge(result.folder, tmp_path / "merged")
    values = job(tmp_path / "merged", tmp_path, output=str(tmp_path / "further"))
    values["train"]["learning_rate"] = 1e-9
    further = qft.train(qft.build_recipe(values))
    assert (logits(further.model) - logits(result.model)).abs().max() < 1e-4
    report = qft.merge(further.folder, tmp_path / "again")
    assert report["tensors"] == len(load_file(tmp_path / "merged/model.safetensors"))


def test_only_for_models_with_a_head(tiny_llama: Path) -> None:
    assert Head().tasks == {"classify", "extract", "token"}
    assert Head().mergeable
    skeleton = open_skeleton(tiny_llama, ModelSpec(str(tiny_llama)))
    with pytest.raises(RecipeError, match="no head of its own"):
        Head().attach(skeleton, Context())


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_no_gradient_is_computed_below_the_head(tiny_bert: Path, checkpointing: Any) -> None:
    """Recomputation must not send the backward pass through the frozen layers."""
    spec = ModelSpec(str(tiny_bert), task="classify", labels=("a", "b"), device="cpu")
    model = qft.prepare(open_model(tiny_bert, spec), Head(), checkpointing=checkpointing)
    output = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert not any(hidden.requires_grad for hidden in output.hidden_states)
    assert output.logits.requires_grad


def test_what_it_needs(tiny_bert: Path) -> None:
    spec = ModelSpec(str(tiny_bert), task="classify", labels=("a", "b"))
    needs = Head().needs(open_skeleton(tiny_bert, spec))
    assert needs.full_precision == ("classifier",)
    assert needs.lowest_trainable_layer == 2


def test_a_broken_or_strange_folder(tiny_bert: Path, tmp_path: Path) -> None:
    run = qft.train(qft.build_recipe(job(tiny_bert, tmp_path))).folder
    path = run / "adapter/trained_tensors.safetensors"
    tensors = load_file(path)
    strange = {"bert.encoder.layer.0.output.dense.bias": torch.ones(64)}
    for content in ({"classifier.weight": tensors["classifier.weight"]}, tensors | strange):
        save_file(content, path)
        with pytest.raises(AdapterError, match="not those"):
            qft.open_any(str(run))
        with pytest.raises(AdapterError, match="not those"):
            qft.merge(run, tmp_path / "merged")
    path.write_bytes(b"nothing")
    for attempt in (lambda: qft.open_any(str(run)), lambda: qft.merge(run, tmp_path / "merged")):
        with pytest.raises(AdapterError, match="broken"):
            attempt()
    assert not (tmp_path / "merged").exists()
