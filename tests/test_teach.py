"""The teacher cache as users meet it: the same losses as live, and never a wrong one."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import shutil
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import qft
from qft import hardware, training
from qft.data.tasks import pad_id
from qft.distillation import teach as teaching
from qft.distillation.lesson_store import LessonStore
from qft.distillation.supply import settings_in
from qft.errors import Interrupted, ModelError, QftError, RecipeError, SaveError, WillNotFitError
from qft.progress import Reporter
from qft.recipe import build_recipe
from qft.step import accumulate_gradients

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
         "vocab_size": 260, "max_position_embeddings": 130,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
LABELS = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
ROWS: dict[str, list[dict[str, Any]]] = {
    "classify": [{"text": "good " * (i % 5 + 1), "label": "abaa"[i % 4]} for i in range(12)],
    "instruct": [{"prompt": f"say {i} " * (i % 3 + 1), "completion": f"it is {i}" * (i % 4 + 1)}
                 for i in range(24)],
    "extract": [{"question": "where", "context": "the cat sat on the mat " * (i % 3 + 1),
                 "answers": {"text": ["the mat"], "answer_start": [15]}} for i in range(9)],
    "token": [{"tokens": ["the", "cat"] * (i % 3 + 1), "tags": ["a", "b"] * (i % 3 + 1)}
              for i in range(9)],
    "seq2seq": [{"source": f"say {i} " * (i % 3 + 1), "target": f"it is {i}"} for i in range(12)],
}  # fmt: skip


class Told(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def about(self) -> str:
        return "\n".join(line for line in self.lines if line.startswith("teacher"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Random models, made when they are asked for; a teacher has a layer more."""
    import transformers as hub

    made: dict[str, Path] = {}
    t5 = {"vocab_size": 260, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4,
          "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 2,
          "decoder_start_token_id": 0}  # fmt: skip
    bert = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    makers: dict[str, Callable[[int], Any]] = {
        "llama": lambda n: hub.LlamaForCausalLM(
            hub.LlamaConfig(**SMALL, num_key_value_heads=2, num_hidden_layers=n)),
        "t5": lambda n: hub.T5ForConditionalGeneration(hub.T5Config(**t5, num_layers=n)),
        "classify": lambda n: hub.BertForSequenceClassification(
            hub.BertConfig(**bert, **LABELS, num_hidden_layers=n)),
        "token": lambda n: hub.BertForTokenClassification(
            hub.BertConfig(**bert, **LABELS, num_hidden_layers=n)),
        "extract": lambda n: hub.BertForQuestionAnswering(
            hub.BertConfig(**bert, num_hidden_layers=n)),
    }  # fmt: skip

    def make(name: str) -> Path:
        if name not in made:
            kind, _, role = name.partition("-")
            made[name] = tmp_path_factory.mktemp("models") / name
            torch.manual_seed(len(name))
            one = makers[kind](3 if role == "teacher" else 2)
            for parameter in one.parameters():  # sharper than a fresh one's, so that errors show
                parameter.data.mul_(3) if parameter.dim() > 1 else None
            one.save_pretrained(made[name])
            make_tokenizer(made[name])
        return made[name]

    return make


KINDS = {"instruct": "llama", "seq2seq": "t5"}


def recipe_values(
    folder: Path, model: Any, task: str = "instruct", train: Any = None, **distill: Any
) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]), encoding="utf-8")
    kind = KINDS.get(task, task)
    strategy = {"name": "distill", "teacher": str(model(f"{kind}-teacher")),
                "student": {"name": "full"}, "cache": "top-k", "cache_precision": "float32",
                **distill}  # fmt: skip
    return {
        "model": str(model(kind)), "task": task, "data": {"train": str(rows)},
        "strategy": strategy, "dtype": "float32", "device": "cpu",
        "train": {"epochs": 1, "batch_size": 4, "max_length": 100, "dropout": 0,
                  "learning_rate": 1e-3, **(train or {})},
        "output": str(folder / "run"),
    }  # fmt: skip


def teach(values: dict[str, Any], told: Reporter | None = None) -> dict[str, Any]:
    return qft.teach(build_recipe(values), reporter=told or Told())


