"""The nearest recipe that fits: changes in their order, no more than needed, and said plainly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qft
from qft.data.tasks import Example
from qft.errors import RecipeError
from qft.planning import changes
from qft.planning.changes import Change, changed_recipe, ladder, written
from qft.planning.crossing import crossing
from qft.planning.depth import step_reading
from qft.planning.job import PlannedJob, imagined_inputs, planned_job
from qft.planning.solver import Solution, Trials, climbed, solve
from qft.recipe import load_recipe


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json of eight layers, and nothing else."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=96, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def job_of(llama: Path) -> Callable[..., PlannedJob]:
    """A job of imagined rows."""

    def make(device: str = "cpu", folder: Path = llama, **values: Any) -> PlannedJob:
        recipe = qft.build_recipe({
            "model": str(folder), "task": "text", "data": {"train": "rows"}, "strategy": "lora",
            "output": "run", "dtype": "float32", "memory": {"checkpointing": "none"}, **values,
        })  # fmt: skip
        return planned_job(recipe, imagined_inputs(recipe, folder), device)

    return make


def formula(job: PlannedJob) -> int:
    """Bytes such as a real forecast's: weights, and what each micro-batch's tokens keep."""
    recipe, memory = job.recipe, job.recipe.memory
    weights = 40_000 if recipe.quantize == "none" else 10_000
    states = 8_000 if recipe.train.optimizer == "adamw" else 2_000
    chosen = {"none": 0, "full": 8, "auto": 8}.get(memory.checkpointing, memory.checkpointing)
    tokens = job.micro_batch * max(len(e.inputs["input_ids"]) for e in job.inputs.train.examples)
    kept = (8 - int(chosen)) * 10 + int(chosen) * (0 if memory.offload == "host" else 1)
    mlp = 5 if memory.savers.tiled_mlp else 10
    return weights + states + tokens * (kept + mlp)


def words(solution: Solution) -> str:
    assert solution.nearest is not None
    return solution.nearest.words


def test_what_fits_is_left_alone(job_of):
    job = job_of()
    solution = solve(job, formula(job), formula)
    assert solution.fits
    assert solution.nearest is not None
    assert solution.nearest.job is job
    assert not solution.nearest.steps
    assert solution.remedies == ()
    assert solution.cheapest_changes == ()


def test_the_cheapest_rungs_come_first_and_are_no_steeper_than_needed(job_of):
    job = job_of()
    whole = formula(job)  # 48,000 and 2048 tokens of 90
    assert words(solve(job, whole - 1, formula)) == "memory.micro_batch=2"
    assert words(solve(job, 48_000 + 512 * 90, formula)) == "memory.micro_batch=1"
    assert words(solve(job, 48_000 + 512 * 90 - 1, formula)) == (
        "memory.micro_batch=1 memory.checkpointing=1"
    )
    three = solve(job, 48_000 + 512 * (90 - 3 * 9), formula)
    assert words(three) == "memory.micro_batch=1 memory.checkpointing=3"
    all_layers = solve(job, 48_000 + 512 * 18, formula)
    assert words(all_layers) == "memory.micro_batch=1 memory.checkpointing=full"
    tiled = solve(job, 48_000 + 512 * 18 - 1, formula)
    assert "memory.savers.tiled_mlp=true" in words(tiled)


def test_a_gpu_has_more_rungs_than_a_cpu(job_of):
    names = {device: [rung.name for rung in ladder(job_of(device))] for device in ("cpu", "cuda")}
    assert names["cpu"] == [
        "micro-batch", "checkpointing", "tiled MLP", "quantization", "length"]  # fmt: skip
    assert names["cuda"] == [
        "micro-batch", "checkpointing", "tiled MLP", "offload", "8-bit optimizer",
        "host embeddings", "8-bit head", "quantization", "length"]  # fmt: skip


def test_earlier_changes_that_turn_out_unnecessary_are_taken_back(job_of):
    def mostly_weights(job: PlannedJob) -> int:
        return (90_000 if job.recipe.quantize == "none" else 10_000) + job.micro_batch

    assert words(solve(job_of(), 50_000, mostly_weights)) == "quantize=nf4"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("share", [0.95, 0.7, 0.4, 0.25, 0.21])
def test_no_change_is_more_than_needed(job_of, device, share):
    job = job_of(device)
    budget = int(share * formula(job))
    for remedy in solve(job, budget, formula).remedies:
        assert remedy.peak_bytes == formula(remedy.job) <= budget
        made = [step.change for step in remedy.steps]
        for change in made:
            rest = [other for other in made if other is not change]
            rung = next(r for r in ladder(job) if change in r.changes)
            milder = rung.changes[: rung.changes.index(change)][-1:]
            for fewer in (rest, [*rest, *milder]):
                assert formula(job.changed(changed_recipe(job.recipe, fewer))) > budget


def test_each_step_says_the_peak_with_it(job_of):
    job = job_of()
    solution = solve(job, 48_000 + 512 * 18, formula)
    peaks = [step.peak_bytes for step in solution.nearest.steps]
    assert peaks == [48_000 + 512 * 90, 48_000 + 512 * 18]


def test_further_ways_are_ways_too_and_differ(job_of):
    job = job_of("cuda")
    solution = solve(job, int(0.25 * formula(job)), formula)
    ways = solution.cheapest_changes
    assert 2 <= len(ways) <= 3
    assert len(set(ways)) == len(ways)
    assert ways[0] == words(solution)
    assert all(remedy.peak_bytes <= solution.budget_bytes for remedy in solution.remedies)
    assert len(solve(job, solution.budget_bytes, formula, remedies=1).cheapest_changes) == 1


def test_wishes_that_are_overruled_are_named_and_another_way_is_shown(job_of):
    job = job_of("cuda")  # checkpointing: none is written
    solution = solve(job, 48_000 + 512 * 60, formula)
    assert words(solution) == "memory.micro_batch=1 memory.checkpointing=4"
    assert solution.nearest.contrary == ("memory.checkpointing: none",)
    assert any(not remedy.contrary for remedy in solution.remedies)
    free = job_of("cuda", memory={})
    assert all(not rung.changes[0].contrary for rung in ladder(free))


def test_what_is_written_is_told_from_what_is_a_default(job_of):
    recipe = job_of(quantize="none", train={"max_length": 512}).recipe
    assert written(recipe, "quantize") == "none"
    assert written(recipe, "train.max_length") == 512
    assert written(recipe, "train.optimizer") is None
    assert written(recipe, "memory.savers.tiled_mlp") is None
    resolved = qft.build_recipe(recipe.to_dict())  # every default written out
    assert written(resolved, "quantize") is None
    assert written(resolved, "memory.checkpointing") == "none"


def test_a_changed_recipe_still_knows_what_was_written(job_of):
    recipe = job_of(train={"epochs": 1}).recipe
    change = Change((("memory.savers.tiled_mlp", True), ("train.max_length", 64)), "")
    changed = changed_recipe(recipe, [change])
    assert changed.memory.savers.tiled_mlp
    assert changed.train.max_length == 64
    assert changed.train.epochs == 1
    assert changed.memory.checkpointing == "none"
    assert changed.train.model_fields_set == {"epochs", "max_length"}
    assert changed.strategy is recipe.strategy
    with pytest.raises(RecipeError, match=r"memory\.micro_batch"):
        changed_recipe(recipe, [Change((("memory.micro_batch", 0),), "")])


def test_words_do_on_the_command_line_what_the_change_does(job_of, tmp_path):
    job = job_of("cuda")
    path = tmp_path / "recipe.yaml"
    path.write_text(job.recipe.to_yaml(), encoding="utf-8")
    for rung in ladder(job):
        for change in rung.changes:
            told = load_recipe(path, change.words.split())
            assert told == changed_recipe(job.recipe, [change])


def test_nothing_fits(job_of):
    job = job_of()
    solution = solve(job, 1_000, formula)
    assert solution.nearest is None
    assert solution.cheapest_changes == ()
    assert solution.smallest is not None
    assert solution.smallest.peak_bytes == formula(solution.smallest.job)
    assert solution.smallest.peak_bytes == 18_000 + 64 * (8 + 5)
    assert solution.uncut_bytes == 18_000 + 512 * (8 + 5)
    assert "quantize=nf4" in solution.smallest.words
    assert "train.max_length=64" in solution.smallest.words


def test_the_smallest_has_no_change_that_does_not_help(job_of):
    solution = solve(job_of("cuda"), 1, lambda job: 10 + job.micro_batch)
    assert solution.smallest.words == "memory.micro_batch=1"
    assert solve(job_of(), 1, lambda job: 10).smallest.steps == ()


@pytest.mark.parametrize("seed", range(8))
def test_bytes_that_do_not_fall_neither_hang_nor_lie(job_of, seed):
    import random

    job, generator, asked = job_of("cuda"), random.Random(seed), []
    known: dict[str, int] = {}

    def noise(job: PlannedJob) -> int:
        asked.append(1)
        return known.setdefault(job.recipe.to_yaml(), generator.randrange(50, 200))

    solution = solve(job, 70, noise)
    for remedy in solution.remedies:
        assert known[remedy.job.recipe.to_yaml()] == remedy.peak_bytes <= 70
    assert len(asked) < 200


def test_what_is_refused_is_left_out_and_said(job_of):
    def refusing(job: PlannedJob) -> int:
        if job.recipe.quantize != "none":
            raise RecipeError("This family cannot be quantized yet.")
        return formula(job)

    solution = solve(job_of(), 1_000, refusing)
    assert solution.refused == {"quantize=nf4": "This family cannot be quantized yet."}
    assert "nf4" not in solution.smallest.words


def test_the_model_and_what_trains_decide_on_quantization(job_of, tmp_path):
    def offered(job: PlannedJob) -> bool:
        return "quantization" in [rung.name for rung in ladder(job)]

    assert offered(job_of())
    assert offered(job_of(quantize="int8"))
    assert not offered(job_of(quantize="nf4"))
    assert not offered(job_of(strategy="full"))
    from transformers import GPT2Config

    GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4).save_pretrained(tmp_path)
    gpt2 = job_of(folder=tmp_path)  # its weights are stored transposed
    solution = solve(gpt2, 1_000, formula)
    assert "transposed" in solution.refused["quantize=nf4"]


def test_without_bitsandbytes_nothing_of_its_is_offered(job_of, monkeypatch):
    job = job_of("cuda")
    monkeypatch.setattr(changes.importlib.util, "find_spec", lambda name: None)
    assert "8-bit optimizer" not in [rung.name for rung in ladder(job)]
    solution = solve(job, 1_000, formula)
    assert "bitsandbytes" in solution.refused["quantize=nf4"]


def test_what_was_switched_off_can_come_back(job_of):
    job = job_of(memory={"savers": {"norms": False, "lora": False}})
    rung = next(rung for rung in ladder(job) if rung.name == "savers")
    assert rung.changes[0].words == "memory.savers.lora=true memory.savers.norms=true"
    assert rung.changes[0].contrary == "memory.savers.lora: false, memory.savers.norms: false"


@pytest.mark.parametrize(
    ("chosen", "first", "count"), [("none", 1, 8), (5, 6, 3), ("auto", 0, 0), ("full", 0, 0)]
)
def test_layers_that_recompute_become_more(job_of, chosen, first, count):
    rungs = [r for r in ladder(job_of(memory={"checkpointing": chosen})) if "check" in r.name]
    made = [change.settings[0][1] for rung in rungs for change in rung.changes]
    assert made == ([*range(first, 8), "full"] if count else [])
    assert len(made) == count


def test_the_micro_batch_is_no_larger_than_what_there_is(job_of):
    def sizes(job: PlannedJob) -> list[Any]:
        rungs = [rung for rung in ladder(job) if rung.name == "micro-batch"]
        return [change.settings[0][1] for rung in rungs for change in rung.changes]

    assert sizes(job_of()) == [2, 1]
    assert sizes(job_of(memory={"micro_batch": 12})) == [6, 3, 2, 1]
    assert sizes(job_of(train={"batch_size": 1})) == []
    assert sizes(job_of(train={"batch_size": 3})) == [2, 1]


def with_rows(job: PlannedJob, lengths: list[int]) -> PlannedJob:
    """Rows that were read, of these lengths."""
    made = [
        Example(n, {"input_ids": [0] * length, "labels": [0] * length})
        for n, length in enumerate(lengths)
    ]
    rows = replace(job.inputs.train, examples=made, fingerprint="read")
    return replace(job, inputs=replace(job.inputs, train=rows))


def lengths_of(job: PlannedJob) -> list[Change]:
    return [c for rung in ladder(job) if rung.name == "length" for c in rung.changes]


def test_shorter_sequences_say_what_they_cut_and_stop_where_the_data_check_would(job_of):
    rows = [100] * 95 + [400] * 5
    job = with_rows(job_of(task="instruct"), rows)
    found = lengths_of(job)
    assert found[0].words == "train.max_length=384 data.too_long=truncate"
    assert found[0].cost == "5 of 100 rows are cut, 0.7% of all tokens"
    assert found[-1].settings[0] == ("train.max_length", 112)  # below it, completions would go
    allowed = {"train": "rows", "max_cut_share": 1, "too_long": "truncate"}
    deeper = lengths_of(with_rows(job_of(task="instruct", data=allowed), rows))
    assert deeper[-1].words == "train.max_length=64"
    assert "100 of 100 rows" in deeper[-1].cost
    dropping = {"train": "rows", "too_long": "drop"}
    dropped = lengths_of(with_rows(job_of(task="instruct", data=dropping), rows))
    assert dropped[0].cost == "5 of 100 rows are dropped"
    text = lengths_of(with_rows(job_of(), rows))
    assert text[0].words == "train.max_length=384"
    assert "reaches over 384" in text[0].cost
    classes = lengths_of(with_rows(job_of(task="classify"), rows))
    assert classes[-1].words == "train.max_length=64 data.too_long=truncate"


@pytest.mark.parametrize("bend", [1.0, 0.3, 3.0])
def test_the_crossing_is_found_in_few_trials_from_either_side(bend):
    for limit in (0.0, 1.0, 17.5, 400.0, 998.9):
        for rising in (True, False):
            trials: list[int] = []

            def amount(n: int, rising: bool = rising, trials: list[int] = trials) -> float:
                trials.append(n)
                return 1000 * ((n if rising else 1000 - n) / 1000) ** bend

            found = crossing(amount, *((0, 1000) if rising else (1000, 0)), limit)
            beyond = found + (1 if rising else -1)
            assert amount(found) <= limit < amount(beyond)
            assert len(trials) < 40


# --- with the real forecast


def metered(job: PlannedJob) -> int:
    return step_reading(job).peak_bytes


@pytest.fixture
def shallow(tmp_path: Path) -> Path:
    """Two layers: fake tensors take their time."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    ).save_pretrained(tmp_path)  # fmt: skip
    return tmp_path


