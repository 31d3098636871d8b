"""What `train` refuses, `check` refuses with the same error, and neither loads a weight for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qft
from qft import models
from qft.errors import QftError, RecipeError
from qft.inputs import open_inputs
from qft.readiness import make_ready

TEXT = [{"text": f"a few words to learn by heart, and {i} more"} for i in range(8)]
CLASSES = [{"text": f"word {i}", "label": "yes" if i % 2 else "no"} for i in range(8)]
MANY = [{"text": f"word {i}", "label": ["yes", "new"] if i % 2 else ["no"]} for i in range(8)]


def start(name: str, **more: Any) -> dict[str, Any]:
    return {"name": "lora", "rank": 4, "initialisation": name, **more}


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "pissa-nf4": ({"strategy": start("pissa"), "quantize": "nf4"}, "needs weights that are not"),
    "orthogonal-int8": (
        {"strategy": start("orthogonal"), "quantize": "int8"}, "needs weights that are not",
    ),
    "loftq-unquantized": ({"strategy": start("loftq")}, "the base is not quantized"),
    "loftq-stack": (
        {"strategy": {"name": "stack", "of": ["bitfit", start("loftq")]}}, "base is not quantized",
    ),
    "full-nf4": ({"strategy": "full", "quantize": "nf4"}, "Nothing is left to quantize"),
    "prompt-packing": (
        {"strategy": {"name": "prompt", "length": 2}, "train": {"packing": True}},
        "puts tokens before each row",
    ),
    "adalora-short": (
        {"strategy": "adalora", "train": {"max_steps": 2}}, "too short to take ranks away",
    ),
    "eva-few": ({"strategy": start("eva", rank=64), "data": {"rows": TEXT[:1]}}, "no more direct"),
    "layers-many": ({"strategy": {"name": "layers", "last": 9}}, "fewer layers"),
    "smoothing-many": (
        {"task": "classify", "train": {"label_smoothing": 0.1}, "data": {"rows": MANY}},
        "one class a row",
    ),
    "weights-many": (
        {"task": "classify", "train": {"class_weights": "balanced"}, "data": {"rows": MANY}},
        "one class a row",
    ),
}  # fmt: skip


def recipe(
    base: Path, folder: Path, write_rows: Callable[..., Path], changes: dict[str, Any]
) -> qft.Recipe:
    values: dict[str, Any] = {"task": "text", "strategy": start("default"), **changes}
    rows = values.pop("data", {}).get("rows", TEXT)
    train = {"max_length": 64, "batch_size": 2, **values.pop("train", {})}
    return qft.build_recipe({
        "model": str(base), "dtype": "float32", "device": "cpu", "train": train,
        "data": {"train": str(write_rows(rows))}, "output": str(folder / "run"), **values,
    })  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_check_and_train_refuse_alike_before_a_weight_is_loaded(
    case: str,
    tiny_llama: Path,
    tiny_bert: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
):
    changes, words = CASES[case]
    base = tiny_bert if changes.get("task") == "classify" else tiny_llama
    made = recipe(base, tmp_path, write_rows, changes)
    monkeypatch.setattr(models, "open_model", lambda *a, **k: pytest.fail("a weight was loaded"))
    errors = []
    for verb in (qft.check, qft.train):
        with pytest.raises(QftError, match=words) as caught:
            verb(made)
        error = caught.value
        errors.append((type(error), error.what, error.where, error.found, error.fix))
    assert errors[0] == errors[1]
    assert errors[0][0] is RecipeError
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("pattern", [{}, {"q_proj": 3}])
def test_an_odd_rank_cannot_begin_orthogonal(
    pattern: dict[str, int],
    tiny_llama: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
):
    settings = start("orthogonal", rank=4 if pattern else 3, rank_pattern=pattern)
    with pytest.raises(RecipeError, match="it must be even"):
        recipe(tiny_llama, tmp_path, write_rows, {"strategy": settings})


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": start("loftq"), "quantize": "nf4"},
        {"strategy": start("pissa")},
        {"strategy": start("eva")},
        {"strategy": {"name": "prefix", "length": 2}, "train": {"packing": True}},
        {"task": "classify", "train": {"label_smoothing": 0.1}, "data": {"rows": CLASSES}},
    ],
    ids=["loftq", "pissa", "eva", "packing", "smoothing"],
)
def test_what_can_be_trained_is_not_refused(
    changes: dict[str, Any],
    tiny_llama: Path,
    tiny_bert: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
):
    base = tiny_bert if changes.get("task") == "classify" else tiny_llama
    report = qft.check(recipe(base, tmp_path, write_rows, changes))
    assert report["model"]["trained_parameters"] > 0


def test_the_trial_changes_nothing_that_training_draws(
    tiny_llama: Path, tmp_path: Path, write_rows: Callable[..., Path]
):
    made = recipe(tiny_llama, tmp_path, write_rows, {"strategy": {"name": "prompt", "length": 4}})
    inputs = open_inputs(made)
    before = torch.get_rng_state()
    ready = make_ready(made, inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert ready.trained_parameters == 4 * 64
    assert ready.context.total_steps == 3 * -(-len(inputs.train.examples) // 2)
    assert not any("prompt" in name for name, _ in ready.skeleton.named_parameters())
