"""Every kind of bad input: one clear error, the right exit code, no traceback, nothing lost."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qft import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def qft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["qft", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def job(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(6)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return {
        "model": str(tiny_llama),
        "task": "instruct",
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "strategy": {"name": "lora", "rank": 2},
        "device": "cpu",
        "dtype": "float32",
        "train": {"max_steps": 2, "batch_size": 2, "max_length": 128},
        "output": str(tmp_path / "run"),
    }


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_recipe(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def assert_error(result: tuple[int, str, str], code: int, *words: str) -> None:
    found, _, err = result
    assert "Traceback" not in err
    assert err.count("error:") == 1, err
    assert found == code, err
    for word in words:
        assert word in err, err


def test_a_good_job_runs(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    code, out, err = qft("train", write_recipe(tmp_path, job), "--quiet")
    assert code == 0, err
    assert out.strip() == job["output"]
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def test_unknown_key(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    job["train"]["epoch"] = 2
    assert_error(qft("train", write_recipe(tmp_path, job)), 2, "train.epoch", "'epochs'", "line ")
    assert not (tmp_path / "run").exists()


def test_wrong_types_all_at_once(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    job["train"]["batch_size"] = "many"
    job["strategy"] = {"name": "lora", "rank": 0}
    job["quantize"] = "nf5"
    result = qft("train", write_recipe(tmp_path, job))
    assert_error(result, 2, "train.batch_size", "rank", "quantize", "3 problems")


def test_missing_recipe(qft: Run, tmp_path: Path) -> None:
    assert_error(qft("train", tmp_path / "none.yaml"), 2, "none.yaml")


def test_missing_data_file(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    job["data"]["train"] = str(tmp_path / "row.jsonl")
    assert_error(qft("train", write_recipe(tmp_path, job)), 4, "row.jsonl", "rows.jsonl")
    assert not (tmp_path / "run").exists()


def test_empty_data(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("", encoding="utf-8")
    assert_error(qft("train", write_recipe(tmp_path, job)), 4, "rows.jsonl")


def test_columns_that_are_not_there(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"foo": "a", "bar": "b"}])
    result = qft("train", write_recipe(tmp_path, job))
    assert_error(result, 4, "foo", "bar", "data.columns.prompt")


def test_label_outside_the_classes(
    qft: Run, job: dict[str, Any], tiny_bert: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "x", "label": label} for label in "aabc"])
    job |= {"model": str(tiny_bert), "task": "classify", "strategy": {"name": "head"}}
    job["data"]["labels"] = ["a", "b"]
    assert_error(qft("train", write_recipe(tmp_path, job)), 4, "'c'", "row 4")


def test_text_longer_than_asked(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    job["train"]["max_length"] = 30
    assert_error(qft("train", write_recipe(tmp_path, job)), 4, "longer than 30", "too_long=drop")


def test_length_beyond_the_model(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    job["train"]["max_length"] = 1000
    assert_error(qft("train", write_recipe(tmp_path, job)), 2, "1000", "256")


def test_strategy_that_cannot_do_the_task(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    job["strategy"] = {"name": "head"}
    assert_error(qft("train", write_recipe(tmp_path, job)), 2, "classify")


def test_targets_that_match_nothing(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    job["strategy"]["targets"] = ["no_such_layer"]
    assert_error(qft("train", write_recipe(tmp_path, job)), 2, "all-linear")


def test_truncated_shard(qft: Run, job: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    job["model"] = str(model)
    assert_error(qft("train", write_recipe(tmp_path, job)), 2, "model.safetensors")


def test_pickle(qft: Run, job: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    job["model"] = str(model)
    assert_error(qft("train", write_recipe(tmp_path, job)), 2, "pickle", "allow_pickle")


def test_output_that_exists(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/precious.txt").write_text("mine", encoding="utf-8")
    assert_error(qft("train", write_recipe(tmp_path, job)), 2, "--overwrite")
    assert (tmp_path / "run/precious.txt").read_text(encoding="utf-8") == "mine"


def test_bad_data_does_not_cost_a_former_run(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    assert qft("train", write_recipe(tmp_path, job), "-q")[0] == 0
    before = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    (tmp_path / "rows.jsonl").write_text("{broken", encoding="utf-8")
    result = qft("train", write_recipe(tmp_path, job), "--overwrite", "-q")
    assert_error(result, 4, "rows.jsonl", "1")
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == before


def test_adapter_for_another_base(
    qft: Run, job: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    assert qft("train", write_recipe(tmp_path, job), "-q")[0] == 0
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.hidden_size = 32
    config.head_dim = 8
    LlamaForCausalLM(config).save_pretrained(other)
    for verb in (("merge", "--out", tmp_path / "merged"), ("generate", "-p", "x")):
        result = qft(verb[0], tmp_path / "run", "--base", other, *verb[1:])
        assert_error(result, 2, "another base")
    (tmp_path / "run/adapter/qft.json").unlink()  # as a folder of PEFT's: the shapes tell
    result = qft("merge", tmp_path / "run", "--base", other, "--out", tmp_path / "merged")
    assert_error(result, 2, "another base")
    assert not (tmp_path / "merged").exists()


def test_no_adapter_yet(qft: Run, tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    result = qft("merge", tmp_path / "run", "--out", tmp_path / "merged")
    assert_error(result, 2, "no adapter", "--resume")


def test_merge_into_a_folder_that_exists(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    assert qft("train", write_recipe(tmp_path, job), "-q")[0] == 0
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/precious.txt").write_text("mine", encoding="utf-8")
    result = qft("merge", tmp_path / "run", "--out", tmp_path / "merged")
    assert_error(result, 2, "--overwrite")
    assert [p.name for p in (tmp_path / "merged").iterdir()] == ["precious.txt"]


def test_full_disk_while_saving(
    qft: Run, job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint is whole, the second meets a full disk; the first must survive."""
    from qft import checkpoints

    job["train"] |= {"max_steps": 4, "save_every": 2}
    plain = checkpoints.write_manifest
    calls = []

    def write_manifest(folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(folder)

    monkeypatch.setattr(checkpoints, "write_manifest", write_manifest)
    assert_error(qft("train", write_recipe(tmp_path, job), "-q"), 1, "disk is full")
    names = [p.name for p in (tmp_path / "run/checkpoints").iterdir()]
    assert names == ["checkpoint-2"]
    monkeypatch.setattr(checkpoints, "write_manifest", plain)
    code, _, err = qft("train", write_recipe(tmp_path, job), "--resume", "-q")
    assert code == 0, err


def test_resume_with_another_recipe(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    assert qft("train", write_recipe(tmp_path, job), "-q")[0] == 0
    job["train"]["learning_rate"] = 0.5
    result = qft("train", write_recipe(tmp_path, job), "--resume")
    assert_error(result, 2, "not the one this run began with", "train")


def test_resume_skips_a_broken_checkpoint_and_names_it(
    qft: Run, job: dict[str, Any], tmp_path: Path
) -> None:
    job["train"] |= {"max_steps": 4, "save_every": 2}
    assert qft("train", write_recipe(tmp_path, job), "-q")[0] == 0
    (tmp_path / "run/checkpoints/checkpoint-4/optimizer.safetensors").write_bytes(b"half")
    (tmp_path / "run/checkpoints/.unfinished-checkpoint-9").mkdir()
    code, out, err = qft("train", write_recipe(tmp_path, job), "--resume")
    assert code == 0, err
    assert "skipped checkpoint-4: optimizer.safetensors has 4 bytes" in out
    assert ".unfinished-checkpoint-9" in out
    assert "resuming from checkpoint-2" in out


def test_unknown_format_and_verb(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    assert qft("train", write_recipe(tmp_path, job), "-q")[0] == 0
    result = qft("export", tmp_path / "run", "--out", tmp_path / "x", "-f", "gguf:q9")
    assert_error(result, 2, "gguf:q8_0")
    assert qft("no-such-verb")[0] == 2


def test_nothing_to_verify_on(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    assert qft("train", write_recipe(tmp_path, job), "-q")[0] == 0
    result = qft("export", tmp_path / "run", "--out", tmp_path / "x", "-f", "gguf:f16")
    assert_error(result, 2, "--data FILE", "--no-verify")
    assert not (tmp_path / "x").exists()


def test_verification_failure_exits_5(
    qft: Run, job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapters.low_rank_merge import LowRankMerge

    job["data"] |= {"eval": job["data"]["train"], "max_duplicate_share": 1}
    assert qft("train", write_recipe(tmp_path, job), "-q")[0] == 0
    plain = LowRankMerge.edit

    def edit(self: LowRankMerge, name: str, rows: Any, start: int = 0) -> Any:
        return -rows if name == "model.norm.weight" else plain(self, name, rows, start)

    monkeypatch.setattr(LowRankMerge, "edit", edit)
    result = qft("merge", tmp_path / "run", "--out", tmp_path / "merged", "--verify", "-q")
    assert_error(result, 5, "mean KL")
    monkeypatch.setattr(LowRankMerge, "edit", plain)
    code, _, err = qft("merge", tmp_path / "run", "--out", tmp_path / "good", "--verify", "-q")
    assert code == 0, err
    good = (tmp_path / "good/model.safetensors").read_bytes()
    monkeypatch.setattr(LowRankMerge, "edit", edit)
    arguments = ("--out", tmp_path / "good", "--verify", "--overwrite", "-q")
    assert_error(qft("merge", tmp_path / "run", *arguments), 5, "mean KL")
    assert (tmp_path / "good/model.safetensors").read_bytes() == good
    monkeypatch.setattr(LowRankMerge, "edit", plain)
    assert qft("merge", tmp_path / "run", *arguments)[0] == 0
    assert not (tmp_path / "good.unproven").exists()


def test_an_output_never_replaces_what_it_is_made_from(
    qft: Run, job: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    assert qft("train", write_recipe(tmp_path, job), "-q")[0] == 0
    before = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    for out in (tmp_path / "run", tmp_path / "run/adapter/x", tiny_llama, tmp_path):
        result = qft("merge", tmp_path / "run", "--out", out, "--overwrite")
        assert_error(result, 2, "apart")
    job["output"] = str(tmp_path)
    result = qft("train", write_recipe(tmp_path, job), "--overwrite")
    assert_error(result, 2, "apart")
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == before


def test_the_demo_replaces_only_a_demo(qft: Run, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("mine", encoding="utf-8")
    assert_error(qft("demo", "--out", tmp_path), 2, "no former demo")
    assert (tmp_path / "train.jsonl").read_text(encoding="utf-8") == "mine"


def test_resume_on_other_data(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    job["train"] |= {"max_steps": 4, "save_every": 2}
    assert qft("train", write_recipe(tmp_path, job), "-q")[0] == 0
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "other", "completion": "rows"}] * 6)
    assert_error(qft("train", write_recipe(tmp_path, job), "--resume"), 2, "another data")


def test_early_stopping_without_held_out_rows(
    qft: Run, job: dict[str, Any], tmp_path: Path
) -> None:
    job["train"]["early_stopping"] = 1
    assert_error(qft("train", write_recipe(tmp_path, job)), 2, "data.eval")


def test_a_loss_that_is_no_number(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    job["train"] |= {"learning_rate": 1e30, "max_steps": 9, "warmup": 0, "max_grad_norm": 0}
    assert_error(qft("train", write_recipe(tmp_path, job), "-q"), 1, "finite", "learning_rate")


def test_a_merged_model_knows_its_task(qft: Run, job: dict[str, Any], tmp_path: Path) -> None:
    assert qft("train", write_recipe(tmp_path, job), "-q")[0] == 0
    assert qft("merge", tmp_path / "run", "--out", tmp_path / "merged", "-q")[0] == 0
    arguments = ("-p", "say 3", "--max-new-tokens", "4")
    run = qft("generate", tmp_path / "run", *arguments)
    assert run[:2] == qft("generate", tmp_path / "merged", *arguments)[:2]
    code, out, err = qft("eval", tmp_path / "merged", "--data", job["data"]["train"], "--json")
    assert code == 0, err
    assert json.loads(out)["loss"] > 0


@pytest.mark.parametrize("key", ["transformers_weights", "adapter", "both"])
def test_weights_that_transformers_would_find_elsewhere(
    qft: Run, job: dict[str, Any], tiny_llama: Path, tmp_path: Path, key: str
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    if key == "adapter":
        (model / "adapter_config.json").write_text("{}", encoding="utf-8")
    elif key == "both":
        (model / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    else:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        (model / "config.json").write_text(json.dumps({**config, key: "x.safetensors"}))
    job["model"] = str(model)
    assert_error(
        qft("train", write_recipe(tmp_path, job)), 2, "weights" if key != "adapter" else "adapter"
    )
