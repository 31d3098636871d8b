"""The largest context, micro-batch and model that fit, by cheap formulas and by the real step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_planning_solver import metered, with_rows

import qft
from qft.bench import shapes
from qft.errors import RecipeError
from qft.planning import maximize as planning
from qft.planning.job import PlannedJob, imagined_inputs, planned_job
from qft.planning.maximize import family_of, maximize, smaller_that_fits


@pytest.fixture
def job_of(tmp_path: Path) -> Callable[..., PlannedJob]:
    """A job of imagined rows on two layers with 1000 positions."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1000,
    ).save_pretrained(tmp_path)  # fmt: skip

    def make(device: str = "cpu", folder: Path = tmp_path, **values: Any) -> PlannedJob:
        recipe = qft.build_recipe({
            "model": str(folder), "task": "text", "data": {"train": "rows"}, "strategy": "lora",
            "output": "run", "dtype": "float32", "memory": {"checkpointing": "none"},
            "train": {"max_length": 96}, **values,
        })  # fmt: skip
        return planned_job(recipe, imagined_inputs(recipe, folder), device)

    return make


def formula(job: PlannedJob) -> int:
    """A bent line over the tokens of the longest micro-batch, above the weights."""
    tokens = sum(len(example.inputs["input_ids"]) for example in job.longest_micro_batch())
    kept = {"none": 100, "full": 20}.get(str(job.recipe.memory.checkpointing), 60)
    weights = 10_000 if job.recipe.quantize == "none" else 3_000
    return weights + kept * tokens + max(0, tokens - 1500) * 40


@pytest.mark.parametrize(
    ("tokens", "value"), [(16 * 4, 16), (17 * 4, 16), (100 * 4, 96), (640 * 4 + 3, 640)]
)
def test_the_largest_context_within_the_budget(job_of, tokens, value):
    budget = 10_000 + 100 * tokens + max(0, tokens - 1500) * 40
    asked: list[int] = []

    def counted(job: PlannedJob) -> int:
        asked.append(job.recipe.train.max_length)
        assert max(len(e.inputs["input_ids"]) for e in job.longest()) == asked[-1]
        return formula(job)

    found = maximize(job_of(), budget, counted, "max_length")
    assert found.value == value
    assert found.words == f"train.max_length={value}"
    assert found.peak_bytes <= budget
    assert found.limited_by == "the budget"
    assert max(asked) <= 1000
    assert len(asked) < 20


def test_positions_are_a_limit_and_said_to_be(job_of):
    found = maximize(job_of(), 10**9, formula, "max_length")
    assert found.value == 1000  # no multiple of 16
    assert found.limited_by == "the model has positions for 1000 tokens"
    prefix = maximize(job_of(strategy="prompt"), 10**9, formula, "max_length")
    assert prefix.value < 1000  # the prompt's own tokens take some


def test_nothing_is_said_to_fit_where_nothing_does(job_of):
    found = maximize(job_of(), 9_000, formula, "max_length")
    assert found.value is None
    assert found.peak_bytes == formula_at(16)
    assert maximize(job_of(), 9_000, formula, "batch_size").value is None


def formula_at(tokens: int) -> int:
    return 10_000 + 4 * 100 * tokens


def test_with_other_changes_a_longer_context_fits(job_of):
    budget = formula_at(96)
    job = job_of()
    alone = maximize(job, budget, formula, "max_length")
    solved = maximize(job, budget, formula, "max_length", solve=True)
    assert alone.value == 96
    # at the strongest, a row of 1000 tokens takes 20,000 bytes: all positions
    assert solved.value == 1000
    assert solved.words.startswith("train.max_length=1000 memory.micro_batch=1")
    assert solved.peak_bytes <= budget


def test_the_largest_micro_batch(job_of):
    job = job_of(train={"max_length": 32, "batch_size": 8})
    found = maximize(job, 10_000 + 100 * 32 * 11 + 50, formula, "batch_size")
    assert found.value == 11
    assert found.words == "memory.micro_batch=11 train.batch_size=11"
    few = maximize(job, 10_000 + 100 * 32 * 5, formula, "batch_size")
    assert few.words == "memory.micro_batch=5"
    solved = maximize(job, 10_000 + 100 * 32 * 5, formula, "batch_size", solve=True)
    assert solved.value > 5
    assert "checkpointing" in solved.words


