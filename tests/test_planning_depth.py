"""A deep model's step from a few of its layers, and the largest length that fits."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qft import readiness
from qft.bench.shapes import SHAPES, TASKS
from qft.lean.timeline import Reading
from qft.planning import depth
from qft.planning.depth import forget, step_reading
from qft.planning.fake_training import FakeTraining
from qft.planning.job import PlannedJob, imagined_examples, imagined_inputs, planned_job
from qft.planning.likeness import shortened
from qft.planning.short_training import ShortTraining
from qft.recipe import Recipe, build_recipe

_DECODER = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 5,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "llama": SHAPES["llama-3.1-8b"] | _DECODER,
    "qwen": SHAPES["qwen2.5-0.5b"] | _DECODER,
    "gemma": SHAPES["gemma-3-1b"]
    | _DECODER
    | {"num_hidden_layers": 10, "head_dim": 8, "sliding_window": 16},
    "bert": SHAPES["bert-base"]
    | {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 5,
       "num_attention_heads": 4, "vocab_size": 300},
    "t5": SHAPES["t5-base"]
    | {"d_model": 32, "d_kv": 8, "d_ff": 80, "num_layers": 5, "num_decoder_layers": 5,
       "num_heads": 4, "vocab_size": 300},
}  # fmt: skip
LORA = {"name": "lora", "rank": 4}


@pytest.fixture(autouse=True)
def _nothing_kept() -> Any:
    forget()
    yield
    forget()


def make_job(
    folder: Path, config: dict[str, Any], *, device: str = "cuda", length: int = 40, **keys: Any
) -> PlannedJob:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    memory = {"micro_batch": 2, "checkpointing": keys.pop("checkpointing", "full")}
    values = {
        "model": str(folder),
        "task": TASKS.get(config["model_type"], "text"),
        "data": {"train": "rows.jsonl"},
        "strategy": LORA,
        "train": {"max_length": length, "batch_size": 2},
        "memory": memory | keys.pop("memory", {}),
        "output": str(folder / "run"),
        **keys,
    }
    recipe = build_recipe(values)
    return planned_job(recipe, imagined_inputs(recipe, folder), device)


def with_memory(job: PlannedJob, **changes: Any) -> Recipe:
    memory = job.recipe.memory.model_copy(update=changes)
    return job.recipe.model_copy(update={"memory": memory})


FAST = [
    ("llama", {"quantize": "nf4"}),
    ("llama", {"checkpointing": 1, "device": "cpu"}),
    ("qwen", {"checkpointing": "none", "strategy": {"name": "prefix", "length": 3}}),
    ("qwen", {"strategy": {"name": "full"}}),
    ("qwen", {"checkpointing": "none", "strategy": {"name": "layers", "last": 1}}),
    ("bert", {"device": "cpu"}),
    pytest.param("gemma", {"checkpointing": "none"}, marks=pytest.mark.slow),
    pytest.param("t5", {"checkpointing": "none"}, marks=pytest.mark.slow),
]


def _named(case: Any) -> str:
    return "-".join(str(part) for part in case) if isinstance(case, tuple) else str(case)


def assert_same(short: Reading, whole: Reading) -> None:
    """Every number; an optimizer's temporaries, counted by what trains, to a thousandth."""
    made, wanted = short.phases["optimizer"], whole.phases["optimizer"]
    assert abs(made.total - wanted.total) <= 0.001 * wanted.total
    assert short.peak.phase == whole.peak.phase
    assert abs(short.most["temporary"] - whole.most["temporary"]) <= 0.001 * whole.peak_bytes
    assert abs(short.made_bytes - whole.made_bytes) <= 0.03 * whole.made_bytes
    same: dict[str, Any] = {"phases": {**short.phases, "optimizer": wanted}}
    same["made_bytes"] = whole.made_bytes
    if short.peak.phase == "optimizer":
        most = {**short.most, "temporary": whole.most["temporary"]}
        same |= {"peak": wanted, "most": most}
    assert replace(short, **same) == whole


