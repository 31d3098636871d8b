"""`qft bench compare`, `gate`, `table`, `plot` and `train`: what the ledger's records say."""

from __future__ import annotations

import json
import math
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qft.bench import ledger, ledger_file, repeat, table
from qft.bench.compare import compare, warnings
from qft.bench.figures import figures_of, less_is_better, medians
from qft.bench.gate import bounds_of, gate
from qft.bench.sides import Shelf, Side
from qft.cli import app
from qft.errors import RecipeError, VerificationError

MIB = 2**20


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "book.jsonl"
    monkeypatch.setenv(ledger.VARIABLE, str(path))
    return path


def qft(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def run(**changes: Any) -> dict[str, Any]:
    """A training's record."""
    return {
        "verb": "train", "exit_status": 0, "device": "cpu", "device_name": "Some CPU",
        "model": "bot", "strategy": {"name": "lora", "rank": 16}, "quantize": "none",
        "recipe_hash": "aa", "data_fingerprint": "d", "versions": {"torch": "2.13"},
        "time": "2026-01-01T10:00:00+00:00", "peak_bytes": 1000 * MIB, "tokens_per_second": 200.0,
        "tokens_per_cpu_second": 100.0, "train_seconds": 50.0, "file_bytes": 4 * MIB,
        "trained_parameters": 1000, "metrics": {"loss": 2.0, "accuracy": 0.8}, **changes,
    }  # fmt: skip


def side(*records: dict[str, Any], name: str = "x") -> Side:
    return Side(name, records)


def judged(before: Side, after: Side, **bounds: Any) -> list[bool]:
    return [check.passed for check in gate(before, after, bounds_of(**bounds))]


# --- bounds


@pytest.mark.parametrize(
    "bounds, least, most",
    [
        ({"memory": "+2%"}, -math.inf, 102), ({"memory": "-2%"}, -math.inf, 98),
        ({"memory": "+10"}, -math.inf, 110), ({"memory": "+1KiB"}, -math.inf, 1124),
        ({"memory": "+1kB"}, -math.inf, 1100), ({"throughput": "-5%"}, 95, math.inf),
        ({"throughput": "+5%"}, 105, math.inf), ({"cpu_throughput": "-7"}, 93, math.inf),
        ({"metrics": ["loss=+0.5"]}, -math.inf, 100.5), ({"metrics": ["f1=-1%"]}, 99, math.inf),
        ({"metrics": ["f1=±.5%"]}, 99.5, 100.5), ({"metrics": ["f1=+/-2"]}, 98, 102),
        ({"metrics": ["f1=+-2e-1"]}, 99.8, 100.2), ({"metrics": [" f1 = + 1 % "]}, -math.inf, 101),
    ],
)  # fmt: skip
def test_what_a_bound_allows(bounds, least, most):
    (bound,) = bounds_of(**bounds)
    assert bound.limits(100.0) == pytest.approx((least, most))


def test_a_share_of_a_negative_figure_is_of_its_size():
    (bound,) = bounds_of(metrics=["score=+10%"])
    assert bound.limits(-2.0) == pytest.approx((-math.inf, -1.8))


@pytest.mark.parametrize(
    "flag, text",
    [("memory", text) for text in ("", "2%", "+", "+%", "+2%%", "two", "±2%", "+2 TB", "+nan",
                                   "+inf", "+1e999", "+1,5%", "2", "--2%")]
    + [("throughput", "-5MiB"), ("throughput", "±5%"), ("cpu_throughput", "5")],
)  # fmt: skip
def test_what_is_no_bound_is_one_clear_error(flag, text):
    with pytest.raises(RecipeError) as raised:
        bounds_of(**{flag: text})
    assert raised.value.exit_code == 2
    assert raised.value.where == f"--{flag.replace('_', '-')}"


@pytest.mark.parametrize("text", ["loss", "=+1", "loss=", "loss=1", "loss=+1MiB", "loss=+-", "=+"])
def test_what_is_no_bound_of_a_metric(text):
    with pytest.raises(RecipeError):
        bounds_of(metrics=[text])


def test_a_gate_without_bounds_lets_nothing_pass():
    with pytest.raises(RecipeError, match="no bounds"):
        bounds_of()


# --- the verdict


def test_a_bound_is_kept_to_the_byte():
    before = side(run())
    assert judged(before, side(run(peak_bytes=1020 * MIB)), memory="+2%") == [True]
    assert judged(before, side(run(peak_bytes=1020 * MIB + 1)), memory="+2%") == [False]
    assert judged(before, side(run(tokens_per_second=190)), throughput="-5%") == [True]
    assert judged(before, side(run(tokens_per_second=189.9)), throughput="-5%") == [False]
    better = side(run(peak_bytes=MIB, tokens_per_second=900))
    assert judged(before, better, memory="+2%", throughput="-5%") == [True, True]


def test_metrics_are_held_on_the_side_that_is_asked_for():
    before, after = side(run()), side(run(metrics={"loss": 2.1, "accuracy": 0.79}))
    assert judged(before, after, metrics=["loss=+0.2", "accuracy=-1%"]) == [True, False]
    assert judged(before, after, metrics=["loss=-0.01", "loss=±0.05"]) == [True, False]


def test_of_several_records_the_medians_count():
    before = side(*(run(peak_bytes=b * MIB) for b in (1000, 100, 1010)))
    after = side(*(run(peak_bytes=b * MIB) for b in (1015, 9000, 1001)))
    assert judged(before, after, memory="+2%") == [True]
    (check,) = gate(before, after, bounds_of(memory="+2%"))
    assert check.baseline.median == 1000 * MIB
    assert (check.candidate.low, check.candidate.high) == (1001 * MIB, 9000 * MIB)
    assert check.candidate.count == 3


def test_a_figure_that_a_record_lacks_is_an_error_and_no_pass():
    lacking = run()
    del lacking["tokens_per_second"]
    for after in (side(lacking), side(run(), lacking)):
        with pytest.raises(RecipeError, match="tokens/s"):
            gate(side(run()), after, bounds_of(throughput="-5%"))
    with pytest.raises(RecipeError, match="loss, accuracy"):
        gate(side(run()), side(run()), bounds_of(metrics=["f1=+1"]))


@pytest.mark.parametrize("odd", ["1000", True, None, math.nan, math.inf, [1], 10**400])
def test_what_is_no_number_is_no_figure(odd):
    assert "peak_bytes" not in figures_of(run(peak_bytes=odd))
    assert "metric.loss" not in figures_of(run(metrics={"loss": odd}))
    assert figures_of(run(metrics=odd, memory=odd))


@pytest.mark.parametrize("key, value", [("device", "cuda"), ("device_name", "Another CPU")])
def test_different_devices_are_refused_unless_told(key, value):
    before, after = side(run()), side(run(**{key: value}))
    with pytest.raises(RecipeError, match="different devices"):
        gate(before, after, bounds_of(memory="+2%"))
    bounds = bounds_of(memory="+2%")
    assert [c.passed for c in gate(before, after, bounds, any_device=True)] == [True]


def test_a_device_that_is_not_known_is_not_another():
    unknown = run()
    del unknown["device_name"]
    assert judged(side(run()), side(unknown), memory="+2%") == [True]


def test_peaks_of_different_kinds_are_refused_where_memory_is_bounded():
    before, after = side(run(peak_kind="resident")), side(run(peak_kind="allocated"))
    with pytest.raises(RecipeError, match="kinds"):
        gate(before, after, bounds_of(memory="+2%"))
    assert judged(before, after, throughput="-5%") == [True]


def test_other_commands_and_failed_ones_are_refused():
    bounds = bounds_of(memory="+2%")
    with pytest.raises(RecipeError, match="different kinds"):
        gate(side(run()), side(run(verb="eval")), bounds)
    for pair in ((run(), run(exit_status=3)), (run(exit_status=3), run())):
        with pytest.raises(RecipeError, match="failed"):
            gate(side(pair[0]), side(pair[1]), bounds)


# --- sides


def test_records_by_number_id_and_newness(book):
    written = [ledger_file.append(run(id=f"r00000{n}"), book) for n in range(1, 6)]
    shelf = Shelf()

    def numbers(word: str) -> list[int]:
        return [r["number"] for r in shelf.side(word).records]

    assert numbers("2") == [2]
    assert numbers("2-4") == [2, 3, 4]
    assert numbers("4,1") == [4, 1]
    assert numbers("last") == [5]
    assert numbers("last:2") == [4, 5]
    assert numbers(written[2]["id"]) == [3]
    assert numbers("1,last,r000002") == [1, 5, 2]


@pytest.mark.parametrize(
    "word", ["", ",", "0", "9", "1-9", "3-2", "last:9", "last:0", "r0000", "rffff", "nowhere/run",
             "-1", "bot"],
)  # fmt: skip
def test_what_names_no_record_is_an_error(book, word):
    for n in range(1, 6):
        ledger_file.append(run(id=f"r00000{n}"), book)
    with pytest.raises(RecipeError):
        Shelf().side(word)


def test_a_ledger_that_is_off_or_unreadable(tmp_path):
    with pytest.raises(RecipeError, match="switched off"):
        Shelf("off").side("1")
    with pytest.raises(RecipeError, match="cannot be read"):
        Shelf(tmp_path).side("1")


def test_a_run_folder_is_the_record_of_its_report(tmp_path):
    folder = tmp_path / "some-run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights").write_bytes(b"x" * 1000)
    report = {"base": "bot", "device": "cpu", "strategy": {"name": "lora"},
              "training": {"measured_peak_bytes": 5, "tokens": 30, "train_seconds": 3.0},
              "metrics": {"loss": 2.0}}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(report))
    for word in (folder, folder / "run.json", f"{folder},{folder}"):
        records = Shelf("off").side(str(word)).records
        assert records[0]["peak_bytes"] == 5
        assert records[0]["tokens_per_second"] == 10
        assert records[0]["file_bytes"] == 1000
        assert records[0]["verb"] == "train"


