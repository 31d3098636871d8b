"""Help for small labelled data: weights, smoothing, stratified limits, folds, changed copies."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import qft
from qft.data.augment import augmented
from qft.data.examples import Example
from qft.data.tasks import TASKS, load_train_eval, split_fold
from qft.errors import DataError, RecipeError
from qft.folds import train_folds
from qft.models import ModelSpec, open_model
from qft.preparation import prepare
from qft.recipe import Augment
from qft.registry import build_strategy
from qft.step import accumulate_gradients
from qft.task_loss import TaskLoss, balanced_weights

Writer = Callable[..., Path]
ROWS = [{"text": f"word{i} and more", "label": "rare" if i % 5 == 0 else "common"}
        for i in range(40)]  # fmt: skip


def class_examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    return [
        Example(i, {"input_ids": torch.randint(4, 260, (4 + i,), generator=generator).tolist(),
                    "labels": int(i % 4 == 0)})
        for i in range(8)
    ]  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_a_weighted_smoothed_step_is_one_weighted_mean(
    smoothing: float, weighted: bool, micro_batch: int, tiny_bert: Path
):
    torch.manual_seed(0)
    spec = ModelSpec(str(tiny_bert), "classify", ("a", "b"), dtype=torch.float32, device="cpu")
    model = prepare(open_model(tiny_bert, spec), build_strategy({"name": "head"})).eval()
    rows = class_examples()
    weights = balanced_weights(rows, 2) if weighted else None
    assert weights is None or weights == (8 / 12, 2.0)
    batch = TASKS["classify"].collate(rows, 0)
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    losses = functional.cross_entropy(
        logits, batch["labels"], reduction="none", label_smoothing=smoothing
    )
    each = torch.tensor(weights)[batch["labels"]] if weights else torch.ones(8)
    wanted = (losses * each).sum() / each.sum()
    wanted.backward()
    gradient = model.classifier.weight.grad.clone()  # type: ignore[union-attr]
    model.zero_grad()
    result = accumulate_gradients(
        model, rows, TASKS["classify"], step=1, micro_batch=micro_batch, pad_token_id=0,
        loss=TaskLoss(smoothing, weights),
    )  # fmt: skip
    assert float(result.loss) == pytest.approx(float(wanted), rel=1e-5)
    torch.testing.assert_close(model.classifier.weight.grad, gradient)  # type: ignore[union-attr]
    assert result.items == 8


def test_smoothed_tokens_are_shifted_as_the_models_own(tiny_llama: Path):
    model = prepare(
        open_model(tiny_llama, ModelSpec(str(tiny_llama), dtype=torch.float32, device="cpu")),
        build_strategy({"name": "lora"}),
    )
    ids = list(range(4, 20))
    row = Example(0, {"input_ids": ids, "labels": [-100] * 5 + ids[5:]})
    found = accumulate_gradients(
        model, [row], TASKS["text"], step=1, micro_batch=1, pad_token_id=0, loss=TaskLoss(0.1)
    )
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    wanted = functional.cross_entropy(logits[4:-1], torch.tensor(ids[5:]), label_smoothing=0.1)
    assert float(found.loss) == pytest.approx(float(wanted), rel=1e-5)


def recipe(model: Path, path: Path, output: Path, **data: Any) -> Any:
    return qft.build_recipe({
        "model": str(model), "task": "classify", "strategy": "head", "dtype": "float32",
        "data": {"train": str(path), "max_duplicate_share": 1, **data},
        "train": {"max_length": 48, "epochs": 1, "batch_size": 8}, "device": "cpu",
        "output": str(output),
    })  # fmt: skip


@pytest.fixture
def tokenizer(tiny_bert: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_bert)


def test_a_limit_by_class(tiny_bert: Path, tmp_path: Path, write_rows: Writer, tokenizer: Any):
    made = recipe(tiny_bert, write_rows(ROWS), tmp_path / "run", limit="5 per class")
    training, _ = load_train_eval(made, tokenizer)
    assert Counter(e.inputs["labels"] for e in training.examples) == {0: 5, 1: 5}
    again, _ = load_train_eval(made, tokenizer)
    assert again.fingerprint == training.fingerprint
    with pytest.raises(RecipeError, match="64 per class"):
        recipe(tiny_bert, write_rows(ROWS), tmp_path / "run", limit="some")


def test_every_row_is_held_out_once_and_classes_are_shared_out():
    rows = [(i, {"label": "a" if i % 4 else "b"}) for i in range(20)]
    held = [split_fold(rows, f"{n}/5", 0, "label") for n in range(1, 6)]
    assert sorted(i for _, part in held for i, _ in part) == list(range(20))
    assert all(len(kept) == 16 for kept, _ in held)
    assert all(sum(row["label"] == "b" for _, row in part) == 1 for _, part in held)
    with pytest.raises(DataError, match="no such fold"):
        split_fold(rows, "6/5", 0)


def test_folds_are_trained_and_summed_up(tiny_bert: Path, tmp_path: Path, write_rows: Writer):
    made = recipe(tiny_bert, write_rows(ROWS[:12]), tmp_path / "run")
    summary = train_folds(made, 3)
    assert len(summary["folds"]) == 3
    mean = sum(fold["accuracy"] for fold in summary["folds"]) / 3
    assert summary["mean"]["accuracy"] == pytest.approx(mean)
    assert json.loads((tmp_path / "run" / "folds.json").read_text()) == summary
    assert (tmp_path / "run" / "fold-3" / "adapter").is_dir()
    with pytest.raises(RecipeError, match="names others"):
        train_folds(recipe(tiny_bert, write_rows(ROWS), tmp_path / "x", eval_share=0.1), 3)


def test_a_class_of_one_row_cannot_be_folded(
    tiny_bert: Path, tmp_path: Path, write_rows: Writer, tokenizer: Any
):
    rows = [{"text": f"text {i}", "label": "b" if i == 3 else "a"} for i in range(6)]
    path = write_rows(rows)
    for fold in ("1/3", "2/3", "3/3"):  # whichever holds it out, and before any is trained
        made = recipe(tiny_bert, path, tmp_path / "run", fold=fold)
        with pytest.raises(DataError, match="one row only, so the fold") as caught:
            load_train_eval(made, tokenizer)
        assert "data.fold" in caught.value.where
        assert caught.value.found == "'b'"
    named = recipe(tiny_bert, path, tmp_path / "run", fold="1/3", labels=["a", "b"])
    assert load_train_eval(named, tokenizer)[0].labels == ("a", "b")
    numbers = write_rows([{"text": f"t {i}", "label": i / 8} for i in range(6)], "numbers.jsonl")
    made = recipe(tiny_bert, numbers, tmp_path / "run", fold="1/3")
    assert load_train_eval(made, tokenizer)[0].labels_are == "number"


def test_copies_are_changed_and_the_rows_stay():
    rows = [(i, {"text": f"one two three four {i}", "label": "a"}) for i in range(30)]
    settings = Augment(copies=2, mask=0.3, insert=0.2, replace=0.2, delete=0.2, swap=0.2)
    made = augmented(rows, ["text"], settings, seed=1, mask_token="[MASK]")
    assert [row for row in made if row in rows] == rows
    assert len(made) == 90
    texts = " ".join(row["text"] for _, row in made)
    assert "[MASK]" in texts
    assert made == augmented(rows, ["text"], settings, seed=1, mask_token="[MASK]")
    assert made != augmented(rows, ["text"], settings, seed=2, mask_token="[MASK]")
    silent = Augment(copies=1, mask=0, insert=0, replace=0, delete=0, swap=0)
    assert augmented(rows, ["text"], silent, seed=1, mask_token=None)[1] == rows[0]
    gone = Augment(copies=1, mask=0, insert=0, replace=0, delete=1, swap=0)
    emptied = augmented(rows, ["text"], gone, seed=1, mask_token=None)
    assert all(row["text"].split() for _, row in emptied)


def test_characters_are_changed_where_there_are_no_spaces():
    rows = [(1, {"text": "今天天气很好我们去公园"})]
    settings = Augment(copies=1, mask=0, insert=0, replace=0, delete=0.5, swap=0)
    (_, row), (_, changed) = augmented(rows, ["text"], settings, seed=0, mask_token=None)
    assert 0 < len(changed["text"]) < len(row["text"])


def test_a_latin_word_does_not_make_chinese_spaced():
    text = "我昨天买了 iPhone 手机，真的很好用"
    rows = [(1, {"text": text}), (2, {"text": "这个 app 不好"})]
    silent = Augment(copies=50, mask=0, insert=0, replace=0, delete=0, swap=0)

    def copies(**shares: float) -> list[str]:
        settings = silent.model_copy(update=shares)
        made = augmented(rows, ["text"], settings, seed=0, mask_token=None)
        return [row["text"] for _, row in made[1:51]]

    def han(text: str) -> int:
        return len(re.findall(r"[\u4e00-\u9fff]", text))

    assert set(copies()) == {text}
    shorter = copies(delete=0.2)
    assert sum(found != text for found in shorter) > 45
    assert all(han(found) > 4 for found in shorter), "no chunk is lost at once"
    assert 0 < sum("iPhone" in found for found in shorter) < 50, "a word goes as a whole"
    other = copies(replace=0.5)
    assert {len(re.findall("[A-Za-z]+", found)) for found in other} == {1}
    assert {han(found) + found.count("，") for found in other} == {han(text) + text.count("，")}, (
        "a character for a character"
    )
    assert any("app" in found for found in other)


def test_held_out_rows_are_never_changed(
    tiny_bert: Path, tmp_path: Path, write_rows: Writer, tokenizer: Any
):
    data = {"eval_share": 0.25, "augment": {"copies": 2, "delete": 0.5}}
    plain = recipe(tiny_bert, write_rows(ROWS), tmp_path / "run", eval_share=0.25)
    made = recipe(tiny_bert, write_rows(ROWS), tmp_path / "run", **data)
    (before, held), (after, still) = (load_train_eval(r, tokenizer) for r in (plain, made))
    assert held is not None
    assert still is not None
    assert still.fingerprint == held.fingerprint
    assert len(after.examples) == 3 * len(before.examples)
    with pytest.raises(RecipeError, match="not for this task"):
        qft.check(made.model_copy(update={"task": "extract"}))


def test_a_run_with_all_of_it(tiny_bert: Path, tmp_path: Path, write_rows: Writer):
    path = write_rows(ROWS)
    run = qft.train(qft.build_recipe({
        "model": str(tiny_bert), "task": "classify", "strategy": "lora", "dtype": "float32",
        "data": {"train": str(path), "eval_share": 0.25, "augment": {"copies": 1},
                 "max_duplicate_share": 1},
        "train": {"max_length": 48, "epochs": 1, "batch_size": 8, "class_weights": "balanced",
                  "label_smoothing": 0.1, "embedding_noise": 5},
        "device": "cpu", "output": str(tmp_path / "run"),
    }))  # fmt: skip
    assert run.metrics["loss"] > 0
