"""A training from recipe to run folder: schedules, stopping, files, Ctrl-C, and going on."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import qft
from qft import cli
from qft.checkpoints import list_checkpoints
from qft.errors import RecipeError
from qft.micro_batch import MicroBatch
from qft.models import ModelSpec, open_model
from qft.recipe import Train
from qft.schedule import schedule_factor
from qft.trainer import Job, StepTrainer

ROWS = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(10)]


def job(base: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    values: dict[str, Any] = {
        "model": str(base),
        "task": "instruct",
        "data": {"train": str(rows)},
        "strategy": {"name": "lora", "rank": 2},
        "dtype": "float32",
        "device": "cpu",
        "memory": {"checkpointing": "none"},
        "train": {"max_steps": 4, "batch_size": 4, "max_length": 64, "log_every": 1, "warmup": 0},
        "output": str(folder / "run"),
    }
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = values[key] | value if nested else value
    return values


def train(values: dict[str, Any], **options: Any) -> qft.training.RunResult:  # type: ignore[name-defined]
    return qft.train(qft.build_recipe(values), **options)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


# --- schedules


def factors(schedule: str, warmup: float, total: int = 10) -> list[float]:
    settings = Train(schedule=schedule, warmup=warmup)
    return [schedule_factor(step, settings, total) for step in range(total)]


def close(found: Iterable[float], expected: Iterable[float]) -> bool:
    return all(math.isclose(a, b, abs_tol=1e-12) for a, b in zip(found, expected, strict=True))


def test_the_schedules() -> None:
    assert factors("constant", 0) == [1.0] * 10
    assert close(factors("linear", 0), [1 - k / 10 for k in range(10)])
    assert close(factors("cosine", 0), [(1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)])
    assert close(factors("exponential", 0), [0.01 ** (k / 10) for k in range(10)])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "exponential"])
def test_warm_up_rises_to_the_peak_and_never_starts_at_zero(schedule: str) -> None:
    share, steps = factors(schedule, 0.2), factors(schedule, 2)
    assert share == steps
    assert close(share[:3], [1 / 3, 2 / 3, 1.0])
    rest = factors(schedule, 0, total=8)  # after the warm-up the schedule has the rest to itself
    assert close(share[2:], rest)
    assert factors(schedule, 0.01)[:2] == [0.5, 1.0]  # a share is rounded up to whole steps
    assert all(0 < factor <= 1 for factor in factors(schedule, 30))  # longer than the training


def test_the_run_follows_its_schedule(tiny_llama: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 5, "learning_rate": 0.01, "schedule": "linear", "warmup": 2}
    train(job(tiny_llama, tmp_path, train=settings))
    rates = [line["learning_rate"] for line in lines_of(tmp_path / "run") if "loss" in line]
    assert close(rates, [0.01 * factor for factor in (1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)])


def test_weight_decay_spares_biases_and_norms(
    tiny_bert: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    from adapters.head import Head
    from qft.data.tasks import TASKS, Example

    for base, task in ((tiny_bert, "classify"), (tiny_llama, "text")):
        model = open_model(base, ModelSpec(str(base), task=task, dtype=torch.float32, device="cpu"))
        trainer = StepTrainer(
            model,
            Job(Head(), TASKS[task], [Example(0, {})], Train(weight_decay=0.1), MicroBatch(1), 0,
                tmp_path, None, {}),
        )  # fmt: skip
        decay = {
            id(p): group["weight_decay"]
            for group in trainer.create_optimizer().param_groups
            for p in group["params"]
        }
        found = {name: decay[id(p)] for name, p in model.named_parameters()}
        spared = {n for n in found if n.endswith(".bias") or "norm" in n.lower()}
        assert len(spared) > 4
        assert all(value == (0.0 if n in spared else 0.1) for n, value in found.items()), found


# --- how long


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 2), (1, 3), (1.5, 5), (2, 6)])
def test_epochs_may_be_fractions(
    tiny_llama: Path, tmp_path: Path, epochs: float, steps: int
) -> None:
    """Ten rows, four a step: three steps an epoch, the last one of two rows."""
    result = train(job(tiny_llama, tmp_path, train={"max_steps": None, "epochs": epochs}))
    assert result.report["training"]["steps"] == steps
    rows = {1: 10, 2: 20}.get(int(epochs) if epochs == int(epochs) else 0)
    if rows is not None:  # every row once an epoch
        texts = [f"it is {i}" for i in range(10)]
        supervised = sum(len(text) + 1 for text in texts) * rows // 10  # and a terminator each
        assert abs(result.report["training"]["supervised_items"] - supervised) <= rows


def worse_by_training(base: Path, folder: Path) -> dict[str, Any]:
    """Held-out rows that the training rows make less likely, after a while."""
    held_out = folder / "held-out.jsonl"
    rows = [{"prompt": f"say {i}", "completion": f"it is {9 - i}!?"} for i in range(6)]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"max_steps": 60, "learning_rate": 0.03, "eval_every": 2, "early_stopping": 2,
                "schedule": "constant"}  # fmt: skip
    return job(base, folder, data={"eval": str(held_out)}, train=settings)


def test_early_stopping_keeps_the_best(tiny_llama: Path, tmp_path: Path) -> None:
    result = train(worse_by_training(tiny_llama, tmp_path))
    run = result.folder
    losses = {line["step"]: line["eval_loss"] for line in lines_of(run) if "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    last = max(losses)
    assert last == best + 4 < 60, "two evaluations without gain, then the end"
    assert result.report["training"]["steps"] == last
    kept = run / f"checkpoints/checkpoint-{best}"
    assert adapter_bytes(kept) == adapter_bytes(run)
    assert adapter_bytes(run / f"checkpoints/checkpoint-{last}") != adapter_bytes(run)
    assert math.isclose(result.metrics["loss"], losses[best], rel_tol=1e-6)


def test_old_checkpoints_go_but_the_newest_two_stay(tiny_llama: Path, tmp_path: Path) -> None:
    run = train(job(tiny_llama, tmp_path, train={"max_steps": 7, "save_every": 2})).folder
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == [
        "checkpoint-6", "checkpoint-7",
    ]  # fmt: skip


# --- what it leaves


def test_the_run_folder(tiny_llama: Path, tmp_path: Path) -> None:
    values = job(tiny_llama, tmp_path, data={"eval_share": 0.3})
    result = train(values)
    assert {p.name for p in result.folder.iterdir()} == {
        "recipe.yaml", "start.json", "samples.json", "run.json", "metrics.jsonl", "report.html",
        "adapter", "checkpoints",
    }  # fmt: skip
    resolved = yaml.safe_load((result.folder / "recipe.yaml").read_text(encoding="utf-8"))
    assert resolved == qft.build_recipe(values).to_dict()
    assert resolved["train"]["weight_decay"] == 0.0, "defaults are written out"

    text = (result.folder / "run.json").read_text(encoding="utf-8")
    report = json.loads(text)
    assert report == json.loads(json.dumps(result.report))
    for path in (tmp_path, tiny_llama, Path.home()):
        assert str(path) + os.sep not in text, "a report is shown to others"
    assert {"torch", "transformers", "peft"} <= set(report["versions"])
    assert report["device"] == "cpu"
    assert report["dtype"] == "float32"
    assert report["strategy"]["rank"] == 2
    training = report["training"]
    assert training["steps"] == 4
    assert training["tokens"] > training["supervised_items"] > 0
    assert training["tokens_per_second"] > 0
    assert training["measured_peak_bytes"] >= training["bytes_before_training"] > 0
    assert "predicted_peak_bytes" not in text, "there is no planner yet"
    assert {"loss", "perplexity", "bits_per_byte"} <= set(report["metrics"])
    steps = [line["step"] for line in lines_of(result.folder) if "loss" in line]
    assert steps == [1, 2, 3, 4]
    assert not list(result.folder.rglob("*.bin")) + list(result.folder.rglob("*.p[tk]*"))


def test_a_share_of_the_rows_is_held_out(tiny_llama: Path, tmp_path: Path) -> None:
    values = job(tiny_llama, tmp_path, data={"eval_share": 0.3}, train={"batch_size": 1})
    values["train"] |= {"max_steps": None, "epochs": 1}
    result = train(values)
    assert result.report["training"]["steps"] == 7
    assert [line for line in lines_of(result.folder) if "eval_loss" in line]
    other = train(values | {"output": str(tmp_path / "other")})
    assert other.report["data_fingerprint"] == result.report["data_fingerprint"]


def test_dry_run_only_shows_the_recipe(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(job(tiny_llama, tmp_path)), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["qft", "train", str(path), "train.epochs=7", "--dry-run"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["train"]["epochs"] == 7
    assert shown["train"]["schedule"] == "cosine"
    assert not (tmp_path / "run").exists()


# --- the same again


def test_twice_in_one_process(tiny_llama: Path, tmp_path: Path) -> None:
    """Nothing of one run reaches the next, also where the second draws other numbers first."""
    values = job(tiny_llama, tmp_path, strategy={"dropout": 0.2}, data={"eval_share": 0.2})
    first = train(values)
    train(job(tiny_llama, tmp_path, train={"seed": 5}, output=str(tmp_path / "between")))
    torch.rand(17)
    second = train(values | {"output": str(tmp_path / "second")})
    assert adapter_bytes(first.folder) == adapter_bytes(second.folder)
    assert first.metrics == second.metrics
    assert adapter_bytes(tmp_path / "between") != adapter_bytes(first.folder)


def test_the_micro_batch_does_not_change_the_result(tiny_llama: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 3, 4):
        values = job(
            tiny_llama, tmp_path, memory={"micro_batch": size}, strategy={"dropout": 0.1},
            output=str(tmp_path / f"by-{size}"),
        )  # fmt: skip
        folder = train(values).folder
        found.append(load_file(folder / "adapter/adapter_model.safetensors"))
    assert any(t.abs().max() > 1e-4 for n, t in found[0].items() if "lora_B" in n), "it trained"
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert (other[name] - tensor).abs().max() < 1e-5, name


def test_checkpointing_does_not_change_the_result(tiny_llama: Path, tmp_path: Path) -> None:
    found = []
    for kind in ("none", "full"):
        values = job(
            tiny_llama, tmp_path, memory={"checkpointing": kind}, strategy={"dropout": 0.1},
            output=str(tmp_path / kind),
        )  # fmt: skip
        folder = train(values).folder
        found.append(load_file(folder / "adapter/adapter_model.safetensors"))
    for name, tensor in found[0].items():
        assert (found[1][name] - tensor).abs().max() < 1e-6, name


def test_resumed_from_a_named_checkpoint_the_log_has_each_step_once(
    tiny_llama: Path, tmp_path: Path
) -> None:
    values = job(tiny_llama, tmp_path, train={"max_steps": 6, "save_every": 2})
    values["train"]["keep_checkpoints"] = 9
    run = train(values).folder
    before, adapter = lines_of(run), adapter_bytes(run)
    log = run / "metrics.jsonl"
    log.write_text(log.read_text(encoding="utf-8") + '{"step": 6, "lo', encoding="utf-8")
    train(values, resume=str(run / "checkpoints/checkpoint-2"))
    after = lines_of(run)
    assert adapter_bytes(run) == adapter
    timeless = [
        [{k: v for k, v in line.items()
          if not any(word in k for word in ("second", "runtime", "time", "memory"))}
         for line in lines if "loss" in line]
        for lines in (before, after)
    ]  # fmt: skip
    assert timeless[0] == timeless[1]
    assert [line["step"] for line in timeless[1]] == [1, 2, 3, 4, 5, 6]


# --- in processes of their own


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "qft.cli", *map(str, arguments)]


def test_a_fresh_process_finds_the_same_metrics(tiny_bert: Path, tmp_path: Path) -> None:
    """In the run's own dtype and quantization, whatever this machine would choose."""
    rows = [{"text": f"{w} {i}", "label": w} for i in range(8) for w in ("yes", "no")]
    values = job(
        tiny_bert, tmp_path, task="classify", quantize="nf4", pooling="mean",
        data={"eval_share": 0.5}, train={"learning_rate": 0.01},
    )  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    result = train(values)
    assert set(result.metrics) >= {"loss", "accuracy", "macro_f1"}
    done = subprocess.run(
        command("eval", result.folder, "--json"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((result.folder / "run.json").read_text(encoding="utf-8"))
    assert json.loads(done.stdout) == report["metrics"] == result.metrics


def test_ctrl_c_says_how_to_go_on_and_going_on_finishes(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 150, "save_every": 1000, "learning_rate": 1e-3}
    values = job(tiny_llama, tmp_path, train=settings, output=str(tmp_path / "a run"))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    process = subprocess.Popen(
        command("train", path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "a run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.is_file() and log.read_text(encoding="utf-8").count("\n") >= 3:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not (tmp_path / "a run/adapter").exists()
    stopped = len([line for line in lines_of(tmp_path / "a run") if "loss" in line])
    assert 3 <= stopped < 150
    assert [p.name for p in list_checkpoints(tmp_path / "a run/checkpoints")] == [
        f"checkpoint-{stopped}"
    ]

    advice = next(line for line in err.splitlines() if "--resume" in line)
    words = shlex.split(advice[advice.index("qft train") :])
    monkeypatch.setattr("sys.argv", [*words, "--quiet"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    steps = [line["step"] for line in lines_of(tmp_path / "a run") if "loss" in line]
    assert steps == list(range(1, 151))
    whole = train(values | {"output": str(tmp_path / "whole")})
    assert adapter_bytes(whole.folder) == adapter_bytes(tmp_path / "a run")


# --- what the user allowed


def test_a_pickled_base_trains_where_that_is_allowed(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    base = Path(shutil.copytree(tiny_llama, tmp_path / "pickled"))
    tensors = load_file(base / "model.safetensors")
    torch.save(tensors, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    pickled = train(job(base, tmp_path, allow_pickle=True))
    plain = train(job(tiny_llama, tmp_path, output=str(tmp_path / "plain")))
    assert adapter_bytes(pickled.folder) == adapter_bytes(plain.folder)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They would all write one run folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = qft.build_recipe({
        "model": str(tmp_path), "task": "text", "strategy": "lora",
        "data": {"train": "rows.jsonl"}, "output": str(tmp_path / "run"),
    })  # fmt: skip
    with pytest.raises(RecipeError, match="one process"):
        qft.train(recipe)