def test_files_of_records(tmp_path):
    one, many, lines = tmp_path / "one.json", tmp_path / "many.json", tmp_path / "a,b.jsonl"
    one.write_text(json.dumps(run()))
    many.write_text(json.dumps([run(), run()]))
    lines.write_text(json.dumps(run()) + "\n\n" + json.dumps(run()) + "\n")
    assert [len(Shelf("off").side(str(f)).records) for f in (one, many, lines)] == [1, 2, 2]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '[{"verb": "train"}, 3]', '{"verb": 3}', "[" * 100_000,
             '{"verb": "a"}\n{'],
)  # fmt: skip
def test_files_that_hold_no_records(tmp_path, text):
    for name in ("x.json", "run.json"):
        (tmp_path / name).write_text(text)
        with pytest.raises(RecipeError):
            Shelf("off").side(str(tmp_path / name))


# --- compare


def test_figures_side_by_side_with_ratio_and_difference():
    memory = {"train": {"predicted": {"device_bytes": 90}, "measured": {"resident_bytes": 100}}}
    after = side(run(peak_bytes=900 * MIB, memory=memory, metrics={"loss": 1.0}))
    found = {one.name: one for one in compare(side(run()), after)}
    assert found["peak_bytes"].ratio == pytest.approx(0.9)
    assert found["peak_bytes"].difference == -100 * MIB
    assert found["metric.loss"].ratio == pytest.approx(0.5)
    assert found["metric.accuracy"].b is None
    assert found["memory.train.measured.resident_bytes"].a is None
    assert found["memory.train.predicted.device_bytes"].b.median == 90


