"""`qft plan` from words to words: what it says, its exit codes, its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import transformers
from conftest import make_tokenizer
from typer.testing import CliRunner, Result

from qft.bench import shapes
from qft.cli import app
from qft.planning import maximize
from qft.planning.table import verdict

SIZES: dict[str, Any] = {
    f"small-{width}": {
        "model_type": "llama", "vocab_size": 320, "hidden_size": width,
        "intermediate_size": 3 * width, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
        "dtype": "bfloat16", "eos_token_id": 0,
    }
    for width in (64, 1024)
}  # fmt: skip
MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The larger one of a family of two, without weights."""
    monkeypatch.setattr(shapes, "SHAPES", SIZES)
    monkeypatch.setattr(maximize, "SHAPES", SIZES)
    made = tmp_path / "model"
    shapes.shape_config("small-1024").save_pretrained(made)
    return made


def plan(*words: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, words)])


def result_of(*words: object) -> dict[str, Any]:
    answer = plan(*words, "--json")
    assert answer.exit_code in (0, 3), answer.output
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def test_it_fits_it_does_not_or_it_is_close(folder: Path, tmp_path: Path):
    short = (folder, "--device", "cpu", "--max-length", 64, "--strategy", "bitfit")
    picture = tmp_path / "plan.svg"
    found = result_of(*short, "--memory", "3GiB", "--picture", picture)
    ElementTree.parse(picture)
    assert found["fits"] is True
    assert found["close"] is False
    assert found["low_bytes"] < found["peak_bytes"] < found["high_bytes"]
    assert "fits into 3.0 GiB with" in verdict(found)
    near = plan(*short, "--quiet", "--memory", found["peak_bytes"] + MIB)
    assert near.exit_code == 0
    assert "may or may not be enough" in near.output


def test_where_nothing_fits_more_memory_or_a_smaller_model_is_named(folder: Path):
    short = (folder, "--device", "cpu", "--max-length", 16, "--strategy", "bitfit")
    answer = plan(*short, "--memory", "70MiB")
    assert answer.exit_code == 3
    last = answer.output.replace("\n", " ")
    assert "nothing makes it fit; it would with a budget of" in last
    assert "or with model=small-64" in last


def test_a_student_that_writes_is_planned_so(folder: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "the cat sat on the mat " * 4, "completion": "and it rained " * 4}
    rows.write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    config = shapes.shape_config("small-64")
    teacher = tmp_path / "teacher"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(teacher)
    make_tokenizer(teacher)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({
        "model": str(teacher), "task": "instruct", "data": {"train": str(rows)},
        "strategy": {"name": "distill", "student": "lora", "teacher": str(teacher),
                     "on_policy": 0.5, "max_new_tokens": 30},
        "output": str(tmp_path / "run"), "train": {"max_length": 200, "batch_size": 4},
    }))  # fmt: skip
    found = result_of(recipe, "--device", "cpu", "--memory", "8GiB")
    phases = {phase["phase"]: phase for phase in found["phases"]}
    assert list(phases)[:3] == ["load", "write", "train"]
    # two layers, two heads of 16 numbers, key and value, four rows, two bytes
    per_token = 2 * 2 * 16 * 2 * 4 * 2
    written = phases["write"]["device"]["key-value cache"]
    assert 30 * per_token < written < 200 * per_token