def opened(values: dict[str, Any], told: Reporter | None = None) -> Any:
    """What `qft train` holds before its first step."""
    from transformers import set_seed

    recipe = build_recipe(values)
    set_seed(0)
    return training._open(recipe, hardware.choose("cpu", recipe.dtype), told or Told())


def gradients(found: Any, micro_batch: int = 3) -> tuple[float, dict[str, Tensor]]:
    result = accumulate_gradients(
        found.model, found.inputs.train.examples[:8], found.inputs.task, step=1,
        micro_batch=micro_batch, pad_token_id=pad_id(found.inputs.tokenizer), layout=found.layout,
        loss=found.loss,
    )  # fmt: skip
    grads = {n: p.grad.clone() for n, p in found.model.named_parameters() if p.grad is not None}
    found.model.zero_grad(set_to_none=True)
    return result.loss.item(), grads


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    total = sum(float(g.square().sum()) for g in first.values()) ** 0.5
    apart = sum(float((g - second[n]).square().sum()) for n, g in first.items()) ** 0.5
    assert total > 0
    return apart / total


def shards(folder: Path) -> dict[str, bytes]:
    root = folder / "teacher-cache"
    files = (p for p in root.rglob("*") if p.is_file() and p.name != "lock")
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qft.distillation.lesson_store.SHARD_BYTES", 30_000)