def test_figures_are_in_one_order_and_empty_places_are_not_shown(book):
    memory = {"train": {"predicted": {"device_bytes": 90, "host_bytes": 0}}}
    one, two = run(memory=memory), run(memory=memory, predicted_peak_bytes=5, flops=7)
    names = [found.name for found in compare(side(one), side(two))]
    assert names.index("predicted_peak_bytes") < names.index("tokens_per_second")
    assert names.index("flops") < names.index("metric.loss")
    assert names[-1] == "memory.train.predicted.host_bytes"
    ledger_file.append(one, book)
    shown = qft("bench", "compare", "1", "1").stdout
    assert "train: device, predicted" in shown
    assert "train: host, predicted" not in shown


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"data_fingerprint": "e"}, "other data"), ({"device_name": "B"}, "other devices"),
        ({"device": "cuda"}, "other devices"), ({"verb": "eval"}, "other commands"),
        ({"dtype": "float32"}, None), ({"quantize": "nf4"}, "otherwise quantized"),
        ({"versions": {"torch": "2.14"}}, "torch 2.13 → 2.14"),
        ({"recipe_hash": "bb", "strategy": {"name": "lora", "rank": 8}}, "strategy.rank 16 → 8"),
        ({"recipe_hash": "bb", "recipe": {"train": {"seed": 1}}}, "train.seed default → 1"),
        ({"recipe_hash": "bb"}, "what the records do not hold"),
    ],
)  # fmt: skip
def test_what_is_not_comparable_is_said(changes, told):
    three = side(*[run()] * 3)
    found = " ".join(warnings(three, side(*[run(**changes)] * 3)))
    assert (told in found) if told else not found
    assert not warnings(three, three)


