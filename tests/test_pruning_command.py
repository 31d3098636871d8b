"""`qft prune` from end to end: the report, the dry run, kills, and what it refuses."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import make_model, texts
from torch.nn import functional
from typer.testing import CliRunner

import qft
from qft.errors import Interrupted, QftError, SaveError
from qft.progress import Reporter


class Told(Reporter):
    """Remembers what was said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in texts(30)), encoding="utf-8")
    return str(path)


def run(source: Path, out: Path, rows: str, **how: Any) -> dict[str, Any]:
    how = {"ratio": 0.2, "data": rows, "max_length": 32, "dtype": "float32", **how}
    return qft.prune(str(source), out, **how)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")
            if p.is_file()}  # fmt: skip


# --- the report


def test_the_report_is_what_both_models_say(
    llama: Path, rows: str, tmp_path: Path, write_rows: Any
) -> None:
    held = write_rows(texts(9, seed=7), "held.jsonl")
    result = run(llama, tmp_path / "out", rows, eval=str(held))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain, pruned = (AutoModelForCausalLM.from_pretrained(f).eval() for f in
                     (llama, tmp_path / "out"))  # fmt: skip
    from qft.pruning.calibration import open_rows

    tokenizer = AutoTokenizer.from_pretrained(llama)
    assert tokenizer is not None
    opened = open_rows(llama, "text", rows, held_out=str(held), max_length=32)
    kls, nats = [], []
    for example in opened.held_out:
        ids = torch.tensor([example.inputs["input_ids"]])
        wanted = torch.tensor(example.inputs["labels"][1:]) != -100
        with torch.no_grad():
            first, second = (m(input_ids=ids).logits[0, :-1][wanted].log_softmax(-1)
                             for m in (plain, pruned))  # fmt: skip
        kls.append((first.exp() * (first - second)).sum(-1))
        nats.append(functional.nll_loss(second, ids[0, 1:][wanted], reduction="none"))
    quality = result["quality"]
    assert quality["positions"] == len(torch.cat(kls))
    assert quality["mean_kl"] == pytest.approx(torch.cat(kls).mean().item(), rel=1e-4)
    assert quality["mean_kl"] > 1e-3
    perplexity = math.exp(torch.cat(nats).mean().item())
    assert quality["after"]["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    scored = qft.evaluate(str(llama), data=str(held), task="text", max_length=32, dtype="float32")
    assert quality["before"]["loss"] == pytest.approx(scored["loss"], rel=1e-5)
    assert result["speed"]["before"] > 0 < result["speed"]["after"]


def test_pruning_json_tells_all_that_was_done(llama: Path, rows: str, tmp_path: Path) -> None:
    from qft.models import fingerprint

    result = run(llama, tmp_path / "out", rows)
    told = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert told == json.loads(json.dumps({k: v for k, v in result.items() if k != "speed"}))
    assert told["source"] == {"name": llama.name, "fingerprint": fingerprint(llama)}
    assert told["settings"]["ratio"] == 0.2
    assert len(told["scores"]["influence"]) == 4
    assert set(told["rows"]) == {"scored", "held_out"}
    assert str(llama.parent) not in (tmp_path / "out" / "pruning.json").read_text()
    size = sum(tensor.numel() * 4 for tensor in weights(tmp_path / "out").values())
    assert told["after"]["bytes"] == size <= 0.8 * told["before"]["bytes"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_held_out_rows_are_never_scored(llama: Path, write_rows: Any, rows: str) -> None:
    from qft.pruning.calibration import open_rows

    split = open_rows(llama, "text", rows, rows=10, max_length=32)
    inputs = [{tuple(e.inputs["input_ids"]) for e in part} for part in
              (split.scored, split.held_out)]  # fmt: skip
    assert len(inputs[0]) == 10
    assert inputs[1]
    assert not inputs[0] & inputs[1]
    same = open_rows(llama, "text", rows, held_out=rows, max_length=32)
    assert not same.held_out
    assert "calibration rows too" in " ".join(same.notes)
    again = open_rows(llama, "text", rows, rows=10, max_length=32)
    assert again.fingerprints() == split.fingerprints()
    other = open_rows(llama, "text", rows, rows=10, max_length=32, seed=5)
    assert other.fingerprints() != split.fingerprints()


def test_without_data_named_layers_go_and_a_file_can_judge(
    llama: Path, rows: str, tmp_path: Path
) -> None:
    told = Told()
    bare = qft.prune(str(llama), tmp_path / "a", layers="1", reporter=told)
    assert "quality" not in bare
    assert "no held-out rows" in " ".join(told.lines)
    judged = qft.prune(str(llama), tmp_path / "b", layers="1", eval=rows, max_length=32)
    assert judged["quality"]["mean_kl"] > 0
    silent = qft.prune(str(llama), tmp_path / "c", layers="1", eval=rows, report=False)
    assert "quality" not in silent


def test_an_encoder_without_a_trained_head_is_not_judged(tmp_path: Path, write_rows: Any) -> None:
    labelled = [{**row, "label": str(n % 2)} for n, row in enumerate(texts(24))]
    bert = make_model("bert", tmp_path / "bert")
    (bert / "1_Pooling").mkdir()
    for name in ("modules.json", "1_Pooling/config.json"):
        (bert / name).write_text('{"pooling_mode_mean_tokens": true}')
    told = Told()
    data = str(write_rows(labelled))
    result = qft.prune(str(bert), tmp_path / "out", ratio=0.2, data=data,
                       max_length=32, reporter=told)  # fmt: skip
    assert "no weights of its classifier" in " ".join(told.lines)
    assert "quality" not in result
    assert len(result["kept_layers"]) < 4
    for name in ("modules.json", "1_Pooling/config.json"):  # still a sentence encoder
        assert (tmp_path / "out" / name).read_bytes() == (bert / name).read_bytes()
    with pytest.raises(QftError, match="head that was never trained"):
        qft.prune(str(bert), tmp_path / "b", method="width", ratio=0.2, data=data,
                  importance="taylor", max_length=32)  # fmt: skip


# --- the command line


def test_the_command_prints_a_table_and_json(llama: Path, rows: str, tmp_path: Path) -> None:
    from qft.cli import app

    words = ["prune", str(llama), "--data", rows, "--max-length", "32", "--ratio", "0.2"]
    shown = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "a")])
    assert shown.exit_code == 0, shown.output
    for part in ("parameters", "bytes", "tokens/s", "perplexity", "mean KL", "share"):
        assert part in shown.output
    quiet = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "b"), "--quiet"])
    assert quiet.stdout.strip() == str(tmp_path / "b")
    plain = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "c"), "--json"])
    assert json.loads(plain.stdout)["method"] == "depth"
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")