@pytest.fixture
def no_teacher(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called on, nobody may open a teacher."""

    def forbid() -> None:
        monkeypatch.setattr(teaching, "live_source", None)
        monkeypatch.setattr(training, "live_source", None)

    return forbid


# --- the same loss as with the teacher there


@pytest.mark.parametrize(("task", "distill"), [
    ("instruct", {"top_k": 260}),
    ("instruct", {"top_k": 1000, "temperature": 2.0, "loss": "reverse-kl"}),
    ("instruct", {"top_k": 260, "loss": "jsd", "weight": 1.0}),
    ("instruct", {"top_k": 260, "loss": "uld"}),
    ("instruct", {"loss": "none", "hidden": {}}),
    ("instruct", {"top_k": 260, "hidden": {"tokens": "all", "layers": "last"}}),
    ("classify", {}), ("classify", {"hidden": {"distance": "mse"}}), ("token", {}),
    ("extract", {}), ("seq2seq", {"top_k": 260}),
])  # fmt: skip
def test_all_of_it_kept_exactly_is_the_live_teacher(
    model: Any, tmp_path: Path, task: str, distill: dict[str, Any], no_teacher: Any
) -> None:
    values = recipe_values(tmp_path, model, task, **distill)
    live = opened({**values, "strategy": {**values["strategy"], "cache": "off"}})
    assert live.lessons is None
    teach(values)
    no_teacher()
    cached = opened(values)
    assert cached.lessons is not None
    for micro_batch in (1, 4):
        loss, grads = gradients(live, micro_batch)
        again, same = gradients(cached, micro_batch)
        assert again == pytest.approx(loss, rel=3e-6)
        assert distance(grads, same) < 2e-6


@pytest.mark.slow
def test_fewer_tokens_and_float16_are_near(model: Any, tmp_path: Path) -> None:
    values = recipe_values(tmp_path, model)
    live = opened({**values, "strategy": {**values["strategy"], "cache": "off"}})
    grads = gradients(live)[1]
    apart = {}
    for count in (4, 32, 260):
        strategy = {**values["strategy"], "top_k": count, "cache_precision": "float16"}
        apart[count] = distance(grads, gradients(opened({**values, "strategy": strategy}))[1])
    assert apart[260] < 1e-3  # float16 alone
    assert apart[260] < apart[32] < apart[4]


@pytest.mark.slow
def test_draws_come_near_in_the_mean(model: Any, tmp_path: Path) -> None:
    values = recipe_values(tmp_path, model)
    values["strategy"] |= {"weight": 1.0}
    live = opened({**values, "strategy": {**values["strategy"], "cache": "off"}})
    wanted = gradients(live)[1]
    values["strategy"] |= {"cache": "samples", "draws": 8}
    each = []
    for seed in range(8):
        recipe = build_recipe({**values, "train": {**values["train"], "seed": seed}})
        settings = settings_in(recipe)
        assert settings is not None
        live.loss.source = teaching.TeacherCache(recipe, settings, live.inputs, Told()).ready()
        each.append(gradients(live)[1])
    mean = {name: sum(one[name] for one in each) / len(each) for name in wanted}
    alone = sum(distance(wanted, one) for one in each) / len(each)
    assert distance(wanted, mean) < 0.5 * alone  # one over the root of eight is 0.35


# --- a training


def test_a_training_teaches_first_and_another_reads(
    model: Any, tmp_path: Path, no_teacher: Any
) -> None:
    values = recipe_values(tmp_path, model, top_k=16)
    told = Told()
    first = qft.train(build_recipe(values), reporter=told)
    said = told.about()
    assert "supervised tokens x" in said
    assert "of the mass" in said
    names = [line.split(":")[0] for line in told.lines]
    assert names.index("teacher cache") < names.index("model")  # they never share the memory
    no_teacher()
    again = qft.train(build_recipe({**values, "output": str(tmp_path / "again")}))
    one, two = (load_file(r.folder / "adapter" / "trained_tensors.safetensors")
                for r in (first, again))  # fmt: skip
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_teacher_leaves_memory(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    held: list[Any] = []
    plain = teaching.live_source

    def watched(*arguments: Any, **named: Any) -> Any:
        live = plain(*arguments, **named)
        held.append(weakref.ref(live.teacher.model))
        return live

    monkeypatch.setattr(teaching, "live_source", watched)
    gc.disable()  # so that nothing else may collect what it should have
    try:
        opened(recipe_values(tmp_path, model, hidden={}))
        assert held
        assert held[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_quantized_teacher(model: Any, tmp_path: Path, quantize: str) -> None:
    values = recipe_values(tmp_path, model, teacher_quantize=quantize, top_k=260)
    live = opened({**values, "strategy": {**values["strategy"], "cache": "off"}})
    cached = opened(values)
    # 8-bit layers round what comes in by the batch
    assert gradients(cached)[0] == pytest.approx(gradients(live)[0], rel=1e-3)
    told = Told()
    teach({**values, "strategy": {**values["strategy"], "teacher_quantize": "none"}}, told)
    assert "made anew, another quantization than" in told.about()


def test_an_adapter_as_the_teacher(model: Any, tmp_path: Path, no_teacher: Any) -> None:
    rows = recipe_values(tmp_path, model)
    trained = qft.train(build_recipe({
        **rows, "model": str(model("llama-teacher")), "strategy": {"name": "lora"},
        "output": str(tmp_path / "teacher"),
    }))  # fmt: skip
    values = recipe_values(tmp_path, model, teacher=str(trained.folder))
    teach(values)
    no_teacher()
    assert teach(values)["parts_made"] == 0
    path = trained.folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1}, path)
    with pytest.raises(TypeError):  # it would have to be opened
        teach(values)


# --- the report


def test_the_report_is_exact(model: Any, tmp_path: Path) -> None:
    values = recipe_values(tmp_path, model, top_k=16, cache_precision="float16")
    told = Told()
    report = teach(values, told)
    found = opened(values)
    labels = [e.inputs["labels"][1:] for e in found.inputs.train.examples]
    rows = sum(label != -100 for one in labels for label in one)
    assert report["rows"] == rows
    assert report["bytes_per_row"] == 16 * 9 / 8 + 16 * 2 + 4  # ids of 260 in 9 bits
    assert report["bytes"] == rows * report["bytes_per_row"]
    said = found.lessons.lessons(found.inputs.train.examples)
    masses = torch.cat([lesson["log_probabilities"].double().exp().sum(dim=1) for lesson in said])
    assert report["coverage"] == pytest.approx(float(masses.mean()), abs=1e-6)
    folder = Path(report["folder"])
    stored = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert stored["coverage"] == report["coverage"]
    assert stored["teacher"] == "llama-teacher"
    assert str(tmp_path) not in (folder / "report.json").read_text(encoding="utf-8")
    on_disk = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert report["bytes"] <= on_disk < report["bytes"] + 2000
    before, after = (line for line in told.lines if "supervised tokens" in line)
    assert "from 5 examples" in before
    size = before.partition("= ")[2].partition(";")[0]
    assert size in after  # of the likeliest tokens it is known beforehand


def test_the_room_for_draws_is_foreseen(model: Any, tmp_path: Path) -> None:
    told = Told()
    report = teach(recipe_values(tmp_path, model, cache="samples", draws=32), told)
    foreseen = float(told.about().partition(" x ")[2].partition(" bytes")[0])
    assert foreseen == pytest.approx(report["bytes_per_row"], rel=0.2)


# --- interrupted


def test_killed_it_goes_on_byte_equal(model: Any, tmp_path: Path, small_shards: None) -> None:
    """SIGKILL at random moments of a whole run, teacher and all."""
    whole = tmp_path / "whole"
    whole.mkdir()
    values = recipe_values(tmp_path, model, top_k=64)
    started = time.monotonic()
    teach({**values, "output": str(whole / "run")})
    seconds = time.monotonic() - started
    assert len(list(whole.rglob("lessons.safetensors"))) > 5
    moments, killed = random.Random(1), 0
    for _ in range(5):
        child = os.fork()
        if child == 0:
            try:
                teach(values)
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0.3, 1.0) * seconds)
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert killed
    teach(values)
    assert shards(tmp_path) == shards(whole)


def test_ctrl_c_keeps_what_is_done(
    model: Any, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = recipe_values(tmp_path, model, top_k=64)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values), encoding="utf-8")
    plain = LessonStore.write

    def stop(self: LessonStore, number: int, lessons: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        plain(self, number, lessons)

    monkeypatch.setattr(LessonStore, "write", stop)
    from qft import cli

    monkeypatch.setattr("sys.argv", ["qft", "teach", str(recipe)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    with pytest.raises(Interrupted, match="the same command goes on"):
        qft.train(build_recipe(values))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(LessonStore, "write", plain)
    told = Told()
    report = teach(values, told)
    assert f"2 of {report['parts_made'] + 2} parts are there already" in told.about()


def test_out_of_memory_halves_the_batch(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qft.distillation.live import LiveTeacher

    values = recipe_values(tmp_path, model, top_k=8)
    sizes: list[int] = []
    plain = LiveTeacher.lessons

    def scarce(self: LiveTeacher, examples: Any) -> Any:
        sizes.append(len(examples))
        if len(examples) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, examples)

    monkeypatch.setattr(LiveTeacher, "lessons", scarce)
    most = 2
    report = teach(values)
    assert max(sizes) > 4
    assert min(sizes) <= 2
    most = 0
    with pytest.raises(WillNotFitError, match="Not even one example"):
        teach({**values, "output": str(tmp_path / "other" / "run")})
    monkeypatch.undo()
    whole = teach({**values, "output": str(tmp_path / "whole" / "run")})
    assert report["rows"] == whole["rows"]
    assert report["coverage"] == pytest.approx(whole["coverage"], abs=1e-6)


# --- never a wrong one


def change_weights(values: dict[str, Any], folder: Path) -> None:
    """One number, far inside."""
    copy = Path(shutil.copytree(values["strategy"]["teacher"], folder / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][-1, -1] += 1e-3
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    values["strategy"]["teacher"] = str(copy)


def change_labels(values: dict[str, Any], folder: Path) -> None:
    rows = [{**row, "completion": row["completion"].replace("it", "is")}
            for row in ROWS["instruct"]]  # fmt: skip
    path = folder / "others.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values["data"]["train"] = str(path)


def strategy(**changes: Any) -> Callable[[dict[str, Any], Path], None]:
    return lambda values, folder: values["strategy"].update(changes)


CHANGES: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "teacher": change_weights,
    "data": change_labels,
    "dtype": lambda values, folder: values.update(dtype="bfloat16"),
    "quantization": strategy(teacher_quantize="nf4"),
    "count": strategy(top_k=9),
    "kind": strategy(cache="samples"),
    "temperature": strategy(temperature=3.0),
    "precision": strategy(cache_precision="float16"),
    "layers": strategy(hidden={}),
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_what_has_changed_is_made_anew_and_named(model: Any, tmp_path: Path, what: str) -> None:
    values = recipe_values(tmp_path, model, top_k=8)
    teach(values)
    before = shards(tmp_path)
    CHANGES[what](values, tmp_path)
    told = Told()
    assert teach(values, told)["parts_made"] > 0
    assert "made anew, another" in told.about()
    assert what in told.about().partition("made anew, another ")[2].partition(" than")[0]
    assert set(before) < set(shards(tmp_path))


def test_what_does_not_matter_makes_nothing_anew(
    model: Any, tmp_path: Path, no_teacher: Any
) -> None:
    values = recipe_values(tmp_path, model, top_k=8)
    teach(values)
    moved = shutil.copytree(values["strategy"]["teacher"], tmp_path / "moved" / "llama-teacher")
    values["strategy"] |= {"teacher": str(moved), "weight": 0.9, "loss": "jsd", "draws": 3,
                           "student": {"name": "lora"}}  # fmt: skip
    values["train"] |= {"seed": 7, "learning_rate": 0.5}
    no_teacher()
    assert teach(values)["parts_made"] == 0


def test_the_seed_decides_what_is_drawn(model: Any, tmp_path: Path) -> None:
    values = recipe_values(tmp_path, model, cache="samples")
    teach(values)
    values["train"]["seed"] = 7
    told = Told()
    teach(values, told)
    assert "another seed" in told.about()


def flip(folder: Path) -> None:
    path = next(folder.rglob("00001/lessons.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def lost_report(folder: Path) -> None:
    next(folder.rglob("report.json")).unlink()


def broken_report(folder: Path) -> None:
    path = next(folder.rglob("report.json"))
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"vocabulary": 260', '"vocabulary": -1'), encoding="utf-8")


@pytest.mark.parametrize(("damage", "made"), [(flip, 1), (lost_report, 0), (broken_report, 0)])
def test_damage_is_mended(
    model: Any, tmp_path: Path, small_shards: None, damage: Any, made: int
) -> None:
    values = recipe_values(tmp_path, model, top_k=64)
    teach(values)
    before = shards(tmp_path)
    damage(tmp_path / "teacher-cache")
    assert shards(tmp_path) != before
    assert teach(values)["parts_made"] == made
    assert shards(tmp_path) == before


def test_an_example_it_was_not_asked_about(model: Any, tmp_path: Path) -> None:
    found = opened(recipe_values(tmp_path, model, top_k=8))
    with pytest.raises(QftError, match="no lesson of this example"):
        found.lessons.lessons([type(found.inputs.train.examples[0])(999, {"input_ids": [1]})])


def test_another_run_at_it(model: Any, tmp_path: Path) -> None:
    values = recipe_values(tmp_path, model, top_k=8)
    report = teach(values)
    held = LessonStore(tmp_path / "teacher-cache", {}, [], [])
    held.folder = Path(report["folder"])
    assert held.lock() == "write"
    with pytest.raises(QftError, match="Another run is at this teacher cache"):
        teach(values)
    held.share()
    teach(values)  # two may read
    flip_any = next(held.folder.rglob("lessons.safetensors"))
    flip_any.write_bytes(flip_any.read_bytes()[:-1])
    with pytest.raises(QftError, match="Another run is at this teacher cache"):
        teach(values)  # and none may write meanwhile
    held.release()
    teach(values)


def test_a_full_disk_is_seen_before_the_rows_are_run(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = recipe_values(tmp_path, model, top_k=64)
    monkeypatch.setattr("qft.files.free_disk_bytes", lambda path: 1000)
    with pytest.raises(SaveError, match="not enough room"):
        teach(values)
    assert not list(tmp_path.rglob("lessons.safetensors"))


def test_a_disk_that_fills_up_meanwhile(
    model: Any, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    plain, left = safetensors.torch.save_file, [2]

    def full(*arguments: Any, **named: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(*arguments, **named)

    values = recipe_values(tmp_path, model, top_k=64)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(SaveError, match="disk is full"):
        teach(values)
    monkeypatch.setattr("safetensors.torch.save_file", plain)
    told = Told()
    teach(values, told)
    assert "2 of" in told.about()


# --- without the teacher


def test_a_whole_cache_does_without_the_teacher(model: Any, tmp_path: Path) -> None:
    values = recipe_values(tmp_path, model, top_k=8)
    whole = qft.train(build_recipe(values))
    moved = tmp_path / "elsewhere"
    shutil.move(str(tmp_path / "teacher-cache"), moved)
    values["strategy"] |= {"teacher": "/nowhere/at/all/llama-teacher", "cache_folder": str(moved)}
    told = Told()
    again = qft.train(build_recipe({**values, "output": str(tmp_path / "again")}), reporter=told)
    assert "the teacher is not there; its cache was made in float32 on cpu" in told.about()
    one, two = (load_file(r.folder / "adapter" / "trained_tensors.safetensors")
                for r in (whole, again))  # fmt: skip
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_cache_spares_fetching_the_teacher(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def fetch(source: str, trust: Any) -> Path:
        fetched.append(source)
        return model("llama-teacher")

    monkeypatch.setattr("qft.models._fetch", fetch)
    values = recipe_values(tmp_path, model, top_k=8, teacher="someone/llama-teacher")
    assert teach(values)["parts_made"] == 1  # there is no cache yet
    assert fetched
    fetched.clear()
    assert teach(values)["parts_made"] == 0
    assert not fetched
    values["strategy"]["top_k"] = 9
    assert teach(values)["parts_made"] == 1
    assert fetched


def no_shard(folder: Path) -> None:
    shutil.rmtree(next(folder.rglob("00001")))


@pytest.mark.parametrize(("change", "damage", "reason"), [
    (strategy(top_k=9), None, "another count"),
    (strategy(temperature=2.0), None, "another temperature"),
    (change_labels, None, "another data"),
    (strategy(teacher="/nowhere/another"), None, "no whole cache of another"),
    (strategy(hidden={}), None, "teacher's config"),
    (strategy(loss="uld"), None, "another tokens"),
    (strategy(), flip, "not whole"), (strategy(), no_shard, "not whole"),
    (strategy(), lost_report, "no whole cache"),
])  # fmt: skip
def test_a_cache_of_anything_else_does_not(
    model: Any, tmp_path: Path, small_shards: None, change: Any, damage: Any, reason: str
) -> None:
    values = recipe_values(tmp_path, model, top_k=64)
    teach(values)
    values["strategy"]["teacher"] = "/nowhere/llama-teacher"
    change(values, tmp_path)
    if damage is not None:
        damage(tmp_path / "teacher-cache")
    with pytest.raises(ModelError, match="neither is a whole cache") as told:
        teach(values)
    assert reason in str(told.value)


def test_ids_beyond_the_vocabulary_are_refused(model: Any, tmp_path: Path) -> None:
    """A cache from elsewhere may say anything."""
    from qft.files import write_manifest

    values = recipe_values(tmp_path, model, top_k=8)
    folder = Path(teach(values)["folder"])
    path = folder / "00000" / "lessons.safetensors"
    tensors = load_file(path)
    tensors["tokens"].fill_(255)  # 511, of 260
    save_file(tensors, path, {"shard": f"{folder.name}/0"})
    write_manifest(path.parent)
    with pytest.raises(QftError, match="tokens that there are not"):
        qft.train(build_recipe(values))


# --- the command


def test_the_command_prints_its_report(model: Any, tmp_path: Path) -> None:
    from qft.cli import app

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_values(tmp_path, model)), encoding="utf-8")
    done = CliRunner().invoke(app, ["teach", str(recipe), "strategy.top_k=8", "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["count"] == "8"
    assert report["parts_made"] == 1
    done = CliRunner().invoke(app, ["teach", str(recipe), "strategy.top_k=8", "--quiet"])
    assert done.stdout.strip() == report["folder"]


@pytest.mark.parametrize(("entry", "says"), [
    ({"name": "lora"}, "nothing to keep"),
    ({"cache": "off"}, "stays in memory"),
])  # fmt: skip
def test_recipes_that_keep_nothing(model: Any, tmp_path: Path, entry: Any, says: str) -> None:
    values = recipe_values(tmp_path, model)
    values["strategy"] = entry if "name" in entry else {**values["strategy"], **entry}
    with pytest.raises(RecipeError, match=says):
        teach(values)
