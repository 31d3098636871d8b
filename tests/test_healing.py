"""`qft heal`: the chain from a large model to a small one, its figures, and where it goes on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qft
from qft import healing
from qft.errors import OutputExistsError, RecipeError
from qft.files import file_hash

WORDS = ["the cat", "a dog", "sat on", "ran to", "the mat", "my house", "and", "then"]


def chain(folder: Path, tiny_llama: Path, write_rows: Callable[..., Path], **changes: Any) -> Any:
    drawn = random.Random(0)
    texts = [{"text": " ".join(drawn.choices(WORDS, k=12))} for _ in range(24)]
    values: dict[str, Any] = {
        "model": str(tiny_llama),
        "task": "text",
        "data": {"train": str(write_rows(texts[:16], "train.jsonl")),
                 "eval": str(write_rows(texts[16:], "dev.jsonl"))},
        "prune": {"method": "depth", "layers": "1"},
        "strategy": {"name": "distill", "teacher": str(tiny_llama), "top_k": 8,
                     "student": {"name": "lora", "rank": 4}, "hidden": {}},
        "train": {"max_steps": 3, "max_length": 64, "save_every": 1, "learning_rate": 1e-2},
        "export": ["gguf:q8_0"],
        "dtype": "float32",
        "output": str(folder / "chain"),
    }  # fmt: skip
    return qft.build_recipe({**values, **changes})


def test_the_whole_chain_and_what_it_leaves(
    tmp_path: Path, tiny_llama: Path, write_rows: Callable[..., Path]
):
    from transformers import AutoModelForCausalLM

    result = qft.heal(chain(tmp_path, tiny_llama, write_rows))
    assert json.loads((tmp_path / "chain" / "heal.json").read_text()) == result
    assert result["pruned"]["parameters"] == result["healed"]["parameters"]
    assert result["pruned"]["parameters"] < result["unpruned"]["parameters"]
    loss = {name: row["metrics"]["loss"] for name, row in result.items()}
    assert loss["healed"] < loss["pruned"]
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "chain" / "merged", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.num_hidden_layers == 1
    assert list((tmp_path / "chain" / "gguf-q8_0").glob("*.gguf"))
    assert len(healing.table(result)) == 3
    record = (tmp_path / "chain" / "run" / "run.json").read_text()
    assert str(tiny_llama) not in record  # folders of this machine are nobody else's business
    assert json.loads(record)["distillation"]["teacher"] == tiny_llama.name


@pytest.mark.parametrize(
    "step",
    [
        "_prune",
        pytest.param("_worth", marks=pytest.mark.slow),
        "train",
        pytest.param("merge", marks=pytest.mark.slow),
        "export",
    ],
)
def test_a_chain_goes_on_where_it_stopped(
    step: str,
    tmp_path: Path,
    tiny_llama: Path,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
):
    """Whatever the step that fails, the former ones are not run again, and the end is the same."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    recipes = [chain(folder, tiny_llama, write_rows) for folder in (whole, broken)]
    wanted = qft.heal(recipes[0])
    called: list[str] = []

    def watched(name: str, fails: bool) -> None:
        plain = getattr(healing, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            if fails:
                raise KeyboardInterrupt
            return plain(*args, **kwargs)

        monkeypatch.setattr(healing, name, run)

    steps = ["_prune", "_worth", "train", "merge", "export"]
    with monkeypatch.context():
        watched(step, fails=True)
        with pytest.raises(qft.QftError, match="Stopped"):
            qft.heal(recipes[1])
    monkeypatch.undo()
    called.clear()
    for name in steps:
        watched(name, fails=False)
    found = qft.heal(recipes[1])
    assert found == wanted
    assert list(dict.fromkeys(called)) == steps[steps.index(step) :]
    for folder in ("pruned", "merged"):
        one, other = (
            file_hash(place / "chain" / folder / "model.safetensors") for place in (whole, broken)
        )
        assert one == other


def test_a_chain_of_another_recipe_is_not_mixed_with_this_one(
    tmp_path: Path, tiny_llama: Path, write_rows: Callable[..., Path]
):
    recipe = chain(tmp_path, tiny_llama, write_rows)
    healing._begin(Path(recipe.output), recipe, overwrite=False)
    other = chain(tmp_path, tiny_llama, write_rows, prune={"method": "depth", "layers": "0"})
    with pytest.raises(OutputExistsError, match="another recipe") as caught:
        qft.heal(other)
    assert "prune" in str(caught.value.found)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prune": None}, "pruned"),
        ({"strategy": {"name": "prefix"}}, "cannot become part"),
        ({"export": ["gguf:q99"]}, "format"),
    ],
)
def test_what_makes_no_chain_is_refused_before_anything_is_written(
    changes: dict[str, Any],
    says: str,
    tmp_path: Path,
    tiny_llama: Path,
    write_rows: Callable[..., Path],
):
    with pytest.raises(RecipeError, match=says):
        qft.heal(chain(tmp_path, tiny_llama, write_rows, **changes))
    assert not (tmp_path / "chain").exists()


def test_a_training_does_not_overlook_that_more_was_asked_for(
    tmp_path: Path, tiny_llama: Path, write_rows: Callable[..., Path]
):
    with pytest.raises(RecipeError, match="more than train"):
        qft.train(chain(tmp_path, tiny_llama, write_rows))