@pytest.mark.parametrize(("family", "keys"), FAST, ids=_named)
def test_a_few_layers_tell_what_all_of_them_hold(
    tmp_path: Path, family: str, keys: dict[str, Any]
) -> None:
    job = make_job(tmp_path / "model", SMALL[family], **keys)
    short = ShortTraining(job)
    assert_same(short.meter(job, None, None), FakeTraining(job).meter())
    assert all(run < layers for run, layers in short.layers.values())


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"checkpointing": "none"},
        {"checkpointing": 3},
        {"quantize": "nf4"},
        {"strategy": {"name": "full"}},
        {"strategy": {"name": "layers", "last": 1}},
        {"strategy": {"name": "head"}},
        {"strategy": {"name": "prefix"}},
        {"strategy": {"name": "lora", "rank": 4, "dropout": 0.1}},
        {"memory": {"offload": "host"}},
        {"memory": {"micro_batch": 1}},
    ],
    ids=str,
)
def test_whatever_the_setting(
    tmp_path: Path, family: str, device: str, keys: dict[str, Any]
) -> None:
    if keys.get("strategy") == {"name": "head"} and family not in ("bert",):
        pytest.skip("it has no head of its own")
    job = make_job(tmp_path / "model", SMALL[family], device=device, **keys)
    assert_same(step_reading(job), FakeTraining(job).meter())


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_every_built_in_shape(tmp_path: Path, shape: str) -> None:
    config = SHAPES[shape]
    for keys in ({"quantize": "nf4"}, {"checkpointing": "none", "device": "cpu"}):
        job = make_job(tmp_path / "model", config, length=96, **keys)
        assert_same(step_reading(job), FakeTraining(job).meter())


def test_a_question_is_answered_once_and_a_model_prepared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[ShortTraining] = []

    class Counted(ShortTraining):
        def __init__(self, job: PlannedJob) -> None:
            made.append(self)
            super().__init__(job)

    monkeypatch.setattr(depth, "ShortTraining", Counted)
    job = make_job(tmp_path / "model", SMALL["llama"])
    first = step_reading(job)
    assert step_reading(job) is first
    rows = imagined_examples(job.inputs.task, 56, 1)
    kept = job.changed(with_memory(job, checkpointing=1))
    assert_same(step_reading(kept, rows), FakeTraining(kept).meter(rows))
    assert step_reading(kept).peak_bytes > first.peak_bytes
    assert step_reading(job) is first
    assert len(made) == 1
    quantized = make_job(tmp_path / "model", SMALL["llama"], quantize="nf4")
    assert step_reading(quantized).peak_bytes < first.peak_bytes
    assert len(made) == 2


def test_another_choice_of_savers_tries_no_strategy_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path / "model", SMALL["llama"])
    tried: list[object] = []
    plain = readiness._tried
    monkeypatch.setattr(readiness, "_tried", lambda *args: tried.append(args) or plain(*args))
    assert job.changed(with_memory(job, checkpointing="none")).ready.needs == job.ready.needs
    train = job.recipe.train.model_copy(update={"max_length": 20})
    assert job.changed(job.recipe.model_copy(update={"train": train})).ready.skeleton is (
        job.ready.skeleton
    )
    assert not tried
    twice = job.recipe.model_copy(update={"quantize": "nf4"})
    assert job.changed(twice).ready.held == "nf4"
    steps = job.recipe.train.model_copy(update={"max_steps": 77})
    assert job.changed(job.recipe.model_copy(update={"train": steps})).ready.context.total_steps
    assert len(tried) == 2


def test_labels_are_part_of_the_question(tmp_path: Path) -> None:
    job = make_job(tmp_path / "model", SMALL["llama"] | {"vocab_size": 20000})
    few = imagined_examples(job.inputs.task, 40, 2, label_share=0.1)
    assert step_reading(job, few).peak_bytes < step_reading(job).peak_bytes


def test_a_recomputed_layer_holds_no_mask(tmp_path: Path) -> None:
    """Where a mask is wanted, each layer that keeps its activations has one of its own."""
    length = 256
    windows = make_job(tmp_path / "model", SMALL["gemma"], length=length)
    kept = windows.changed(with_memory(windows, checkpointing="none"))
    masks = 9 * length * length * 2  # of ten layers one sees everything
    assert step_reading(windows).activation_bytes < masks < step_reading(kept).activation_bytes


@pytest.mark.parametrize(
    ("likenesses", "kept"),
    [
        ("a" * 80, 3),
        ("ab" * 20, 4),
        ("sssssf" * 4 + "ss", 6),
        ("a" * 10 + "b" * 20, 6),
        ("ab", 2),
        ("a", 1),
    ],
)
def test_the_layers_that_stay_stand_for_all(likenesses: str, kept: int) -> None:
    short = shortened(likenesses)
    assert len(short.kept) == kept

    def around(values: str, at: int) -> str:
        padded = f"^{values}$"
        return padded[at : at + 3]

    stays = "".join(likenesses[number] for number in short.kept)
    for number, place in enumerate(short.stands_for):
        assert around(stays, place) == around(likenesses, number)