def test_single_runs_and_mixed_sides_are_said():
    assert "medians" in " ".join(warnings(side(run()), side(*[run()] * 3)))
    mixed = side(run(), run(recipe_hash="bb"), run(), name="mixed")
    assert "mixed holds several recipes" in " ".join(warnings(mixed, mixed))


# --- the command line


def test_the_gate_ends_with_its_exit_status(book):
    ledger_file.append(run(), book)
    ledger_file.append(run(peak_bytes=1010 * MIB, tokens_per_second=150.0), book)
    passed = qft("bench", "gate", "1", "2", "--memory", "+2%")
    assert passed.exit_code == 0
    assert "+1.00%" in passed.stdout
    failed = qft("bench", "gate", "1", "2", "--memory", "+2%", "--throughput", "-5%", "--json")
    assert isinstance(failed.exception, VerificationError)
    assert failed.exception.exit_code == 5
    assert "-25.00%, allowed -5%" in failed.exception.text()
    said = json.loads(failed.stdout)
    assert said["passed"] is False
    assert [check["passed"] for check in said["checks"]] == [True, False]
    wrong = qft("bench", "gate", "1", "2", "--memory", "a little")
    assert wrong.exception.exit_code == 2
    assert len(book.read_text().splitlines()) == 2  # what only reads leaves no record


def test_a_saved_list_is_a_baseline(book, tmp_path):
    for _ in range(3):
        ledger_file.append(run(), book)
    saved = tmp_path / "baseline.json"
    saved.write_text(qft("bench", "ledger", "--limit", 3, "--json").stdout)
    assert qft("bench", "gate", saved, "last:3", "--memory", "+0%").exit_code == 0
    shown = qft("bench", "compare", saved, "last:3")
    assert shown.exit_code == 0
    assert "1.000" in shown.stdout
    assert "note" not in shown.stdout
    both = json.loads(qft("bench", "compare", saved, "last:3", "--json").stdout)
    assert both["figures"]["tokens_per_second"]["ratio"] == 1
    assert both["a"]["records"] == 3


# --- the table


def methods() -> list[dict[str, Any]]:
    def one(name: str, peak: int, seconds: float, accuracy: float, **more: Any) -> dict[str, Any]:
        return run(strategy={"name": name}, recipe_hash=name, peak_bytes=peak * MIB,
                   train_seconds=seconds, metrics={"accuracy": accuracy}, **more)  # fmt: skip

    return [
        one("lora", 500, 10.0, 0.80), one("full", 2000, 30.0, 0.85), one("ia3", 600, 12.0, 0.80),
        one("lora", 520, 11.0, 0.81), one("lora", 510, 90.0, 0.10),
        one("head", 100, 2.0, 0.60), one("bad", 50, 1.0, 0.99, exit_status=3),
    ]  # fmt: skip