def test_no_micro_batch_has_more_rows_than_there_are(job_of):
    found = maximize(with_rows(job_of(), [30, 20, 10]), 10**9, formula, "batch_size")
    assert found.value == 3
    assert found.limited_by == "there are 3 rows"


def test_real_rows_are_planned_at_the_length_asked_for(job_of):
    found = maximize(with_rows(job_of(), [30, 20, 10]), formula_at(64), formula, "max_length")
    assert found.value == 64


def by_parameters(job: PlannedJob) -> int:
    """Two bytes a parameter, or half a byte."""
    count = sum(p.numel() for p in job.ready.skeleton.parameters())
    return count // 2 if job.recipe.quantize == "nf4" else 2 * count


@pytest.fixture
def middle(job_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlannedJob:
    """The third of a family of four, each about four times as large as the one before."""
    made = {
        f"small-{width}": {
            "model_type": "llama", "vocab_size": 300, "hidden_size": width,
            "intermediate_size": 3 * width, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 512,
        }
        for width in (128, 64, 512, 256)
    } | {"other": {"model_type": "bert", "vocab_size": 300}}  # fmt: skip
    monkeypatch.setattr(shapes, "SHAPES", made)
    monkeypatch.setattr(planning, "SHAPES", made)
    folder = tmp_path / "middle"
    shapes.shape_config("small-256").save_pretrained(folder)
    return job_of(folder=folder)


def bytes_of(width: int, quantize: str = "none") -> int:
    values = {**shapes.SHAPES[f"small-{width}"]}
    linear = 2 * width**2 * (1 + 1 + 0.5 + 0.5 + 9)
    count = 2 * 300 * width + linear + (2 * 2 + 1) * width
    assert values["hidden_size"] == width
    return int(count // 2 if quantize == "nf4" else 2 * count)


def test_the_largest_model_of_the_family(middle):
    assert by_parameters(middle) == bytes_of(256)
    found = maximize(middle, bytes_of(256), by_parameters, "model")
    assert (found.value, found.words) == ("small-256", "model=small-256")
    assert found.limited_by == "the budget"
    assert maximize(middle, 10**9, by_parameters, "model").limited_by.startswith("there is no")
    assert maximize(middle, 10, by_parameters, "model").value is None
    solved = maximize(middle, bytes_of(512, "nf4"), by_parameters, "model", solve=True)
    assert solved.words == "model=small-512 quantize=nf4"


def test_a_smaller_model_for_what_does_not_fit(middle):
    found = smaller_that_fits(middle, bytes_of(64, "nf4"), by_parameters)
    assert found is not None
    assert found.words == "model=small-64 quantize=nf4"
    assert smaller_that_fits(middle, 10, by_parameters) is None


def test_families_are_in_order():
    assert family_of(shapes.SHAPES["llama-3.2-3b"]) == [
        "llama-3.1-70b", "llama-3.1-8b", "llama-3.2-3b", "llama-3.2-1b"]  # fmt: skip
    assert family_of({"model_type": "mamba"}) == []


def test_unknown_wishes_and_unknown_families_are_refused(job_of, tmp_path):
    with pytest.raises(RecipeError, match="made larger"):
        maximize(job_of(), 10**9, formula, "epochs")
    from transformers import GPTNeoXConfig

    GPTNeoXConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2,
    ).save_pretrained(tmp_path / "neox")  # fmt: skip
    with pytest.raises(RecipeError, match="family"):
        maximize(job_of(folder=tmp_path / "neox"), 10**9, formula, "model")


def test_one_step_more_would_not_fit(job_of):
    job = job_of(train={"max_length": 32, "batch_size": 2})
    budget = 2 * metered(job)
    found = maximize(job, budget, metered, "max_length")
    assert isinstance(found.value, int)
    longer = job_of(train={"max_length": found.value + 16, "batch_size": 2})
    at = job_of(train={"max_length": found.value, "batch_size": 2})
    assert metered(at) <= budget < metered(longer)
