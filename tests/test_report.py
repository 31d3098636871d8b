"""The page of a run: what it shows, that it harms nobody, and how a browser takes it."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from headless_chromium import Tab, chromium, find_chromium

import qft
from qft import cli
from qft.errors import QftError
from qft.planning.amounts import PhaseBytes
from qft.report.bars import plan_bars
from qft.report.escaping import discreet, last_part, visible, without_folders
from qft.report.lines import Limit, LineChart, Series, smoothed, thinned
from qft.report.numbers import (
    ByteUnit,
    bytes_text,
    compact,
    duration_text,
    nice_ticks,
    short,
    tick_texts,
)  # fmt: skip
from qft.report.page import write_report

GIB = 2**30
HOSTILE = (
    "<script>document.title='owned'</script><img src='http://127.0.0.1:9/x' onerror='owned()'>"
    "</mark></div></body><style>*{display:none}</style>&lt; \u202egnp.exe \x07\x1b[31m\ud800 "
    'طرد " onload="owned()'
)
VOID = {"meta", "br", "img", "link", "input", "hr"}


# --- reading a page


@dataclass
class Page(HTMLParser):
    """Every element and attribute of a page; fails where elements are not closed in order."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    words: str = ""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data


def read(path: Path) -> Page:
    """Parses a page and checks what holds for every one."""
    raw = path.read_bytes()
    assert len(raw) < 500_000
    text = raw.decode("utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert not {c for c in text if ord(c) < 32} - {"\n", "\t"}
    allowed = {
        "html", "head", "meta", "title", "style", "body", "main", "header", "section", "h1", "h2",
        "p", "span", "strong", "dl", "dt", "dd", "div", "figure", "table", "thead", "tbody", "tr",
        "th", "td", "details", "summary", "article", "mark", "ul", "li", "code", "pre",
        "svg", "g", "rect", "line", "path", "circle", "text",
    }  # fmt: skip
    assert {name for name, _ in page.tags} <= allowed
    for name, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes), (name, attributes)
        assert not {"href", "src", "xlink:href", "action"} & set(attributes), (name, attributes)
    policy = next(a["content"] for n, a in page.tags if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert [a for n, a in page.tags if n == "style"] == [{}], "one sheet of rules"
    assert "url(" not in text
    assert "@import" not in text
    return page


def headings(page: Page) -> list[str]:
    return [a["id"] or "" for name, a in page.tags if name == "section"]


def charts(page: Page) -> list[str]:
    return [a["aria-label"] or "" for name, a in page.tags if name == "svg"]


# --- runs that were never trained


def lines(steps: int, every: int = 20, **more: Any) -> list[dict[str, Any]]:
    found = []
    for step in range(1, steps + 1):
        facts = {
            "train_seconds": step * 2.0, "tokens": step * 100, "supervised_items": step * 40,
            "micro_batch": 4, "replays": 0, "memory_bytes": 3 * GIB, "memory_peak_bytes": 4 * GIB,
            "memory_floor_bytes": GIB, "time": 1.7e9 + step,
        }  # fmt: skip
        rate = {"tokens_per_second": 50.0, "supervised_per_second": 20.0}
        own = {"loss": 2 + 1 / step, "learning_rate": 1e-4, "grad_norm": 0.5}
        found.append({"step": step, **own, **facts, **rate, **more})
        if step % every == 0:
            found.append({"step": step, "eval_loss": 2.5 - step / 200, "eval_accuracy": 0.5,
                          "eval_perplexity": 9.0, **facts})  # fmt: skip
    return found


PLAN = {
    "phases": [
        {"phase": "load", "device": {"weights": 2 * GIB}, "host": {"weights": GIB},
         "disk": {}, "disk_peak": 0, "note": ""},
        {"phase": "train", "device": {"weights": 2 * GIB, "activations": GIB}, "host": {},
         "disk": {"checkpoints": GIB}, "disk_peak": 2 * GIB, "note": "the longest micro-batch"},
    ],
    "budget_bytes": 6 * GIB, "peak_bytes": 3 * GIB, "low_bytes": int(2.9 * GIB),
    "high_bytes": int(3.2 * GIB), "basis": "measured 4 times here",
    "speed": {"tokens_per_second": 60.0},
}  # fmt: skip
RUN = {
    "task": "chat", "strategy": {"name": "lora", "rank": 8}, "base": "some-model",
    "device": "cpu", "dtype": "bfloat16", "quantize": "nf4", "parameters": 1000,
    "trained_parameters": 10, "versions": {"torch": "2.13.0"}, "mergeable": True,
    "training": {"steps": 60, "tokens": 6000, "tokens_per_second": 50.0, "train_seconds": 120.0,
                 "measured_peak_bytes": 4 * GIB},
    "measured": {"load": {"resident_bytes": None},
                 "train": {"resident_bytes": 3 * GIB, "live_bytes": 2.5 * GIB}},
    "metrics": {"loss": 2.2, "accuracy": 0.5}, "plan": PLAN,
}  # fmt: skip
SAMPLES = {
    "rows": [{"example": 3, "why": "the first", "pieces": [["Who? ", False], ["Me.", True]],
              "tokens": 5, "supervised": 2, "cut": False, "label": None}],
    "data": {"train": {"examples": 9, "tokens": 90, "longest": 17}},
    "notes": ["train: 2 rows were dropped"],
}  # fmt: skip
RECIPE = "model: /home/anna/big models/base\ntask: chat\ndata: {train: /srv/secret place/a.jsonl}\n"


def write_run(folder: Path, **files: Any) -> Path:
    """A run folder: `run`, `samples` (None leaves one out), `log` (lines or text), `recipe`."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {"recipe": RECIPE, "run": RUN, "samples": SAMPLES, "log": lines(60)} | files
    (folder / "recipe.yaml").write_text(given["recipe"], encoding="utf-8")
    for name in ("run", "samples"):
        if given[name] is not None:
            (folder / f"{name}.json").write_text(json.dumps(given[name]), encoding="utf-8")
    log = given["log"]
    if not isinstance(log, str):
        log = "".join(json.dumps(line) + "\n" for line in log)
    (folder / "metrics.jsonl").write_text(log, encoding="utf-8")
    return folder


def test_everything_a_run_tells_is_on_its_page(tmp_path: Path) -> None:
    page = read(write_report(write_run(tmp_path / "run")))
    assert headings(page) == [
        "training", "memory", "held-out-metrics", "data", "notes-and-warnings", "how-to-go-on",
        "recipe-and-environment",
    ]  # fmt: skip
    drawn = charts(page)
    assert [name.split(":")[0] for name in drawn] == [
        "Loss", "Held-out accuracy", "Throughput", "Learning rate", "Gradient norm", "Memory",
        "Memory by phase",
    ]  # fmt: skip
    # what is logged is with the libraries, what is planned and shown is without
    assert "resident, most since the line before from 3 GiB at step 1" in drawn[5]
    assert "resident, between steps from 2 GiB at step 1" in drawn[5]
    assert "planned, all tokens 60" in drawn[2]
    assert "planned peak 3 GiB; tensors, by the meter 2.50 GiB; budget 6 GiB" in drawn[5]
    assert "load 2 GiB, train 3 GiB, measured in train 3 GiB; budget 6 GiB" in drawn[6]
    for words in ("lora on some-model in nf4, task chat", "The held-out loss fell from 2.40",
                  "3 GiB (+0.0%)", "2.50 GiB", "the longest micro-batch",
                  "The plan's peak: 3 GiB, from 2.90 GiB to 3.20 GiB (measured 4 times here). ",
                  "The budget was 6 GiB.",
                  "train: 2 rows were dropped",
                  "qft eval", "qft merge", "qft export", "torch", "2.13.0", "held-out loss",
                  "10 (1 %)", "2 min"):  # fmt: skip
        assert words in page.words, words
    marked = re.findall(r"<mark>(.*?)</mark>", (tmp_path / "run/report.html").read_text("utf-8"))
    assert marked[1:] == ["Me."], "the first is the key"


def test_a_run_of_an_older_version_has_a_page(tmp_path: Path) -> None:
    old = [{"step": n, "loss": 3.0 - n / 10, "learning_rate": 1e-3} for n in range(1, 6)]
    run = {key: RUN[key] for key in ("task", "strategy", "base", "metrics")}
    page = read(write_report(write_run(tmp_path, run=run, samples=None, log=old)))
    assert [name.split(":")[0] for name in charts(page)] == ["Loss", "Learning rate"]
    assert "memory" not in headings(page)
    assert "data" not in headings(page)
    assert "The training loss fell from 2.90 at step 1 to 2.50 at step 5." in page.words


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    log = "".join(json.dumps(line) + "\n" for line in lines(30)) + '{"step": 31, "lo'
    page = read(write_report(write_run(tmp_path / "a run", run=None, log=log)))
    assert "not finished" in page.words
    assert "It has come to step 30 so far." in page.words
    assert "recipe.yaml' --resume" in page.words
    assert "qft merge" not in page.words
    empty = read(write_report(write_run(tmp_path / "new", run=None, log="")))
    assert "Nothing has been logged yet." in empty.words
    assert charts(empty) == []


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    log = [*lines(8), {"step": 9, "loss": None, "learning_rate": 1e-4}]
    folder = write_run(tmp_path, run=None, log=log)
    page = read(write_report(folder))
    assert "The loss was no longer a finite number at step 9." in page.words
    assert "step 9: training is not a finite number" in page.words, "the cross tells it"
    raw = "".join(json.dumps(line) + "\n" for line in lines(8))  # Python's own JSON says NaN
    write_run(tmp_path, run=None, log=raw + '{"step": 9, "loss": NaN}\n')
    assert "no longer a finite number at step 9" in read(write_report(folder)).words


def test_a_gpu_is_told_with_all_that_is_taken_of_it(tmp_path: Path) -> None:
    log = lines(4, memory_floor_bytes=0, memory_taken_bytes=5 * GIB)
    train = {"allocated_bytes": 3 * GIB, "reserved_bytes": 4 * GIB}
    phases = [{"phase": "train", "device": {"weights": 4 * GIB, "context": GIB}}]
    run = RUN | {"measured": {"train": train}, "plan": PLAN | {"phases": phases}}
    page = read(write_report(write_run(tmp_path, run=run, log=log)))
    names = charts(page)
    assert "allocated, most since the line before from 4 GiB" in names[4]
    assert "taken of the GPU in all from 5 GiB" in names[4]
    assert "measured in train 5 GiB" in names[5], "reserved, and the context as planned"
    assert "5 GiB (+0.0%)" in page.words
    assert "its libraries" not in page.words


def test_shortages_are_marked_and_told(tmp_path: Path) -> None:
    log = lines(12)
    for line in log[6:]:
        line["replays"] = 1
    page = read(write_report(write_run(tmp_path / "a", log=log, run=None)))
    assert "Step 7: memory ran out." in page.words
    marked = [name for name in charts(page) if "step 7: memory ran out" in name]
    assert [name.split(":")[0] for name in marked] == ["Loss", "Throughput", "Memory"]
    told = [{"step": 5, "what": "memory ran out, micro-batch is now 2"}, HOSTILE, {"step": "x"}]
    run = RUN | {"training": {**RUN["training"], "out_of_memory": told}}
    page = read(write_report(write_run(tmp_path / "b", log=log, run=run)))
    assert "Step 5: memory ran out, micro-batch is now 2." in page.words
    assert "Step 7" not in page.words, "what is told exactly is not guessed"


def test_a_plan_that_failed_says_why(tmp_path: Path) -> None:
    run = RUN | {"plan": {"failed": "no fakes of <this> family", "budget_bytes": 7 * GIB}}
    page = read(write_report(write_run(tmp_path, run=run)))
    assert "This job could not be planned: no fakes of <this> family" in page.words
    assert "budget 7 GiB" in next(name for name in charts(page) if name.startswith("Memory"))
    assert not any(name.startswith("Memory by phase") for name in charts(page))


def test_what_cannot_be_merged_is_not_told_to_be(tmp_path: Path) -> None:
    page = read(write_report(write_run(tmp_path, run=RUN | {"mergeable": False})))
    assert "qft merge" not in page.words


# --- distrust


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    samples = {
        "rows": [{"example": 1, "why": HOSTILE, "label": HOSTILE, "pieces": [[HOSTILE, True]] * 9,
                  "tokens": HOSTILE, "supervised": None, "cut": HOSTILE}],
        "data": {HOSTILE: {"examples": HOSTILE}}, "notes": [HOSTILE],
    }  # fmt: skip
    run = RUN | {
        "task": HOSTILE, "base": HOSTILE, "strategy": {"name": HOSTILE}, "device": HOSTILE,
        "versions": {HOSTILE: HOSTILE}, "metrics": {HOSTILE: 1.0},
        "plan": PLAN | {"phases": [{"phase": HOSTILE, "device": {HOSTILE: GIB}, "note": HOSTILE}]},
    }  # fmt: skip
    log = lines(12, **{f"eval_{HOSTILE}": 0.5, HOSTILE: 1.0})
    folder = write_run(tmp_path / "r", run=run, samples=samples, log=log, recipe=f"a: {HOSTILE!r}")
    page = read(write_report(folder))
    assert "<script>document.title='owned'</script>" in page.words
    assert "⟨202E⟩gnp.exe ␇␛[31m⟨D800⟩" in page.words, "what turns or steers is shown, not done"


def test_nothing_of_a_folder_is_believed(tmp_path: Path) -> None:
    """Whatever stands where: a page that holds together, or one clear error."""
    draw = random.Random(7)
    odd = [None, True, -1, 0, 1e308, -1e308, 1e99, 10**400, "text", HOSTILE, [], {}, [[[]]],
           {"a": {"b": []}}, {"loss": "x"}, math.nan, [{"phase": 3}], {"train": -5},
           [["x", True], ["y"], 4, None]]  # fmt: skip

    def spoiled(value: Any) -> Any:
        if draw.random() < 0.15:
            return draw.choice(odd)
        if isinstance(value, dict):
            return {key: spoiled(inner) for key, inner in value.items()}
        return [spoiled(inner) for inner in value] if isinstance(value, list) else value

    for number in range(40):
        folder = write_run(
            tmp_path / str(number), run=spoiled(RUN), samples=spoiled(SAMPLES),
            log=[spoiled(line) for line in lines(6, every=2)],
        )  # fmt: skip
        read(write_report(folder))


def test_a_page_stays_small(tmp_path: Path) -> None:
    word = "<&>" * 20_000
    samples = SAMPLES | {
        "rows": [{"pieces": [[word, True], *[["", False]] * 3000]}] * 20, "notes": [word] * 50,
    }  # fmt: skip
    log = lines(3000)
    run = RUN | {"metrics": {f"metric {n}": 0.5 for n in range(2000)},
                 "versions": {word: word} | {f"p{n}": "1" for n in range(2000)}}  # fmt: skip
    folder = write_run(tmp_path, run=run, samples=samples, log=log, recipe=f"model: '{word}'")
    read(write_report(folder))


def test_no_folders_and_no_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-very-own-token")
    home = str(Path.home())
    secrets = (
        f"{home}/data/x hf_{'A' * 30} https://me:pw@host/x a-very-own-token /home/anna/x/y.json"
    )
    samples = SAMPLES | {"notes": [secrets], "rows": [{"pieces": [[secrets, False]]}]}
    folder = write_run(tmp_path / "run", samples=samples, run=RUN | {"base": secrets})
    text = write_report(folder).read_text(encoding="utf-8")
    for secret in ("A" * 30, "me:pw", "a-very-own-token", str(tmp_path), "big models", "/srv",
                   "secret place"):  # fmt: skip
        assert secret not in text, secret
    assert re.search(rf"{re.escape(home)}(?![\w.])", text) is None
    assert "model: …/base" in text
    assert "train: …/a.jsonl" in text


def test_what_is_hidden_and_what_is_not() -> None:
    home = str(Path.home())
    assert without_folders("see /data/mine/rows.jsonl, and a/b") == "see …/rows.jsonl, and a/b"
    assert without_folders("https://host/a/b.html") == "https://host/a/b.html"
    assert without_folders("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert without_folders(r"C:\Users\anna\x\y.txt") == "…/y.txt"
    assert discreet(f"{home}/x and {home}ward") == f"~/x and {home}ward"
    assert last_part({"a": ["/x y/z w/b c", "~/q/r", 3, "plain"]}) == {
        "a": ["…/b c", "…/r", 3, "plain"]
    }
    assert (
        visible("a\tb\n👩\u200d👧 \u00a0\x85\u2028\x1c") == "a\tb\n👩\u200d👧 \u00a0⟨0085⟩⟨2028⟩␜"
    )


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", samples=None)
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps({"notes": ["from outside"]}), encoding="utf-8")
    (folder / "samples.json").symlink_to(outside)
    assert "from outside" not in read(write_report(folder)).words
    (folder / "recipe.yaml").unlink()
    (folder / "recipe.yaml").symlink_to(outside)
    with pytest.raises(QftError, match="no run folder"):
        write_report(folder)


def test_aliases_cannot_make_a_recipe_endless(tmp_path: Path) -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
        for old, new in zip("abcdefg", "bcdefgh", strict=True)
    )
    read(write_report(write_run(tmp_path, recipe=bomb)))


# --- the verb


def run_verb(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    monkeypatch.setattr("sys.argv", ["qft", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def test_the_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert run_verb(monkeypatch, "run") == 0
    assert capsys.readouterr().out == "run/report.html\n"
    assert "qft eval run" in read(folder / "report.html").words
    assert run_verb(monkeypatch, "run") == 0, "its own page is made anew"
    out = tmp_path / "new folder" / "page.html"
    assert run_verb(monkeypatch, folder, "--out", out, "--no-samples") == 0
    assert "Me." not in read(out).words
    capsys.readouterr()
    assert run_verb(monkeypatch, "run", "--out", folder / "run.json") == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert json.loads((folder / "run.json").read_text("utf-8")) == RUN


@pytest.mark.parametrize("kind", ["missing", "foreign", "file", "broken"])
def test_no_run_gives_one_error_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder = tmp_path / "x"
    if kind == "foreign":
        folder.mkdir()
        (folder / "notes.txt").write_text("mine", encoding="utf-8")
    if kind == "file":
        folder.write_text("text", encoding="utf-8")
    if kind == "broken":
        write_run(folder)
        (folder / "run.json").write_text('{"task": ', encoding="utf-8")
    assert run_verb(monkeypatch, folder) == (1 if kind == "broken" else 2)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert ("run.json" if kind == "broken" else "no run folder") in shown.err
    assert not (folder / "report.html").exists()


# --- pictures


def sizes(svg: str) -> list[tuple[str, float]]:
    """Fill and width of a picture's bars."""
    space = "{http://www.w3.org/2000/svg}"
    bars = [
        e for e in ET.fromstring(svg).iter(f"{space}rect") if e.find(f"{space}title") is not None
    ]
    return [(e.get("fill") or "", float(e.get("width") or 0)) for e in bars]


def test_bars_are_as_long_as_their_bytes() -> None:
    phases = [
        PhaseBytes("load", {"weights": 4 * GIB}),
        PhaseBytes("train", {"weights": 4 * GIB, "activations": 2 * GIB, "temporary": 0},
                   {"optimizer": GIB}),
        PhaseBytes("merge"),
    ]  # fmt: skip
    svg = plan_bars(phases, 8 * GIB)
    (first, load), (second, weights), (third, activations), (_, host) = sizes(svg)
    assert first == second != third, "a category has one colour"
    assert load == weights
    assert activations + 1 == pytest.approx((weights + 1) / 2, abs=0.2)  # 1 is between bars
    assert host + 1 == pytest.approx((weights + 1) / 4, abs=0.2)
    assert "merge" not in svg, "a phase without a byte has no bar"
    assert "budget 8 GiB" in svg
    assert "temporary" not in svg
    over = plan_bars(phases, 5 * GIB)
    assert 'class="q-over">6 GiB' in over
    assert "q-over" not in svg.split("</style>")[1]
    far = plan_bars(phases, 100 * GIB)
    assert sizes(far)[0][1] > load, "a budget far away does not make slivers of the bars"
    assert "budget 100 GiB" in far
    told = [{"phase": p.phase, "device": p.device, "host": p.host} for p in phases]
    assert plan_bars(told, 8 * GIB) == svg, "a plan that was read from JSON"
    ET.fromstring(plan_bars([], None))
    ET.fromstring(plan_bars([PhaseBytes("<&\x00", {'"\u202e': 5})], 0))


def test_a_line_goes_where_its_values_are() -> None:
    space = "{http://www.w3.org/2000/svg}"
    chart = LineChart(
        "T", [Series("a", [(0, 0.0), (10, 100.0), (20, 50.0)])], from_zero=True,
        limits=[Limit("b", 100.0), Limit("far", 1000.0)],
    )  # fmt: skip
    drawn = ET.fromstring(chart.draw())
    path = next(e.get("d") or "" for e in drawn.iter(f"{space}path"))
    (x0, y0), (x1, y1), (x2, y2) = [
        tuple(map(float, place.split())) for place in path.lstrip("M").split("L")
    ]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(2 * (y0 - y2), abs=0.2)
    level = next(e for e in drawn.iter(f"{space}line") if e.get("class") == "q-level")
    assert float(level.get("y1") or 0) == pytest.approx(y1, abs=0.1)
    assert sum(e.get("class") == "q-level" for e in drawn.iter()) == 1
    assert "far 1,000, above" in chart.draw()


def test_a_gap_stays_a_gap() -> None:
    space = "{http://www.w3.org/2000/svg}"
    points = [(1, 1.0), (2, 2.0), (3, None), (4, 1.0), (5, 2.0)]
    drawn = ET.fromstring(LineChart("T", [Series("a", points)]).draw())
    lines_drawn = [e for e in drawn.iter(f"{space}path") if e.get("fill") == "none"]
    assert len(lines_drawn) == 2


def test_thinning_keeps_the_extremes() -> None:
    points = [(float(n), math.sin(n)) for n in range(5000)]
    points[1234] = (1234.0, 9.0)
    points[4321] = (4321.0, -9.0)
    kept = thinned(points)
    assert len(kept) <= 300
    assert (1234.0, 9.0) in kept
    assert (4321.0, -9.0) in kept
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    flat = smoothed([(float(n), 1.0 + (-1) ** n) for n in range(100)], 20)
    assert all(0.8 < (y or 0) < 1.2 for _, y in flat[10:])


def test_numbers_are_short_and_tell_their_unit() -> None:
    values = (4, 4.9, 0.3, 0.01, 0.00034, 2e-4, 9.996, 1234.5, 0, math.nan, -2.5)
    assert [short(v) for v in values] == [
        "4", "4.90", "0.300", "0.0100", "3.40e-4", "2e-4", "10.0", "1,234", "0", "not a number",
        "-2.50",
    ]  # fmt: skip
    assert [bytes_text(v) for v in (0, 512, 1536, 12 * GIB, 11.04 * GIB)] == [
        "0 B", "512 B", "1.50 KiB", "12 GiB", "11.0 GiB",
    ]  # fmt: skip
    assert ByteUnit.of(3 * GIB).text(GIB / 2) == "0.50 GiB"
    assert [compact(v) for v in (4096, 12_345, 8_798_208)] == ["4,096", "12.3 k", "8.8 M"]
    assert [duration_text(v) for v in (1.5, 75, 3600, 14_820)] == [
        "1.50 s", "1 min 15 s", "1 h", "4 h 7 min",
    ]  # fmt: skip
    assert nice_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(1, 3, whole=True) == [1, 2, 3]
    assert tick_texts([0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert tick_texts([0, 5e-5, 1e-4]) == ["0", "5e-5", "1e-4"]
    assert tick_texts([0, 250_000, 500_000]) == ["0", "250k", "500k"]


# --- a training


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a real training, on rows that mean harm."""
    folder = tmp_path_factory.mktemp("report")
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(9)]
    harm = "<script>document.title='owned'</script><img src='http://127.0.0.1:9/x' onerror='x()'>"
    rows += [{"prompt": f"{harm} \u202e{n}", "completion": "no <b>harm</b> & done"} for n in "abc"]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = qft.build_recipe({
        "model": str(tiny_llama), "task": "instruct",
        "data": {"train": str(path), "eval_share": 0.2},
        "strategy": {"name": "lora", "rank": 2}, "dtype": "float32", "device": "cpu",
        "memory": {"checkpointing": "none", "budget": "500MiB"},
        "train": {"max_steps": 6, "batch_size": 4, "max_length": 256, "log_every": 1,
                  "eval_every": 3},
        "output": str(folder / "run"),
    })  # fmt: skip
    return Path(qft.train(recipe).folder)


def test_a_training_ends_with_its_page(trained: Path, tmp_path: Path) -> None:
    page = read(trained / "report.html")
    assert {"training", "memory", "held-out-metrics", "data", "how-to-go-on"} <= set(headings(page))
    drawn = {name.split(":")[0] for name in charts(page)}
    assert {"Loss", "Throughput", "Learning rate", "Memory"} <= drawn
    assert "budget 500 MiB" in next(name for name in charts(page) if name.startswith("Memory"))
    assert "<script>document.title='owned'</script>" in page.words, "the longest row is shown"
    text = (trained / "report.html").read_text(encoding="utf-8")
    marked = re.findall(r"<mark>([^<]*harm[^<]*)</mark>", text)
    assert set(marked) == {"no &lt;b&gt;harm&lt;/b&gt; &amp; done&lt;/s&gt;"}
    assert str(trained.parent) not in text
    again = write_report(trained, tmp_path / "again.html")
    assert again.read_text(encoding="utf-8").count("<svg") == text.count("<svg")


def test_each_logged_line_tells_memory_and_rates(trained: Path) -> None:
    log = [json.loads(line) for line in (trained / "metrics.jsonl").read_text("utf-8").splitlines()]
    own = [line for line in log if "loss" in line]
    assert [line["step"] for line in own] == [1, 2, 3, 4, 5, 6]
    for line in own:
        assert line["memory_peak_bytes"] >= line["memory_bytes"]
        assert line["memory_floor_bytes"] > 0
        assert line["tokens_per_second"] > line["supervised_per_second"] > 0
        assert 1 <= line["micro_batch"] <= 4
        assert line["replays"] == 0
    report = json.loads((trained / "run.json").read_text("utf-8"))["training"]
    assert own[-1]["tokens"] == report["tokens"]
    assert own[-1]["train_seconds"] == report["train_seconds"]
    # the rates between two lines add up to all of the tokens
    seconds = [0.0, *(line["train_seconds"] for line in own)]
    spent = [after - before for before, after in pairwise(seconds)]
    tokens = sum(line["tokens_per_second"] * s for line, s in zip(own, spent, strict=True))
    assert tokens == pytest.approx(report["tokens"])
    assert not any("tokens_per_second" in line for line in log if "eval_loss" in line)


def test_a_line_of_a_gpu_tells_its_own_peak_and_all_that_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from qft.phase_peaks import PhasePeaks
    from qft.progress import QUIET
    from qft.run_watch import RunWatch

    marks = {"allocated": 0, "reserved": 0}
    for name, value in {
        "max_memory_allocated": lambda: marks["allocated"],
        "max_memory_reserved": lambda: marks["reserved"],
        "reset_peak_memory_stats": lambda: marks.update(allocated=2 * GIB, reserved=3 * GIB),
        "memory_allocated": lambda: 2 * GIB,
        "memory_reserved": lambda: 3 * GIB,
        "mem_get_info": lambda: (20 * GIB, 24 * GIB),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    peaks = PhasePeaks("cuda")
    watch = RunWatch(None, tmp_path / "log", "cuda", QUIET, peaks)  # type: ignore[arg-type]
    peaks.enter("train")
    marks |= {"allocated": 5 * GIB, "reserved": 6 * GIB}
    first = watch._memory()
    assert first == {
        "memory_bytes": 2 * GIB, "memory_floor_bytes": 0, "memory_peak_bytes": 5 * GIB,
        "memory_taken_bytes": 6 * GIB + GIB // 2,  # the context is not more than half of one
    }  # fmt: skip
    marks |= {"allocated": 4 * GIB}
    with peaks.phase("evaluate"):  # the mark is set back on the way
        pass
    assert watch._memory()["memory_peak_bytes"] == 4 * GIB
    assert watch._memory()["memory_peak_bytes"] == 2 * GIB
    assert peaks.process_peak_bytes() == 5 * GIB, "of the whole run"
    assert peaks.report()["train"] == {"allocated_bytes": 5 * GIB, "reserved_bytes": 6 * GIB}


def test_a_page_that_cannot_be_made_does_not_cost_the_training(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qft import training
    from qft.progress import Reporter

    def fails(folder: Path) -> Path:
        raise ValueError("no page today")

    said: list[str] = []
    reporter = Reporter()
    monkeypatch.setattr(reporter, "say", said.append)
    monkeypatch.setattr(training, "write_report", fails)
    training._write_page(trained, reporter)
    assert said == ["note: no report.html was written: no page today"]


def test_samples_of_rows_with_one_label(tiny_bert: Path) -> None:
    from qft.data.tasks import Example, ExampleSet
    from qft.report.samples import _shown, chosen_rows

    class Tokenizer:
        def decode(self, ids: list[int], **settings: Any) -> str:
            return " ".join(map(str, ids))

    class Opened:
        tokenizer = Tokenizer()

        def __init__(self, rows: ExampleSet) -> None:
            self.train = rows

    one = Example(0, {"input_ids": [5, 6, 7], "labels": 1})
    several = Example(1, {"input_ids": [5, 6, 7], "labels": [1.0, 0.0, 1.0]})
    number = Example(2, {"input_ids": [5, 6], "labels": 0.25})
    for example, rows, expected in (
        (one, ExampleSet([one], ("bad", "good")), "good"),
        (several, ExampleSet([several], ("a", "b", "c"), labels_are="many"), "a, c"),
        (number, ExampleSet([number], labels_are="number"), "0.25"),
    ):
        shown = _shown(example, Opened(rows))  # type: ignore[arg-type]
        assert shown["label"] == expected
        assert not any(supervised for _, supervised in shown["pieces"]), "no token is a label"
    rows = [Example(n, {"input_ids": [1] * n, "labels": [-100] * (n - 1) + [1] * (n != 4)})
            for n in range(2, 9)]  # fmt: skip
    assert [(why, e.index) for why, e in chosen_rows(rows)] == [
        ("the first", 2), ("from the middle", 5), ("the longest", 8),
        ("the fewest supervised tokens", 4),
    ]  # fmt: skip


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Tab]:
    binary = find_chromium()
    if binary is None:
        pytest.skip("there is no Chromium: install one, or name it in QFT_CHROMIUM")
    with chromium(binary) as tab:
        yield tab


@pytest.mark.parametrize("width, dark", [(1280, False), (390, False), (1280, True)])
def test_a_browser_shows_the_page(
    browser: Tab, trained: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    path = tmp_path / "page.html"
    shutil.copy(trained / "report.html", path)
    browser.open(path, width=width, dark=dark)
    assert browser.complaints == []
    assert browser.requests == [path.as_uri()], "nothing but the page itself is asked for"
    assert browser.value("document.title") == "lora on tiny-llama0, task instruct · qft report"
    assert browser.value("document.scripts.length") == 0
    assert browser.value("document.images.length") == 0
    boxes = browser.value(
        "[...document.querySelectorAll('svg')].map(s => {const b = s.getBoundingClientRect();"
        "return [b.width, b.height, b.left, b.right]})"
    )
    assert len(boxes) >= 5
    for wide, high, left, right in boxes:
        assert wide > 250
        assert high > 150
        assert left >= 0
        assert right <= width
    assert browser.value("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    back, ink = browser.value(
        "(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))"
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (back, ink)]
    assert (light[0] < light[1]) is dark
    # words of a chart do not leave it
    outside = browser.value(
        "[...document.querySelectorAll('svg')].flatMap(s => {const f = s.getBoundingClientRect();"
        "return [...s.querySelectorAll('text')].filter(t => {const b = t.getBoundingClientRect();"
        "return b.left < f.left - 1 || b.right > f.right + 1 || b.bottom > f.bottom + 1})"
        ".map(t => t.textContent)})"
    )
    assert outside == []


def test_a_browser_would_complain_of_a_page_that_runs_something(
    browser: Tab, trained: Path, tmp_path: Path
) -> None:
    """The checks above can fail: the same page with a hole in it, and its policy."""
    hole = "<script>document.title='owned'</script><img src='http://127.0.0.1:9/x'>"
    text = (trained / "report.html").read_text(encoding="utf-8").replace("<main>", f"<main>{hole}")
    path = tmp_path / "hole.html"
    path.write_text(text, encoding="utf-8")
    browser.open(path)
    assert browser.value("document.title") != "owned", "the policy holds"
    assert len(browser.complaints) >= 2
    bare = re.sub(r"<meta http-equiv[^>]*>", "", text)
    path.write_text(bare, encoding="utf-8")
    browser.open(path)
    assert browser.value("document.title") == "owned"
    assert "http://127.0.0.1:9/x" in browser.requests


def test_a_plan_with_long_names_stays_in_its_frame(browser: Tab, tmp_path: Path) -> None:
    names = [f"a category with a long name {n}" for n in range(12)]
    phases = [PhaseBytes("a phase of many words", dict.fromkeys(names, GIB)),
              PhaseBytes("x", {}, {"activations": 12 * GIB})]  # fmt: skip
    path = tmp_path / "plan.svg"
    path.write_text(plan_bars(phases, 12 * GIB), encoding="utf-8")
    browser.open(path, width=600)
    assert browser.complaints == []
    outside = browser.value(
        "(f => [...document.querySelectorAll('text')].filter(t => {const b = "
        "t.getBoundingClientRect(); return b.left < f.left || b.right > f.right})"
        ".map(t => t.textContent))(document.documentElement.getBoundingClientRect())"
    )
    assert outside == []