def test_rows_are_medians_sorted_and_what_nothing_beats_is_marked():
    drawn = table.table_of(methods(), metric="accuracy")
    assert [(r.method, r.best, r.records) for r in drawn.rows] == [
        ("full", True, 1), ("lora", True, 3), ("ia3", False, 1), ("head", True, 1)]  # fmt: skip
    lora = drawn.rows[1]
    assert lora.figures["peak_bytes"].median == 510 * MIB
    assert lora.figures["metric.accuracy"].median == 0.80
    lower = table.table_of(methods(), metric="accuracy", higher=False)
    assert [r.method for r in lower.rows if r.best] == ["head"]


def test_other_columns_may_count_and_sort():
    by_memory = table.table_of(methods(), axes=("memory",), sort="memory")
    assert [r.method for r in by_memory.rows] == ["head", "lora", "ia3", "full"]
    assert [r.method for r in by_memory.rows if r.best] == ["head"]
    for bad in ({"axes": ("weight",)}, {"sort": "colour"}, {"metric": "f1"}):
        with pytest.raises(RecipeError):
            table.table_of(methods(), **bad)
    with pytest.raises(RecipeError, match="no record"):
        table.table_of([run(exit_status=1)])


def test_rows_that_are_equal_in_all_that_counts_do_not_beat_each_other():
    twins = [run(strategy={"name": n}, recipe_hash=n, metrics={"loss": 1.0}) for n in ("a", "b")]
    assert [row.best for row in table.table_of(twins).rows] == [True, True]


def test_a_row_that_lacks_what_counts_is_not_marked_and_beats_nothing():
    lacking = run(strategy={"name": "x"}, recipe_hash="x", peak_bytes=None, train_seconds=0.1,
                  metrics={"accuracy": 1.0})  # fmt: skip
    drawn = table.table_of([*methods(), lacking], metric="accuracy")
    assert {r.method: r.best for r in drawn.rows}["x"] is False
    assert {r.method: r.best for r in drawn.rows}["full"] is True


def test_jobs_that_differ_only_in_a_knob_are_told_apart():
    drawn = table.table_of([run(number=1), run(number=2, recipe_hash="bb")])
    assert sorted(r.method for r in drawn.rows) == ["lora rank 16 (1)", "lora rank 16 (2)"]


def test_the_metric_goes_by_its_name():
    for name in (
        "loss",
        "eval_loss",
        "perplexity",
        "rmse",
        "mean_kl",
        "bits_per_byte",
        "wer_error",
    ):
        assert less_is_better(f"metric.{name}"), name
    for name in ("accuracy", "f1", "bleu", "top1", "glossary"):
        assert not less_is_better(f"metric.{name}"), name
    assert table.table_of([run(metrics={"loss": 1.0})]).higher is False


