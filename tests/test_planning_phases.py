"""What a plan says of loading, evaluating, saving and the rest, against what they really take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from torch import nn

import qft
from qft import models
from qft.data.tasks import TASKS, ExampleSet
from qft.errors import RecipeError
from qft.evaluation import evaluate
from qft.export.formats import FORMATS, write_format
from qft.files import folder_bytes
from qft.lean.engine import Savers
from qft.lean.meter import Meter
from qft.merging.merge import open_source, write_model
from qft.planning.afterwards import merge_and_export
from qft.planning.evaluating import FakeEvaluation
from qft.planning.fake_training import FakeTraining
from qft.planning.generating import generate_phase
from qft.planning.job import PlannedJob, imagined_examples, imagined_inputs, planned_job
from qft.planning.key_values import cross_bytes, key_value_bytes
from qft.planning.phases import phases_of
from qft.planning.skeletons import open_held_skeleton
from qft.planning.stored_weights import held_bytes
from qft.preparation import prepare
from qft.recipe import Recipe, build_recipe


def recipe_of(folder: Path, task: str = "text", **changes: Any) -> Recipe:
    """A small recipe; its rows are imagined."""
    values = {
        "model": str(folder), "task": task, "data": {"train": "x", "eval_share": 0.5},
        "strategy": {"name": "lora", "rank": 4}, "dtype": "float32", "output": "run",
        "train": {"max_length": 48, "batch_size": 4},
    }  # fmt: skip
    return build_recipe({**values, **changes})


def job_of(folder: Path, task: str = "text", **changes: Any) -> PlannedJob:
    """A planned job on the CPU."""
    recipe = recipe_of(folder, task, **changes)
    return planned_job(recipe, imagined_inputs(recipe, folder), "cpu")


def opened(job: PlannedJob) -> nn.Module:
    """The job's real model, prepared."""
    recipe, ready = job.recipe, job.ready
    model = models.open_model(job.inputs.base, ready.spec, ready.needs.full_precision)
    return prepare(
        model, recipe.strategy, checkpointing=recipe.memory.checkpointing,
        savers=Savers(**recipe.memory.savers.model_dump()), context=ready.context,
    )  # fmt: skip


def static_bytes(model: nn.Module) -> int:
    """Of everything that a real model holds, quantizers' scales and tables too."""
    with Meter(model) as counting:
        pass
    return counting.reading().static_bytes


@pytest.mark.parametrize("kind", ["none", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_loaded_model(kind: str, dtype: torch.dtype, tiny_llama: Path):
    spec = models.ModelSpec(str(tiny_llama), quantize=kind, dtype=dtype, device="cpu")
    assert held_bytes(open_held_skeleton(tiny_llama, spec)) == static_bytes(
        models.open_model(tiny_llama, spec)
    )


@pytest.mark.parametrize("format", ["bnb:nf4", "bnb:int8"])
def test_a_folder_that_is_stored_quantized_keeps_its_head(
    format: str, tiny_llama: Path, tmp_path: Path
):
    spec = models.ModelSpec(str(tiny_llama), dtype=torch.float32, device="cpu")
    source = open_source(tiny_llama, models.open_skeleton(tiny_llama, spec))
    write_format(source, format, tmp_path / "stored")
    found = held_bytes(open_held_skeleton(tmp_path / "stored", spec))
    assert found == static_bytes(models.open_model(tmp_path / "stored", spec))


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3,
              "num_attention_heads": 4, "num_key_value_heads": 2},
    "gemma3_text": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 7,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
                    "sliding_window": 8},
    "mistral": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": 8},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4,
           "decoder_start_token_id": 0, "pad_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_are_those_of_the_real_cache(family: str):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(family, vocab_size=100, **FAMILIES[family])
    halves = config.is_encoder_decoder
    torch.manual_seed(0)
    model: Any = (AutoModelForSeq2SeqLM if halves else AutoModelForCausalLM).from_config(config)
    ids = torch.ones(2, 10, dtype=torch.long)
    written = model.eval().generate(
        input_ids=ids, attention_mask=ids, max_new_tokens=12, min_new_tokens=12, do_sample=False,
        pad_token_id=0, return_dict_in_generate=True,
    ).past_key_values  # fmt: skip
    parts = [written.self_attention_cache, written.cross_attention_cache] if halves else [written]
    real = [
        sum(t.untyped_storage().nbytes() for layer in part.layers
            for t in (layer.keys, layer.values)) for part in parts
    ]  # fmt: skip
    positions = 12 if halves else 10 + 12 - 1
    assert key_value_bytes(config, 2, positions, torch.float32) == real[0]
    assert cross_bytes(config, 2, 10, torch.float32) == (real[1] if halves else 0)


