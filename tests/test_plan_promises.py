"""A small benchmarks/plan_promises.py: what is planned is so when it is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plan_promises import came_through, drawn, judged, promised

SEEDS = (7, 13)  # stories260K: bytes that many a small thing would shift


def test_recipes_are_drawn_by_the_seed_alone():
    models = ("stories260K",)
    assert drawn(3, models) == drawn(3, models)
    assert len({str(drawn(seed, models)) for seed in range(20)}) == 20


@pytest.mark.parametrize(
    ("planned", "measured", "kept"), [(90, 95, True), (90, 110, False), (110, 105, True),
                                      (110, 95, False)],
)  # fmt: skip
def test_a_promise_is_kept_or_it_is_not(planned, measured, kept):
    said = {"planned_bytes": planned, "budget_bytes": 100, "said_to_fit": planned <= 100}
    found = {"live_bytes": measured, "resident_bytes": measured}
    row = judged({"live": said, "resident": said}, found)
    assert row["live"]["kept"] is row["resident"]["kept"] is kept


def test_who_shrinks_has_not_come_through():
    assert came_through({"micro_batch": 2, "replays": 0}, 2)
    assert not came_through({"micro_batch": 1, "replays": 0}, 2)
    assert not came_through({"micro_batch": 2, "replays": 1}, 2)
    assert not came_through({"refused": "too large"}, 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_live_bytes_are_as_planned(assets: Path, tmp_path: Path, seed):
    models = ("mini-6m", "mini-6m", "stories260K", "small-llama", "small-bert", "small-t5")
    row = promised(seed, assets, tmp_path, models, longest=128, enforced=False)
    assert row is not None
    live = row["live"]
    assert live["measured_bytes"] == pytest.approx(live["planned_bytes"], rel=0.01)
    assert live["kept"]