@pytest.mark.parametrize("method", ["depth", "width"])
def test_a_dry_run_says_what_each_choice_costs_and_writes_nothing(
    llama: Path, rows: str, tmp_path: Path, method: str
) -> None:
    from qft.cli import app

    words = ["prune", str(llama), "--method", method, "--dry-run", "--max-length", "32"]
    for extra in ([], ["--data", rows], ["--data", rows, "--ratio", "0.2"]):
        shown = CliRunner().invoke(app, [*words, *extra])
        assert shown.exit_code == 0, shown.output
        assert "parameters" in shown.output
        found = CliRunner().invoke(app, [*words, *extra, "--json"])
        choices = json.loads(found.stdout)["choices"]
        assert all(row["bytes"] == 4 * row["parameters"] for row in choices)
        shares = [row["share"] for row in choices[: 3 if method == "depth" else 2]]
        assert shares == sorted(shares, reverse=True)
    assert not list(tmp_path.iterdir())
    assert "layers that go" in shown.output or method == "width"


def test_a_dry_runs_scores_are_used_by_the_real_one(llama: Path, rows: str, tmp_path: Path) -> None:
    told = Told()
    run(llama, tmp_path / "out", rows, dry_run=True)
    assert [p.name for p in tmp_path.iterdir()] == [".pruning-out"]
    run(llama, tmp_path / "out", rows, reporter=told)
    assert any("earlier try" in line for line in told.lines)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# --- kills and other interruptions