CASES = {
    "text": ("tiny_llama", {}),
    "text, nf4": ("tiny_llama", {"task": "text", "quantize": "nf4"}),
    "text, no saver": (
        "tiny_llama", {"task": "text", "memory": {"savers": {"label_loss": False}}}
    ),
    "prefix": ("tiny_llama", {"task": "text", "strategy": "prefix"}),
    "full": ("tiny_llama", {"task": "text", "strategy": "full"}),
    "classify": ("tiny_bert", {}),
    "token": ("tiny_bert", {}),
    "extract": ("tiny_bert", {}),
    "seq2seq": ("tiny_t5", {}),
}  # fmt: skip


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_an_evaluation_holds_what_was_foreseen(
    case: str, padded: bool, request: pytest.FixtureRequest
):
    fixture, changes = CASES[case]
    changes = dict(changes)
    folder = request.getfixturevalue(fixture)
    job = job_of(folder, changes.pop("task", case), **changes)
    lengths = [48, 48, 33, 20] if padded else [48] * 4
    task = TASKS[job.recipe.task]
    examples = [imagined_examples(task, n, 1)[0] for n in lengths]
    if task.predicts == "span":
        examples = [replace(e, truth=_window(len(e.inputs["input_ids"]))) for e in examples]
    foreseen = FakeEvaluation(job).meter(examples)
    model = opened(job)
    with Meter(model) as counting:
        evaluate(model, examples, task, pad_token_id=0, labels=job.inputs.train.labels)
    real = counting.reading()
    made = real.peak_bytes - real.static_bytes  # not all layers have run on fake tensors
    found = foreseen.peak_bytes - foreseen.static_bytes
    assert found + real.static_bytes == pytest.approx(real.peak_bytes, rel=0.01)
    assert found == pytest.approx(made, rel=0.05)


def _window(length: int) -> Any:
    from qft.data.extract import Window

    spans = [(n, n + 1) for n in range(length)]
    return Window(0, 0, "x" * length, tuple(spans), none_at=0, answers=("x",))


def test_a_text_that_is_written_holds_what_was_foreseen(tiny_llama: Path):
    job = job_of(tiny_llama)
    foreseen = generate_phase(job, FakeTraining(job).meter(), prompt=40, new_tokens=60, rows=4)
    model: Any = opened(job)
    ids = torch.ones(4, 40, dtype=torch.long)
    model.eval()
    with torch.no_grad(), Meter(model) as counting:
        model.generate(input_ids=ids, attention_mask=ids, max_new_tokens=60, min_new_tokens=60,
                       do_sample=False, pad_token_id=0)  # fmt: skip
    states = foreseen.device["optimizer"]
    assert foreseen.peak_bytes - states == pytest.approx(counting.reading().peak_bytes, rel=0.03)


ROWS = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(12)]


@pytest.mark.parametrize("strategy", [{"name": "lora", "rank": 16}, {"name": "full"}])
def test_the_disk_holds_what_was_foreseen(
    strategy: dict[str, Any], tiny_llama: Path, tmp_path: Path, write_rows: Callable[..., Path]
):
    recipe = recipe_of(
        tiny_llama, "instruct", strategy=strategy, output=str(tmp_path / "run"), device="cpu",
        data={"train": str(write_rows(ROWS))},
        train={"max_length": 48, "batch_size": 4, "max_steps": 6, "save_every": 2,
               "keep_checkpoints": 2},
    )  # fmt: skip
    job = planned_job(recipe, qft.inputs.open_inputs(recipe), "cpu")
    phases = {phase.phase: phase for phase in phases_of(job, FakeTraining(job).meter())}
    assert list(phases) == ["load", "train", "save"]  # there are no held-out rows
    saved = phases["save"].disk
    qft.train(recipe)
    run = tmp_path / "run"
    slack = 3 * 4096  # texts
    for name in ("checkpoints", "adapter"):
        real = folder_bytes(run / name)
        assert saved[name] == pytest.approx(real, rel=0.01, abs=slack), name
    assert phases["save"].disk_peak == sum(saved.values()) + saved["checkpoints"] // 2


