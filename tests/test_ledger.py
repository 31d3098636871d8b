"""The ledger: a record a command, whoever else writes, whatever is wrong with the file."""

from __future__ import annotations

import fcntl
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qft.bench import facts, ledger, ledger_file
from qft.bench.scrubbing import name_of, scrubbed
from qft.cli import app
from qft.errors import DataError, RecipeError, WillNotFitError
from qft.recipe import build_recipe

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The ledger of this test's commands."""
    path = tmp_path / "book.jsonl"
    monkeypatch.setenv(ledger.VARIABLE, str(path))
    return path


def qft(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- a real training, once


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny training and what came after it, all by the command line, in one ledger."""
    folder = tmp_path_factory.mktemp("ledger")
    book = folder / "book.jsonl"
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh ", k=40)) for _ in range(24)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_llama}\ntask: text\n"
        f"data: {{train: {folder / 'rows.jsonl'}, eval_share: 0.25}}\n"
        "strategy: {name: lora, rank: 4}\n"
        "train: {max_steps: 2, batch_size: 4, max_length: 16}\n"
        f"output: {folder / 'run'}\n",
        encoding="utf-8",
    )
    patch = pytest.MonkeyPatch()
    patch.setenv(ledger.VARIABLE, str(book))
    patch.setenv("HF_TOKEN", "a-secret-of-the-user")
    done = [
        qft("train", recipe, "--quiet"),
        qft("train", recipe, "--quiet"),  # the place is taken
        qft("eval", folder / "run", "--limit", 2, "--json"),
        qft("merge", folder / "run", "--out", folder / "merged", "--quiet"),
        qft("train", recipe, "--dry-run"),
        qft("generate", folder / "run", "-p", "a private sentence", "--max-new-tokens", 2, "-q"),
    ]
    patch.undo()
    assert done[0].exit_code == 0, done[0].output
    return {"folder": folder, "done": done, "records": lines_of(book), "book": book,
            "report": json.loads((folder / "run" / "run.json").read_text())}  # fmt: skip


def test_commands_leave_one_record_each_and_a_dry_run_none(trained):
    assert [result.exit_code for result in trained["done"]] == [0, 1, 0, 0, 0, 0]
    records = trained["records"]
    assert [r["verb"] for r in records] == ["train", "train", "eval", "merge", "generate"]
    assert [r["number"] for r in records] == [1, 2, 3, 4, 5]
    assert len({r["id"] for r in records}) == 5
    for record in records:
        assert record["seconds"] > 0
        assert record["cpu_seconds"] > 0
        assert record["versions"]["torch"]
        assert record["device"]
        assert record["device_name"]


def test_the_record_of_a_training_says_what_its_report_says(trained):
    record, report = trained["records"][0], trained["report"]
    training = report["training"]
    assert record["exit_status"] == 0
    assert record["metrics"]["loss"] == report["metrics"]["loss"]
    if "measured" not in report:
        assert record["peak_bytes"] == training["measured_peak_bytes"]
    assert record["peak_bytes"] > 0
    assert record["peak_kind"].startswith("allocated" if report["device"] == "cuda" else "resident")
    assert record["tokens_per_second"] == pytest.approx(training["tokens_per_second"])
    supervised = training["supervised_items"] / training["train_seconds"]
    assert record["supervised_items_per_second"] == pytest.approx(supervised)
    for key in ("dtype", "base_fingerprint", "data_fingerprint", "trained_parameters", "strategy"):
        assert record[key] == report[key]
    adapter = trained["folder"] / "run" / "adapter"
    assert record["file_bytes"] == sum(p.stat().st_size for p in adapter.rglob("*") if p.is_file())
    assert record["recipe"]["train"]["max_steps"] == 2
    assert record["recipe_hash"]


def test_a_command_that_fails_is_recorded_with_its_exit_status_and_recipe(trained):
    good, failed = trained["records"][:2]
    assert failed["exit_status"] == 2
    assert failed["error"] == "OutputExistsError"
    assert failed["recipe_hash"] == good["recipe_hash"]
    assert "metrics" not in failed
    assert "file_bytes" not in failed


def test_what_is_made_of_a_run_names_the_run_and_what_was_trained(trained):
    _, _, evaluated, merged, _ = trained["records"]
    shown = json.loads(trained["done"][2].stdout)
    assert evaluated["metrics"] == shown
    assert evaluated["settings"]["limit"] == 2
    for record in (evaluated, merged):
        assert record["source"] == "run"
        assert record["strategy"]["name"] == "lora"
        assert record["data_fingerprint"] == trained["report"]["data_fingerprint"]
    weights = (trained["folder"] / "merged").glob("*.safetensors")
    assert merged["file_bytes"] == pytest.approx(sum(p.stat().st_size for p in weights), rel=0.1)


def test_no_folder_no_secret_and_nothing_typed_is_in_a_record(trained):
    text = trained["book"].read_text(encoding="utf-8")
    assert str(trained["folder"].parent) not in text
    assert str(Path.home()) not in text
    assert "a-secret-of-the-user" not in text
    assert "private sentence" not in text
    assert "rows.jsonl" in text  # a name is no folder


# --- the recipe's hash


def recipe_with(folder: Path, **changes: Any) -> Any:
    values = {"model": str(folder / "model"), "task": "text", "data": {"train": "x.jsonl"},
              "strategy": {"name": "lora", "rank": 4}, "output": str(folder / "run")}  # fmt: skip
    return facts.of_recipe(build_recipe({**values, **changes}))


def test_the_hash_is_of_every_knob_but_not_of_places(tmp_path):
    one = recipe_with(tmp_path)
    assert recipe_with(tmp_path / "elsewhere")["recipe_hash"] == one["recipe_hash"]
    assert recipe_with(tmp_path, output="other")["recipe_hash"] == one["recipe_hash"]
    for changes in (
        {"strategy": {"name": "lora", "rank": 8}}, {"quantize": "nf4"}, {"train": {"seed": 1}},
        {"model": str(tmp_path / "another")}, {"data": {"train": "y.jsonl"}},
    ):  # fmt: skip
        assert recipe_with(tmp_path, **changes)["recipe_hash"] != one["recipe_hash"], changes


def test_only_knobs_that_were_turned_are_written_out(tmp_path):
    told = recipe_with(tmp_path, train={"seed": 7})["recipe"]
    assert told == {"model": "model", "task": "text", "data": {"train": "x.jsonl"},
                    "train": {"seed": 7}}  # fmt: skip


# --- where it is


def test_the_place_of_the_ledger(monkeypatch, tmp_path):
    monkeypatch.delenv(ledger.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert ledger.ledger_path() == tmp_path / "qft" / "ledger.jsonl"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # which that standard has one ignore
    assert ledger.ledger_path() == Path.home() / ".local" / "state" / "qft" / "ledger.jsonl"
    monkeypatch.setenv(ledger.VARIABLE, "~/book.jsonl")
    assert ledger.ledger_path() == Path.home() / "book.jsonl"
    assert ledger.ledger_path(tmp_path / "b") == tmp_path / "b"
    monkeypatch.setenv(ledger.VARIABLE, "off")
    assert ledger.ledger_path() is None
    assert ledger.ledger_path("OFF") is None
    assert ledger.record("train", {}) is None


def test_the_tests_do_not_write_into_the_users_ledger():
    assert ledger.ledger_path() is None


def test_the_option_wins_over_the_variable(book, tmp_path):
    other = tmp_path / "other.jsonl"
    failed = qft("train", tmp_path / "none.yaml", "--ledger", other)
    assert failed.exit_code != 0
    assert lines_of(other)[0]["error"] == "RecipeError"
    assert not book.exists()
    qft("train", tmp_path / "none.yaml", "--ledger", "off")
    assert not book.exists()
    assert len(lines_of(other)) == 1


def test_a_ledger_that_cannot_be_written_is_a_note(tmp_path, monkeypatch):
    """A folder where the file should be, a pipe, a folder that is a file: the command goes on."""
    pipe, plain = tmp_path / "pipe", tmp_path / "plain"
    os.mkfifo(pipe)
    plain.write_text("")
    for place in (tmp_path, pipe, plain / "book.jsonl"):
        monkeypatch.setenv(ledger.VARIABLE, str(place))
        done = qft("bench", "step", "--shape", "nothing-like-it")
        assert type(done.exception) is RecipeError, place  # the command's own error, no other
        assert "note: the ledger was not written" in done.stderr, place


# --- appending


def test_writers_of_several_processes_lose_nothing(tmp_path):
    book = tmp_path / "book.jsonl"
    code = (
        "import sys; from pathlib import Path; from qft.bench import ledger_file\n"
        "for i in range(40): ledger_file.append({'verb': 'x', 'who': sys.argv[2], 'i': i, "
        "'long': 'z' * 3000}, Path(sys.argv[1]))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(book), str(n)], cwd=REPOSITORY)
               for n in range(4)]  # fmt: skip
    assert [writer.wait(60) for writer in writers] == [0] * 4
    records = lines_of(book)
    assert [r["number"] for r in records] == list(range(1, 161))
    for who in "0123":
        assert [r["i"] for r in records if r["who"] == who] == list(range(40))


def test_the_file_is_bounded_and_numbers_go_on(tmp_path, monkeypatch):
    book = tmp_path / "book.jsonl"
    monkeypatch.setattr(ledger_file, "LIMIT_BYTES", 2000)
    for _ in range(40):
        ledger_file.append({"verb": "x", "text": "z" * 100}, book)
    assert book.stat().st_size <= 2000
    assert ledger_file.former(book).stat().st_size <= 2000
    records, broken = ledger_file.read(book)
    numbers = [record["number"] for record in records]
    assert broken == 0
    assert numbers == list(range(numbers[0], 41))
    assert numbers[0] > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["book.jsonl", "book.jsonl.1"]


def test_a_writer_waits_for_the_file_that_has_the_name(tmp_path, monkeypatch):
    """Another process renames the file while this one waits for its lock."""
    book = tmp_path / "book.jsonl"
    ledger_file.append({"verb": "first"}, book)
    plain = fcntl.flock
    moved = []

    def lock(descriptor: int, how: int) -> None:
        if not moved:
            moved.append(True)
            os.replace(book, ledger_file.former(book))
        plain(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", lock)
    ledger_file.append({"verb": "second"}, book)
    assert [r["verb"] for r in lines_of(book)] == ["second"]
    assert [r["verb"] for r in lines_of(ledger_file.former(book))] == ["first"]


def test_a_lock_that_is_never_given_back_is_an_error_after_a_while(tmp_path, monkeypatch):
    book = tmp_path / "book.jsonl"
    ledger_file.append({"verb": "x"}, book)
    monkeypatch.setattr(ledger_file, "WAIT_SECONDS", 0.05)
    with book.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError):
            ledger_file.append({"verb": "y"}, book)
    assert len(lines_of(book)) == 1


def test_a_half_written_line_does_not_swallow_the_next(tmp_path):
    book = tmp_path / "book.jsonl"
    ledger_file.append({"verb": "a"}, book)
    with book.open("a") as stream:
        stream.write('{"number": 2, "verb": "b", "sec')
    ledger_file.append({"verb": "c"}, book)
    records, broken = ledger_file.read(book)
    assert [(r["number"], r["verb"]) for r in records] == [(1, "a"), (2, "c")]
    assert broken == 1


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    book = tmp_path / "book.jsonl"
    ledger_file.append({"verb": "a"}, book)
    before = book.read_bytes()
    plain = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: plain(descriptor, data[:10]))
    with pytest.raises(OSError, match="No space"):
        ledger_file.append({"verb": "b"}, book)
    assert book.read_bytes() == before


def test_what_is_too_long_is_left_out(tmp_path):
    written = ledger_file.append({"verb": "a", "strategy": {"targets": ["m" * 30] * 1000}, "b": 1},
                            tmp_path / "book.jsonl")  # fmt: skip
    assert "strategy" not in written
    assert written["b"] == 1


def test_numbers_that_json_has_none_for_are_null(tmp_path):
    book = tmp_path / "book.jsonl"
    ledger_file.append({"verb": "a", "metrics": {"loss": float("nan")}}, book)
    assert "NaN" not in book.read_text()
    assert lines_of(book)[0]["metrics"] == {"loss": None}


@pytest.mark.parametrize(
    "line",
    ["", "[1]", '{"number": 9}', '{"verb": 3}', "not json", '{"verb": "x"', "[" * 100_000],
)
def test_lines_that_are_no_records_are_skipped(tmp_path, line):
    book = tmp_path / "book.jsonl"
    ledger_file.append({"verb": "a"}, book)
    with book.open("a") as stream:
        stream.write(line + "\n")
    with book.open("ab") as stream:
        stream.write(b"\xff\xfe\n")
    ledger_file.append({"verb": "b"}, book)
    records, broken = ledger_file.read(book)
    assert [r["verb"] for r in records] == ["a", "b"]
    assert records[1]["number"] == 2
    assert broken == 1 + bool(line)
    shown = qft("bench", "ledger", "--ledger", book)
    assert f"{broken} line" in shown.stderr
    assert shown.exit_code == 0


# --- how commands end


@pytest.mark.parametrize(
    "raised, status, kind",
    [(None, 0, None), (WillNotFitError("no"), 3, "WillNotFitError"), (DataError("no"), 4,
     "DataError"), (KeyboardInterrupt(), 130, "KeyboardInterrupt"), (ValueError("/a/b/c"), 1,
     "ValueError"), (SystemExit(7), 7, None), (SystemExit(), 0, None), (MemoryError(), 1,
     "MemoryError")],
)  # fmt: skip
def test_the_exit_status(book, raised, status, kind):
    def work() -> None:
        with ledger.recording("train") as recording:
            assert ledger.current() is recording
            if raised is not None:
                raise raised

    if raised is None:
        work()
    else:
        with pytest.raises(type(raised)):
            work()
    assert ledger.current() is None
    (record,) = lines_of(book)
    assert (record["exit_status"], record.get("error")) == (status, kind)
    assert "/a/b" not in book.read_text()


def test_a_result_that_cannot_be_read_costs_a_note(book, capsys, monkeypatch):
    def broken(verb: str, result: Any) -> dict[str, Any]:
        raise KeyError("surprise")

    monkeypatch.setattr(facts, "of_result", broken)
    with ledger.recording("train"):
        pass
    assert "KeyError" in capsys.readouterr().err


def test_the_public_function_records_what_it_is_given(book, tmp_path):
    report = {"task": "text", "device": "cpu", "strategy": {"name": "lora"}, "base": "m",
              "training": {"tokens": 100, "train_seconds": 2.0},
              "metrics": {"loss": 1.5}}  # fmt: skip
    written = ledger.record("train", report, seconds=3.0, note=f"from {tmp_path}/deep/x.jsonl")
    assert written is not None
    (record,) = lines_of(book)
    assert record == written
    assert record["tokens_per_second"] == 50
    assert record["seconds"] == 3.0
    assert record["metrics"] == {"loss": 1.5}
    assert record["note"] == "from x.jsonl"


# --- predicted and measured, by phase


def test_both_figures_of_each_phase_are_kept():
    report = {
        "device": "cpu",
        "plan": {"phases": [{"phase": "train", "device": {"weights": 10, "activations": 5},
                             "host": {}, "disk": {"checkpoints": 7}, "disk_peak": 8, "note": "x"},
                            {"phase": "save", "device": {}, "disk": {"adapter": 3}}]},
        "training": {"measured": {"train": {"allocated_bytes": 14, "reserved_bytes": 16,
                                            "resident": 20, "seconds": 9}, "load": {"note": "y"}}},
    }  # fmt: skip
    assert facts.of_result("train", report)["memory"] == {
        "train": {"predicted": {"device_bytes": 15, "host_bytes": 0, "disk_bytes": 7,
                                "disk_peak_bytes": 8},
                  "measured": {"allocated_bytes": 14, "reserved_bytes": 16, "resident_bytes": 20}},
        "save": {"predicted": {"device_bytes": 0, "disk_bytes": 3}},
    }  # fmt: skip


def test_a_plan_that_does_not_fit_is_recorded_with_its_figures(book):
    """`qft plan` prints its result, and then ends with exit status 3."""
    plan = {"fits": False, "budget_bytes": 50, "peak_bytes": 60, "low_bytes": 55, "high_bytes": 65,
            "device": "cuda", "device_name": "A Card",
            "phases": [{"phase": "train", "device": {"weights": 60}, "disk_peak": 0}]}  # fmt: skip

    def end() -> None:
        with ledger.recording("plan") as recording:
            recording.result = plan
            raise SystemExit(3)

    with pytest.raises(SystemExit):
        end()
    (record,) = lines_of(book)
    assert record["exit_status"] == 3
    assert record["predicted_peak_bytes"] == 60
    assert record["device_name"] == "A Card"
    assert record["memory"]["train"]["predicted"]["device_bytes"] == 60


@pytest.mark.parametrize(
    "plan", [None, 3, [], {}, {"phases": 3}, {"phases": [3, {}, {"phase": 1}]}]
)
@pytest.mark.parametrize("measured", [None, 3, {"train": 3}, {"train": {"allocated_bytes": "x"}}])
def test_reports_without_them_or_in_another_form_are_read_as_well(plan, measured):
    report = {"plan": plan, "training": {"measured": measured}}
    assert "memory" not in facts.of_result("train", report)


@pytest.mark.parametrize(
    "device, peak, kind",
    [("cpu", 20, "resident above the libraries"), ("cuda", 19, "allocated")],
)
def test_the_peak_is_the_most_of_all_phases(device, peak, kind):
    measured = {
        "load": {"resident_bytes": 20, "allocated_bytes": 19, "reserved_bytes": 30},
        "train": {"resident_bytes": 15, "allocated_bytes": 14, "reserved_bytes": 40},
        "save": {"resident_bytes": None},
    }
    training = {"measured_peak_bytes": 999}
    found = facts.of_result("train", {"device": device, "measured": measured, "training": training})
    assert (found["peak_bytes"], found["peak_kind"]) == (peak, kind)
    assert found.get("process_peak_reserved_bytes") == (40 if device == "cuda" else None)
    known = facts.of_result("train", {"device": device, "training": training})
    assert known["peak_bytes"] == 999
    assert known["peak_kind"] == kind.split()[0]


@pytest.mark.parametrize("verb", [*facts.READERS, "chat", "nothing"])
@pytest.mark.parametrize("result", [None, [], {}, "text", {"metrics": 3, "base": 4, "after": []}])
def test_no_result_is_too_odd_for_a_reader(verb, result):
    assert isinstance(facts.of_result(verb, result), dict)


# --- nothing private


@pytest.mark.parametrize(
    "text, left",
    [("/home/ann/models/bot", "bot"), ("see /data/ann/x.jsonl: gone", "see x.jsonl: gone"),
     ("~/secret/run", "run"), ("~ann/run", "run"), ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
     ("runs/bot", "runs/bot"), ("https://hub.example/a/b", "https://hub.example/a/b"),
     ("https://ann:pw@hub.example/a", "https://hub.example/a"), ("hf_abcdefghij", "***"),
     ("sk-abcdefgh12", "***"), ("2/5 of 3/4", "2/5 of 3/4"), ("/a", "/a")],
)  # fmt: skip
def test_folders_and_secrets_are_taken_out_of_any_text(text, left):
    assert scrubbed({"a": [text]}) == {"a": [left]}


def test_the_home_folder_goes_even_with_spaces_in_it(monkeypatch, tmp_path):
    home = tmp_path / "Ann Example"
    monkeypatch.setenv("HOME", str(home))
    assert "Ann" not in scrubbed(f"{home}/models/bot")
    assert scrubbed({str(home / "x"): 1}) == {"x": 1}


def test_a_token_of_the_environment_is_known_by_its_value(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "plain-looking-words")
    assert scrubbed("key plain-looking-words!") == "key ***!"


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert name_of("a/b") == "b"
    assert name_of(f"{tmp_path}/a/b/") == "b"
    assert name_of("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert name_of("../nowhere/x") == "x"


# --- the list


@pytest.fixture
def filled(book: Path) -> Callable[..., Path]:
    def fill(*records: dict[str, Any]) -> Path:
        for record in records:
            ledger_file.append(record, book)
        return book

    return fill


def test_the_list_is_filtered_and_as_json_is_a_side(filled):
    book = filled(
        {"verb": "train", "model": "small-bot", "peak_bytes": 2**30, "exit_status": 0},
        {"verb": "eval", "model": "small-bot"},
        {"verb": "train", "model": "Big-Bot", "exit_status": 3},
    )
    shown = qft("bench", "ledger")
    assert shown.exit_code == 0
    assert "1.0 GiB" in shown.stdout
    assert len(shown.stdout.splitlines()) == 4
    found = json.loads(qft("bench", "ledger", "--verb", "train", "--model", "bot", "--json").stdout)
    assert [r["number"] for r in found] == [1, 3]
    newest = json.loads(qft("bench", "ledger", "--limit", 1, "--json").stdout)
    assert newest == lines_of(book)[-1:]


def test_an_empty_ledger_says_so(book):
    shown = qft("bench", "ledger")
    assert shown.exit_code == 0
    assert "no records" in shown.stderr


def test_what_another_has_written_does_not_steer_the_terminal(filled):
    filled({"verb": "train", "model": "a\x1b[31mb\nc", "id": "r1"})
    shown = qft("bench", "ledger").stdout
    assert "\x1b" not in shown
    assert len(shown.splitlines()) == 2
