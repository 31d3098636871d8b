"""Width pruning: every layer loses MLP neurons, heads or hidden channels of least importance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from qft.errors import RecipeError
from qft.pruning.anatomy import Sizes
from qft.pruning.cut import Cut, all_layers
from qft.pruning.plan import Job, Plan, no_target
from qft.pruning.pruned_tensors import PrunedTensors
from qft.pruning.targets import Cost, parse_width, read_target, require_reached, widths_for
from qft.pruning.width_scores import (
    IMPORTANCE,
    WidthScores,
    groups_of,
    kept_by_layer,
    score_width,
    strongest,
)

_DRY_RATIOS = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)


def plan_width(job: Job) -> Plan:
    """Every layer becomes narrower: MLP neurons, heads or hidden channels of least importance."""
    settings, sizes = job.settings, job.anatomy.sizes
    if settings.layers is not None:
        raise RecipeError("Width pruning leaves every layer.", where="--layers",
                          fix="--method depth")  # fmt: skip
    wanted, target = parse_width(settings.width), job.target()
    choices = _choices(job, wanted) if job.dry else []
    if target is None and None in wanted.values():
        if job.dry:
            return Plan(None, {}, choices, None)
        raise no_target("a size of each, such as --width mlp=512")
    after = widths_for(job.scale, wanted, target, settings.multiple_of)
    cost = job.scale.weigh(all_layers(sizes.layers), after)
    require_reached(job.scale, target, cost)
    if job.dry:
        return Plan(None, {}, [*choices, _choice(job, after, cost)], cost)
    _tell_of_quantizers(job, after)
    scores = _scores(job)
    cut = _cut(scores, sizes, after)
    facts = {"sizes": asdict(after), "kept_neurons": cut.neurons, "kept_groups": cut.groups,
             "kept_hidden": cut.hidden, "kept_importance": _shares(scores, cut, sizes)}  # fmt: skip
    return Plan(PrunedTensors(job.anatomy, cut), facts, [], cost)


def _tell_of_quantizers(job: Job, after: Sizes) -> None:
    """Blocks of 32 (GGUF's q8_0) or 256 (K-quants) must fill a row, or it is stored larger."""
    for name, size, before in (("MLP", after.neurons, job.anatomy.sizes.neurons),
                               ("hidden", after.hidden, job.anatomy.sizes.hidden)):  # fmt: skip
        lost = [block for block in (32, 256) if before % block == 0 and size % block]
        if lost:
            job.reporter.say(
                f"note: the {name} size {size} is no multiple of {lost[0]}, the block of GGUF's "
                f"{'q8_0' if lost[0] == 32 else 'K-quants'}; --multiple-of {max(lost)} would be"
            )


def _scores(job: Job) -> WidthScores:
    importance = job.settings.importance or IMPORTANCE[0]
    rows = job.require_rows()
    lost = job.anatomy.untrained_heads()
    if importance == "taylor" and lost:
        raise RecipeError(
            "Gradients of a head that was never trained say nothing.",
            where="--importance taylor",
            found=f"the model holds no weights of its {', '.join(lost)}",
            fix="--importance activation, or prune after training",
        )

    def compute() -> dict[str, Any]:
        found = score_width(job.anatomy, rows, importance, job.reporter)
        return {name: values.tolist() for name, values in vars(found).items()}

    kept = job.scores(f"width-{importance}", compute)
    return WidthScores(**{k: torch.tensor(v, dtype=torch.float64) for k, v in kept.items()})


def _cut(scores: WidthScores, before: Sizes, after: Sizes) -> Cut:
    layers = all_layers(before.layers)
    neurons: Mapping[int, tuple[int, ...]] = {}
    groups: Mapping[int, tuple[int, ...]] = {}
    if after.neurons < before.neurons:
        neurons = kept_by_layer(scores.neurons, after.neurons, layers)
    if after.groups < before.groups:
        groups = kept_by_layer(groups_of(scores, before.groups), after.groups, layers)
    hidden = strongest(scores.hidden, after.hidden) if after.hidden < before.hidden else None
    return Cut(layers, neurons, groups, hidden)


def _shares(scores: WidthScores, cut: Cut, before: Sizes) -> dict[str, Any]:
    """Of each layer's importance the share that stays; every single score would be megabytes."""
    found: dict[str, Any] = {}
    by_group = groups_of(scores, before.groups)
    for name, kept, values in (("neurons", cut.neurons, scores.neurons),
                               ("groups", cut.groups, by_group)):  # fmt: skip
        if kept:
            found[name] = [float(values[n][list(k)].sum() / values[n].sum())
                           for n, k in kept.items()]  # fmt: skip
    if cut.hidden is not None:
        found["hidden"] = float(scores.hidden[list(cut.hidden)].sum() / scores.hidden.sum())
    return found


def _choices(job: Job, wanted: Mapping[str, int | None]) -> list[dict[str, Any]]:
    whole, layers = job.scale.whole(), all_layers(job.anatomy.sizes.layers)
    rows = []
    for ratio in _DRY_RATIOS if None in wanted.values() else ():
        try:
            target = read_target(whole, ratio, None, None)
            after = widths_for(job.scale, wanted, target, job.settings.multiple_of)
        except RecipeError:
            break  # and no larger share either
        rows.append(_choice(job, after, job.scale.weigh(layers, after)))
    return rows


def _choice(job: Job, after: Sizes, cost: Cost) -> dict[str, Any]:
    row = {"neurons": after.neurons, "heads": after.heads, "hidden": after.hidden}
    return {**row, **asdict(cost), "share": cost.parameters / job.scale.whole().parameters}