@pytest.mark.parametrize("count", [1, 2, 4, 7, 11, 16, 22, 29])
def test_killed_and_run_again_it_ends_byte_equal(
    llama: Path, rows: str, tmp_path: Path, count: int
) -> None:
    """In a process of its own, which ends at the k-th file operation beside the output."""
    how: dict[str, Any] = {"method": "width", "importance": "activation"}
    folder = tmp_path / "killed"
    folder.mkdir()
    child = os.fork()
    if child == 0:
        left = [count]

        def on_file(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("open", "os.rename", "os.mkdir") and str(folder) in str(arguments[0]):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)

        try:
            torch.set_num_threads(1)
            sys.addaudithook(on_file)
            run(llama, folder / "out", rows, **how)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, "it was to be killed"
    assert not (folder / "out").exists()
    run(llama, folder / "out", rows, **how)
    run(llama, tmp_path / "apart", rows, **how)
    assert files(folder / "out") == files(tmp_path / "apart")
    assert [p.name for p in folder.iterdir()] == ["out"]


def interrupted(monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException) -> None:
    def stop(*arguments: Any, **named: Any) -> Any:
        raise error

    monkeypatch.setattr(place, stop)


def test_ctrl_c_keeps_the_scores_and_says_how_to_go_on(
    llama: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(monkeypatch, "qft.pruning.prune.fill_folder", KeyboardInterrupt())
    with pytest.raises(Interrupted, match=r"(?s)scores.*kept.*the same command") as caught:
        run(llama, tmp_path / "out", rows)
    assert caught.value.exit_code == 130
    assert [p.name for p in tmp_path.iterdir()] == [".pruning-out"]
    monkeypatch.undo()
    interrupted(monkeypatch, "qft.pruning.depth.score_layers", AssertionError("scored again"))
    run(llama, tmp_path / "out", rows)


@pytest.mark.parametrize("what", ["model", "rows", "damage"])
def test_scores_of_something_else_are_not_used(
    llama: Path, rows: str, tmp_path: Path, what: str, write_rows: Any
) -> None:
    source = tmp_path / "in" / "source"
    shutil.copytree(llama, source)
    run(source, tmp_path / "out", rows, dry_run=True)
    kept = tmp_path / ".pruning-out" / "depth.json"
    before = kept.read_bytes()
    if what == "model":
        shutil.rmtree(source)
        make_model("llama", source, num_hidden_layers=5)
    if what == "rows":
        rows = str(write_rows(texts(20, seed=3), "others.jsonl"))
    if what == "damage":
        kept.write_bytes(before.replace(b"0.", b"1.", 1))
    told = Told()
    run(source, tmp_path / "out", rows, dry_run=True, reporter=told)
    assert not any("earlier try" in line for line in told.lines)
    assert (kept.read_bytes() == before) == (what == "damage")


def test_a_full_disk_is_one_clear_error(
    llama: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    interrupted(monkeypatch, "qft.merging.merge.write_shards", full)
    with pytest.raises(SaveError, match="disk is full"):
        run(llama, tmp_path / "out", rows)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".unfinished*"))
    monkeypatch.undo()
    monkeypatch.setattr("qft.files.free_disk_bytes", lambda path: 1000)
    with pytest.raises(SaveError, match="not enough room"):
        run(llama, tmp_path / "out", rows)


