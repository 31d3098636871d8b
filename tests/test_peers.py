"""The instrument that compares toolkits, on tiny models, nothing timed; and the README's tables."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import redraw
from benchmarks.peers.blocks import UNSUPERVISED, digest, samples_of
from benchmarks.peers.cases import CASES, TINY, make_job
from benchmarks.peers.driver import (
    Side,
    SideError,
    Turns,
    agree,
    require_same_work,
    row_of,
    spread,
)
from benchmarks.peers.lineup import SIDES, lineup

QUIET = lambda text: None  # noqa: E731


@pytest.fixture(scope="module")
def job(assets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    return make_job(TINY, assets, folder, blocks=1), folder


@pytest.fixture(scope="module")
def finished(job):
    """Three sides after two blocks each."""
    values, folder = job
    split = Side("split", "plain", {"micro_batch": 1})
    with Turns([SIDES["plain"], split, SIDES["qft"]], values, folder, threads=1) as turns:
        turns.run(1, QUIET)
    return turns.sides


def test_plain_and_qft_do_the_same_work_to_the_same_loss(finished):
    require_same_work(finished)
    rows = [row_of(side) for side in finished]
    assert agree(rows)
    plain, alone, qft = rows
    assert [row["side"] for row in rows] == ["plain", "split", "qft"]
    assert plain["tokens"] == qft["tokens"] > 0
    assert alone["padding_share"] == 0
    assert plain["padding_share"] > 0
    assert 0 < plain["label_share"] == qft["label_share"] < 1
    for a, b in zip(plain["losses"], qft["losses"], strict=True):
        assert a == pytest.approx(b, rel=0.01)
    assert len(plain["losses"]) == 2 * TINY.steps
    assert plain["peak_bytes_above_imports"] > 0
    json.dumps(rows)


@pytest.mark.slow
def test_a_side_that_dies_gives_one_clear_error(job):
    values, folder = job
    broken = {**values, "tokens": str(folder / "nowhere.jsonl")}
    with (
        pytest.raises(SideError, match=r"plain: its process ended with code 1\.") as caught,
        Turns([SIDES["plain"]], broken, folder, threads=1),
    ):
        pass
    assert "nowhere.jsonl" in str(caught.value)


def test_other_labels_are_noticed(job, finished):
    values, folder = job
    lines = (folder / "tokens.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    place = next(i for i, label in enumerate(rows[0]["labels"]) if label != UNSUPERVISED)
    rows[0]["labels"][place] = UNSUPERVISED
    other = folder / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changed = Side("changed", "plain")
    with Turns([changed], {**values, "tokens": str(other)}, folder, threads=1) as turns:
        turns.run(1, QUIET)
    with pytest.raises(SideError, match="changed and plain did not train on the same samples"):
        require_same_work([finished[0], *turns.sides])


def test_samples_are_the_same_padded_and_packed():
    padded = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
        "labels": torch.tensor([[-100, 6, 7], [8, 9, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    packed = {
        "input_ids": torch.tensor([[8, 9, 5, 6, 7]]),
        "labels": torch.tensor([[-100, 9, -100, 6, 7]]),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2]]),
    }
    assert list(samples_of(padded)) == [([5, 6, 7], [-100, 6, 7]), ([8, 9], [-100, 9])]
    assert digest(list(samples_of(padded))) == digest(list(samples_of(packed)))
    padded["labels"][0, 2] = -100
    assert digest(list(samples_of(padded))) != digest(list(samples_of(packed)))


def test_percentiles_and_agreement():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == pytest.approx({"p20": 1.8, "p50": 3, "p80": 4.2})
    assert agree([{"final_loss": 2.0}, {"final_loss": 2.019}])
    assert not agree([{"final_loss": 2.0}, {"final_loss": 2.021}])


def test_a_trial_changes_the_options_of_a_known_side(tmp_path):
    side = lineup('mine=plain:{"micro_batch": 2, "environment": {"A": "b"}}', "x", tmp_path)
    assert (side.name, side.script) == ("mine", "plain")
    assert (side.options, side.environment) == ({"micro_batch": 2}, {"A": "b"})


# --- the README's tables


def test_the_committed_tables_are_what_redraw_makes_of_the_committed_results():
    for name, words in redraw.READMES.items():
        text = (redraw.REPOSITORY / name).read_text(encoding="utf-8")
        assert redraw.redrawn(text, redraw.readme_block(words)) == text, name
    path = redraw.REPOSITORY / "docs" / "speed.md"
    assert path.read_text(encoding="utf-8") == redraw.details()


def test_quoted_ratios_come_from_one_run_that_agrees():
    rows = redraw.read("peers.jsonl")
    assert tuple(CASES) == redraw.CASES
    for case in redraw.CASES:
        known = list(redraw.measured(redraw.latest(rows, case)).values())
        if known:
            redraw.require_comparable(known)


def row(side, speed, loss=5.0, run="r", case="alpaca-135m"):
    spreads = {"p20": speed - 1, "p50": speed, "p80": speed + 1}
    return {
        "benchmark": "peers", "case": case, "run": run, "side": side, "date": "2026-01-01",
        "commit": "c", "environment": {"cpu": "a CPU", "cores": 2}, "blocks": 5, "steps": 4,
        "batch": 4, "learning_rate": 1e-3, "threads": 2, "final_loss": loss, "first_loss": 9.0,
        "tokens_per_cpu_second": spreads, "tokens_per_second": spreads, "padding_share": 0.5,
        "peak_bytes_above_imports": 2**30,
        "settings": {"options": {}, "environment": {}},
    }  # fmt: skip


def write(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def test_the_table_takes_the_last_run_and_says_what_is_missing(tmp_path):
    missing = {**row("unsloth", 1, run="new"), "unavailable": "no compiler"}
    write(tmp_path, "peers.jsonl", [
        row("plain", 999, run="old"), row("plain", 100, run="new"),
        row("plain-best", 150, run="new"), missing, row("qft", 300, run="new"),
    ])  # fmt: skip
    block = redraw.readme_block(redraw.ENGLISH, tmp_path)
    assert "| 100 / 150 | – | – | 300 / – | 3.00 / – / 2.00 |" in block
    assert "999" not in block
    assert "no GPU was at hand" in block
    assert "cannot run here: no compiler" in redraw.details(tmp_path)


@pytest.mark.parametrize("loss, run", [(5.2, "r"), (5.0, "another")])
def test_what_does_not_compare_is_not_compared(tmp_path, loss, run):
    rows = [row("plain", 100), row("qft", 300, loss=loss, run=run)]
    with pytest.raises(ValueError):
        redraw.require_comparable(rows)


def test_claims_of_the_feature_cache_and_of_a_gpu_are_lines(tmp_path):
    sides = {"qft, cached": {"p50": 1.0}, "plain Trainer, best": {"p50": 30.0}}
    write(tmp_path, "feature_cache.jsonl", [{
        "what": "head", "plain": "best", "cpu_seconds_a_block": sides,
        "cpu_ratio": {"p50": 30.0}, "losses": {"a": [2.0, 1.0], "b": [2.0, 1.001]},
    }])  # fmt: skip
    gpu = {"benchmark": "throughput", "case": "8b", "device": "a GPU", "commit": "c",
           "predicted": False, "final_loss": 2.0}  # fmt: skip
    write(tmp_path, "gpu.jsonl", [{**gpu, "side": "qft", "p50": 300.0},
                                  {**gpu, "side": "unsloth", "p50": 200.0}])  # fmt: skip
    cached, fast = redraw.claims(redraw.ENGLISH, tmp_path)
    assert (cached.baseline, cached.ours, cached.ratio) == (
        "plain Trainer, best: 30.00 CPU s", "1.00 CPU s", "30.0",
    )  # fmt: skip
    assert fast.ratio == "1.50"


def test_a_text_without_markers_is_refused():
    with pytest.raises(ValueError, match="once each"):
        redraw.redrawn("no markers", "block")
    both = f"a {redraw.BEGIN} old {redraw.END} b"
    assert redraw.redrawn(both, f"{redraw.BEGIN} new {redraw.END}") == both.replace("old", "new")