def test_features_are_foreseen(tiny_bert: Path, tmp_path: Path, write_rows: Callable[..., Path]):
    rows = write_rows([{"text": f"it is {i}" * (1 + i % 3), "label": i % 2} for i in range(12)])
    recipe = recipe_of(
        tiny_bert, "classify", strategy={"name": "layers", "last": 1}, device="cpu",
        output=str(tmp_path / "run"), data={"train": str(rows)},
        train={"max_length": 48, "batch_size": 4, "max_steps": 6, "dropout": 0.0},
    )  # fmt: skip
    job = planned_job(recipe, qft.inputs.open_inputs(recipe), "cpu")
    (training,) = [p for p in phases_of(job, FakeTraining(job).meter()) if p.phase == "train"]
    assert qft.train(recipe).report["feature_cache"]
    real = sum(p.stat().st_size for p in (tmp_path / "feature-cache").rglob("*.safetensors"))
    assert training.disk["feature cache"] == pytest.approx(real, rel=0.01, abs=1024)


def test_loading_is_the_file_and_what_is_made_of_it(tiny_llama: Path):
    stored = folder_bytes(tiny_llama)  # float32, and small texts
    phases = {}
    for dtype, quantize in (("float32", "none"), ("bfloat16", "none"), ("float32", "nf4")):
        job = job_of(tiny_llama, dtype=dtype, quantize=quantize)
        phases[dtype, quantize] = phases_of(job, FakeTraining(job).meter())[0]
    mapped = phases["float32", "none"]
    assert "buffers" not in mapped.device
    assert mapped.note
    converted = phases["bfloat16", "none"]
    assert stored - 60_000 < converted.device["buffers"] <= stored
    assert converted.device["weights"] == pytest.approx(mapped.device["weights"] / 2, rel=0.01)
    assert phases["float32", "nf4"].device["buffers"] > converted.device["buffers"]


def test_on_a_gpu_loading_keeps_the_host_busy(tiny_llama: Path):
    recipe = recipe_of(tiny_llama)
    job = planned_job(recipe, imagined_inputs(recipe, tiny_llama), "cuda")
    load = phases_of(job, FakeTraining(job).meter())[0]
    assert "buffers" not in load.device
    assert load.host["buffers"] == pytest.approx(load.device["weights"], rel=0.01)


def test_a_config_is_enough(tiny_llama: Path, tmp_path: Path):
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with_weights, without = job_of(tiny_llama), job_of(tmp_path)
    reading = FakeTraining(with_weights).meter()
    assert phases_of(without, reading) == phases_of(with_weights, reading)