@pytest.mark.slow
def test_the_solved_recipe_is_within_the_budget_and_no_change_is_too_many(job_of, shallow):
    job = job_of(folder=shallow, train={"max_length": 96, "batch_size": 2})
    whole = metered(job)
    budget = int(0.4 * whole)
    solution = solve(job, budget, metered, remedies=1)
    assert solution.peak_bytes == whole
    assert solution.nearest is not None
    assert metered(solution.nearest.job) == solution.nearest.peak_bytes <= budget
    made = [step.change for step in solution.nearest.steps]
    assert len(made) > 1
    assert metered(job.changed(changed_recipe(job.recipe, made[:-1]))) > budget


@pytest.mark.slow
def test_a_gpus_ladder_on_the_real_forecast(job_of, shallow):
    job = job_of("cuda", shallow, dtype="bfloat16", train={"max_length": 64, "batch_size": 2})
    trials = Trials(job, metered)
    climbed(trials, ladder(job), 0)
    peaks = trials.known_bytes
    assert set(peaks) >= {"", "memory.micro_batch=1"}
    assert all(size > 0 for size in peaks.values())
    lowest = min(peaks, key=lambda made: peaks[made])
    for helpful in ("micro_batch=1", "checkpointing=full", "host_embeddings=true", "quantize=nf4",
                    "adamw-8bit", "max_length=8"):  # fmt: skip
        assert helpful in lowest
