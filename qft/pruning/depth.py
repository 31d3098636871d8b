"""Depth pruning: whole layers go, those named or those that change the hidden states least."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any

from qft.errors import RecipeError
from qft.pruning.cut import Cut, all_layers, without
from qft.pruning.depth_scores import DepthScores, least_influential, least_turning, score_layers
from qft.pruning.plan import Job, Plan, no_target
from qft.pruning.pruned_tensors import PrunedTensors
from qft.pruning.targets import Cost, layers_to_remove, require_reached

IMPORTANCE = ("influence", "angular")


def plan_depth(job: Job) -> Plan:
    """Whole layers go: those named, or those that change the hidden states least."""
    sizes, scale, settings = job.anatomy.sizes, job.scale, job.settings
    target = job.target()
    if settings.layers is not None:
        if target is not None:
            raise RecipeError("Named layers leave no choice for a target.", where="--layers",
                              found=target.text, fix="leave one of the two out")  # fmt: skip
        removed = parse_layers(settings.layers, sizes.layers)
        return _depth_plan(job, removed, None)
    if target is None and not job.dry:
        raise no_target("--layers 10-15")
    scores = None
    if job.rows is not None or not job.dry:
        rows = job.require_rows()
        scores = DepthScores(**job.scores("depth", lambda: asdict(
            score_layers(job.anatomy.folder, job.anatomy.spec, rows.batches(),
                         layers=sizes.layers, reporter=job.reporter))))  # fmt: skip
    choices = _depth_choices(job, scores)
    if target is None or scores is None:
        return Plan(None, {}, choices, None)
    removed = _chosen_layers(job, scores, layers_to_remove(scale, target))
    plan = _depth_plan(job, removed, scores)
    assert plan.cost is not None
    require_reached(scale, target, plan.cost)
    return replace(plan, choices=choices)


def _chosen_layers(job: Job, scores: DepthScores, count: int) -> tuple[int, ...]:
    choose = least_turning if job.settings.importance == "angular" else least_influential
    keep_first, keep_last = job.settings.keep_first, job.settings.keep_last
    return choose(scores, count, keep_first=keep_first, keep_last=keep_last)


def _depth_plan(job: Job, removed: tuple[int, ...], scores: DepthScores | None) -> Plan:
    sizes = job.anatomy.sizes
    cut = Cut(without(sizes.layers, removed))
    source = PrunedTensors(job.anatomy, cut)
    facts: dict[str, Any] = {"kept_layers": cut.layers, "removed_layers": removed}
    if scores is not None:
        facts["scores"] = asdict(scores)
    cost = job.scale.weigh(cut.layers, sizes)
    return Plan(source, facts, [_choice(job, cost, removed, scores)], cost)


def _depth_choices(job: Job, scores: DepthScores | None) -> list[dict[str, Any]]:
    sizes, settings = job.anatomy.sizes, job.settings
    free = sizes.layers - settings.keep_first - settings.keep_last
    rows = []
    for count in range(0, min(free, sizes.layers - 1) + 1):
        removed = None if scores is None else _chosen_layers(job, scores, count)
        kept = all_layers(sizes.layers - count)
        if removed is not None:
            kept = without(sizes.layers, removed)
        row = _choice(job, job.scale.weigh(kept, sizes), removed or (), scores)
        rows.append({"layers": len(kept), **row})
    return rows


def _choice(
    job: Job, cost: Cost, removed: tuple[int, ...], scores: DepthScores | None
) -> dict[str, Any]:
    row: dict[str, Any] = {**asdict(cost), "share": cost.parameters / job.scale.whole().parameters}
    if removed:
        row["removed_layers"] = removed
    if removed and scores is not None:
        if job.settings.importance == "angular":
            row["scores"] = [scores.distance[removed[0]][removed[-1] + 1]]
        else:
            row["scores"] = [scores.influence[layer] for layer in removed]
    return row


def parse_layers(text: str, count: int) -> tuple[int, ...]:
    """``10-15`` or ``3,7,10-12``: numbers of layers that go, from 0, in order.

    Raises:
        RecipeError: no such layers, or all of them.
    """
    removed: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first or last >= count:
            raise RecipeError(
                "There are no such layers.",
                where="--layers",
                found=f"{part.strip()}; the model has the layers 0 to {count - 1}",
                fix="numbers and ranges, such as 10-15 or 3,7,10-12",
            )
        removed |= set(range(first, last + 1))
    if len(removed) == count:
        raise RecipeError("A model needs at least one layer.", where="--layers", found=text)
    return tuple(sorted(removed))