def test_the_table_in_markdown_cannot_be_broken_by_a_name(book):
    for record in methods():
        ledger_file.append(record, book)
    ledger_file.append(run(model="a|b\n<script>*"), book)
    shown = qft("bench", "table", "--markdown", "--metric", "accuracy")
    assert shown.exit_code == 0
    lines = [line for line in shown.stdout.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 5
    cells = {line.replace("\\|", "").count("|") for line in lines}
    assert len(cells) == 1
    assert "<script>" not in shown.stdout.replace("\\<script\\>", "")
    plain = qft("bench", "table", "--metric", "accuracy", "--model", "bot")
    assert "accuracy (higher is better)" in plain.stdout
    assert len([line for line in plain.stdout.splitlines() if line.startswith("*  ")]) == 3
    as_json = json.loads(qft("bench", "table", "1-3", "--json").stdout)
    assert [row["best"] for row in as_json["rows"]] == [True, True, False]


# --- pictures


def test_pictures_can_be_read(book, tmp_path):
    from PIL import Image

    for n, record in enumerate(methods()):
        ledger_file.append(
            {**record, "model": "$x_1$", "time": f"2026-01-0{n + 1}T00:00:00+00:00"}, book
        )
    for kind in ((), ("--history",)):
        png, svg = tmp_path / "plot.png", tmp_path / "plot.svg"
        for out in (png, svg):
            done = qft("bench", "plot", "--out", out, *kind)
            assert done.exit_code == 0, done.output
        with Image.open(png) as picture:
            picture.load()
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 3  # not blank
        assert ElementTree.parse(svg).getroot().tag.endswith("svg")
        png.unlink()
    assert not list(tmp_path.glob(".unfinished*"))


def test_what_cannot_be_drawn_leaves_the_former_picture(book, tmp_path):
    former = tmp_path / "plot.png"
    former.write_bytes(b"former")
    ledger_file.append({"verb": "train", "exit_status": 0}, book)
    for words in ((), ("--history",), ("--history", "--metric", "f1")):
        assert isinstance(qft("bench", "plot", "-o", former, *words).exception, RecipeError)
    ledger_file.append(run(), book)
    assert isinstance(qft("bench", "plot", "-o", tmp_path / "x.pdf").exception, RecipeError)
    nowhere = qft("bench", "plot", "-o", tmp_path / "none" / "x.png")
    assert nowhere.exit_code != 0
    assert former.read_bytes() == b"former"


# --- repeated trainings


RECIPE = "model: m\ntask: text\ndata: {train: x.jsonl}\nstrategy: lora\noutput: run\n"


def test_trainings_are_repeated_in_processes_of_their_own(book, tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    ledger_file.append(run(), book)
    started = []

    def stand_in(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
        started.append(command)
        ledger_file.append(run(peak_bytes=len(started) * MIB), Path(command[-1]))
        ledger_file.append(run(), book)  # somebody else's, at the same time
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", stand_in)
    done = qft("bench", "train", path, "quantize=nf4", "--steps", 7, "--repeat", 3, "--json")
    assert done.exit_code == 0, done.output
    assert [r["peak_bytes"] for r in json.loads(done.stdout)] == [MIB, 2 * MIB, 3 * MIB]
    assert all("train.max_steps=7" in c and "quantize=nf4" in c for c in started)
    assert len({word for c in started for word in c if word.startswith("output=")}) == 1
    shown = qft("bench", "train", path, "--repeat", 1)
    assert "records 9" in shown.stdout
    assert [r["number"] for r in ledger_file.read(book)[0]] == list(range(1, 10))


def test_a_training_that_fails_ends_the_measuring(book, tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    failed = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    done = qft("bench", "train", path)
    assert "exit status 3" in str(done.exception)
    silent = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: silent)
    assert "no records" in str(qft("bench", "train", path).exception)
    assert "off" in str(qft("bench", "train", path, "--ledger", "off").exception)
    path.write_text("model: 3\n")
    assert isinstance(qft("bench", "train", path).exception, RecipeError)


@pytest.mark.slow
def test_a_real_training_repeated_passes_its_own_gate(book, tmp_path, tiny_llama):
    rows = "".join(json.dumps({"text": f"{n * 7919} and {n * n}"}) + "\n" for n in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_llama}\ntask: text\ndata: {{train: {tmp_path}/rows.jsonl}}\n"
        "strategy: lora\ntrain: {batch_size: 4, max_length: 32}\noutput: run\n"
    )
    records = repeat.train_repeatedly(path, [], steps=3, repeat=2, ledger=book)
    assert len(records) == 2
    assert len({r["metrics"]["train_loss"] for r in records}) == 1  # the same seed
    assert medians(records)["peak_bytes"].count == 2
    words = ("--memory", "+20%", "--metric", "train_loss=±0")
    assert qft("bench", "gate", "1", "2", *words).exit_code == 0