def test_what_is_there_is_replaced_only_when_asked(llama: Path, rows: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(QftError, match="exists already"):
        run(llama, tmp_path / "out", rows)
    with pytest.raises(QftError, match="must be apart"):
        run(llama, llama, rows, overwrite=True)
    run(llama, tmp_path / "out", rows, overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists()


# --- what is refused


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"ratio": 1.5}, "share of all parameters"),
        ({"ratio": 0.99}, r"cannot be reached|So many layers"),
        ({"ratio": 0.4, "keep_first": 3}, r"(?s)So many layers cannot go.*--keep-first"),
        ({"ratio": None, "params": "1B"}, "that small already"),
        ({"ratio": None}, "How much is to go"),
        ({"data": None}, r"(?s)scores the model on rows of yours.*--data"),
        ({"ratio": None, "layers": "3-9"}, "no such layers"),
        ({"layers": "1"}, "leave no choice for a target"),
        ({"method": "width", "layers": "1"}, "leaves every layer"),
        ({"method": "magic"}, r"(?s)No such method.*depth, width"),
        ({"importance": "taylor"}, r"(?s)no such importance.*influence, angular"),
        ({"task": "seq2seq"}, r"cannot do the task|cannot calibrate"),
        ({"task": "poetry"}, "No such task"),
        ({"data": "nowhere.jsonl"}, "nowhere"),
        ({"columns": {"text": "story"}}, "story"),
        ({"calibration_rows": 0}, "below what makes sense"),
        ({"keep_first": -1}, "below what makes sense"),
    ],
)  # fmt: skip
def test_wishes_that_cannot_be_served(
    llama: Path, rows: str, tmp_path: Path, how: dict[str, Any], says: str
) -> None:
    with pytest.raises(QftError, match=says):
        run(llama, tmp_path / "out", rows, **how)
    assert not (tmp_path / "out").exists()


def test_no_place_to_write_to_is_refused(llama: Path) -> None:
    with pytest.raises(QftError, match="Where is the pruned model to go"):
        qft.prune(str(llama), layers="1")


def changed(llama: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(llama, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def test_models_that_cannot_be_pruned(
    llama: Path, tiny_t5: Path, rows: str, tmp_path: Path
) -> None:
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    quantized = changed(llama, tmp_path / "q", quantization_config=nf4)
    with pytest.raises(QftError, match=r"(?s)stored quantized.*nf4.*unquantized"):
        run(quantized, tmp_path / "out", rows)
    with pytest.raises(QftError, match="Encoder-decoder"):
        qft.prune(str(tiny_t5), tmp_path / "out", layers="1")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(QftError, match=r"(?s)no weights of its own.*qft merge"):
        qft.prune(str(adapter), tmp_path / "out", layers="1")
    with pytest.raises(QftError, match="does not exist"):
        qft.prune(str(tmp_path / "nothing"), tmp_path / "out", layers="1")
    broken = changed(llama, tmp_path / "broken")
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(QftError, match="cut short"):
        qft.prune(str(broken), tmp_path / "out", layers="1")


# --- real models


def stories(assets: Path, write_rows: Callable[..., Path], count: int) -> str:
    folder = assets / "data" / "text" / "tinystories_1000"
    rows = json.loads((folder / "tinystories_1000.json").read_text())
    text = [row if isinstance(row, str) else next(iter(row.values())) for row in rows[:count]]
    return str(write_rows([{"text": one} for one in text]))


@pytest.mark.parametrize(
    ("how", "worst"),
    [({}, 0.7), ({"method": "width", "multiple_of": 32}, 0.15)],
)
def test_a_trained_model_keeps_most_of_what_it_knows(
    assets: Path, tmp_path: Path, write_rows: Any, how: dict[str, Any], worst: float
) -> None:
    result = qft.prune(str(assets / "models" / "mini-6m"), tmp_path / "out", ratio=0.25,
                       data=stories(assets, write_rows, 40), task="text", calibration_rows=16,
                       max_length=128, **how)  # fmt: skip
    assert result["after"]["parameters"] <= 0.75 * result["before"]["parameters"]
    assert 0.01 < result["quality"]["mean_kl"] < worst
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights(tmp_path / "out").values())
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert sum(p.numel() for p in model.parameters()) == result["after"]["parameters"]


def test_stories_lose_a_layer(assets: Path, tmp_path: Path, write_rows: Any) -> None:
    source = str(assets / "models" / "stories260K")
    result = qft.prune(source, tmp_path / "out", layers="2", max_length=128,
                       eval=stories(assets, write_rows, 20))  # fmt: skip
    assert result["quality"]["before"]["perplexity"] < 6
    assert 6 < result["quality"]["after"]["perplexity"] < 60