def test_the_disk_is_looked_at(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    job = job_of(tiny_llama)
    reading = FakeTraining(job).meter()
    assert not phases_of(job, reading)[-1].note
    monkeypatch.setattr("qft.planning.saving.free_disk_bytes", lambda path: 1000)
    assert "are needed" in phases_of(job, reading)[-1].note


def test_held_out_rows_decide_whether_there_is_an_evaluation(tiny_llama: Path):
    job = job_of(tiny_llama, data={"train": "x"})
    reading = FakeTraining(job).meter()
    assert [p.phase for p in phases_of(job, reading)] == ["load", "train", "save"]
    long = imagined_examples(TASKS["text"], 60, 1)
    inputs = replace(job.inputs, held_out=ExampleSet(long))
    more = phases_of(replace(job, inputs=inputs), reading)
    assert [p.phase for p in more] == ["load", "train", "evaluate", "save"]


@pytest.mark.parametrize(("epochs", "amid"), [(1, False), (2, True)])
def test_an_evaluation_meets_shapes_of_products_of_its_own(
    wide_llama: Path, epochs: int, amid: bool
):
    job = job_of(wide_llama, data={"train": "x"}, dtype="bfloat16", device="cpu",
                 train={"max_length": 48, "batch_size": 4, "epochs": epochs})  # fmt: skip
    reading = FakeTraining(job).meter()

    def evaluated(*counts: tuple[int, int]) -> dict[str, int]:
        rows = [row for length, count in counts
                for row in imagined_examples(TASKS["text"], length, count)]  # fmt: skip
        phases = phases_of(replace(job, inputs=replace(job.inputs, held_out=ExampleSet(rows))),
                           reading)  # fmt: skip
        return {p.phase: p.after.evaluated if p.after else 0 for p in phases}

    alike, ragged = evaluated((40, 24)), evaluated((40, 8), (30, 8), (20, 8))
    assert alike["evaluate"] > 5
    assert ragged["evaluate"] == ragged["save"] == 3 * alike["evaluate"]
    assert ragged["train"] == (ragged["evaluate"] if amid else 0)
    assert ragged["load"] == 0


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 numbers, which every format can hold."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        dtype=torch.bfloat16,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


TEXTS = 3 * 4096  # config.json and the like


@pytest.mark.parametrize(
    "format",
    ["", "gguf:q4_k_m", "gguf:q8_0", "gguf:f16", "gguf-lora:f16", "gguf-lora:q8_0", "bnb:nf4",
     "bnb:int8", "compressed-tensors:w4a16", "compressed-tensors:w8a8", "safetensors:bf16",
     "safetensors:fp32"],
)  # fmt: skip
def test_what_is_merged_and_exported_takes_as_much_disk(
    format: str, wide_llama: Path, tmp_path: Path
):
    job = job_of(wide_llama, strategy={"name": "lora", "rank": 32})
    (merged, *exported) = merge_and_export(job, [format] if format else [])
    (foreseen,) = exported or [merged]
    spec = replace(job.ready.spec, dtype=torch.bfloat16)
    source = open_source(
        wide_llama, models.open_skeleton(wide_llama, spec), adapter=_rank_32(wide_llama, tmp_path),
        strategy=job.recipe.strategy,
    )  # fmt: skip
    if format:
        write_format(source, format, tmp_path / "out")
    else:
        write_model(source, tmp_path / "out")
    real = folder_bytes(tmp_path / "out")
    assert sum(foreseen.disk.values()) == pytest.approx(real, rel=0.01, abs=TEXTS)


def _rank_32(folder: Path, place: Path) -> Path:
    job = job_of(folder, strategy={"name": "lora", "rank": 32})
    (place / "adapter").mkdir()
    job.recipe.strategy.save(opened(job), place / "adapter")
    return place / "adapter"


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx:fp32", "onnx:int8"])
def test_an_encoder_takes_as_much_disk(format: str, minilm: Path, tmp_path: Path):
    pytest.importorskip("onnxscript")
    job = job_of(minilm, "classify")
    (_, foreseen) = merge_and_export(job, [format])
    source = open_source(
        minilm, models.open_skeleton(minilm, replace(job.ready.spec, task="embed"))
    )
    write_format(source, format, tmp_path / "out")
    real = folder_bytes(tmp_path / "out")
    assert sum(foreseen.disk.values()) == pytest.approx(real, rel=0.02)
    assert foreseen.disk_peak >= real


def test_what_a_format_refuses_is_said(tiny_llama: Path):
    (_, refused) = merge_and_export(job_of(tiny_llama), ["onnx:int8"])
    assert not refused.disk
    assert "encoders alone" in refused.note
    with pytest.raises(RecipeError, match="no such export format"):
        merge_and_export(job_of(tiny_llama), ["gguf:q9"])


def test_a_former_model_stays_until_the_new_one_is_there(wide_llama: Path):
    job = job_of(wide_llama)
    (alone,) = merge_and_export(job, [])
    (beside,) = merge_and_export(job, [], replacing=wide_llama)
    assert beside.disk_peak == alone.disk_peak + folder_bytes(wide_llama)


def test_a_config_is_enough_to_plan_every_format(wide_llama: Path, tmp_path: Path):
    (tmp_path / "config.json").write_bytes((wide_llama / "config.json").read_bytes())
    formats = [f for f in FORMATS if not f.startswith("onnx")]
    with_weights = merge_and_export(job_of(wide_llama), formats)
    for bare, whole in zip(merge_and_export(job_of(tmp_path), formats), with_weights, strict=True):
        files = folder_bytes(wide_llama) - (wide_llama / "model.safetensors").stat().st_size
        assert sum(bare.disk.values()) == pytest.approx(sum(whole.disk.values()), abs=3 * files)


def test_a_merge_runs_on_the_host(wide_llama: Path):
    recipe = recipe_of(wide_llama)
    job = planned_job(recipe, imagined_inputs(recipe, wide_llama), "cuda")
    (merged,) = merge_and_export(job, [])
    assert not merged.device
    assert merged.host_bytes > 0


@pytest.mark.parametrize("start", ["default", "pissa", "loftq"])
def test_a_start_that_is_kept_is_held_and_saved(start: str, tiny_llama: Path, tmp_path: Path):
    quantize = "nf4" if start == "loftq" else "none"
    job = job_of(tiny_llama, strategy={"name": "lora", "rank": 16, "initialisation": start},
                 quantize=quantize)  # fmt: skip
    reading = FakeTraining(job).meter()
    phases = {phase.phase: phase for phase in phases_of(job, reading)}
    model: Any = opened(job)
    first = [t for m in model.modules() for v in vars(m).values() if isinstance(v, tuple)
             for t in v if isinstance(t, torch.Tensor)]  # fmt: skip
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert phases["train"].device["adapters"] == trained + sum(t.nbytes for t in first)
    job.recipe.strategy.save(model, tmp_path)
    saved = phases["save"].disk["adapter"]
    assert saved == pytest.approx(folder_bytes(tmp_path), rel=0.01, abs=2 * 4096)
    assert ("temporary" in phases["load"].device) == (start != "default")
