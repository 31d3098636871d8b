"""`plan`: will it fit, what it takes by phase and category, and what to change if it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qft import hardware
from qft.errors import WillNotFitError
from qft.files import free_disk_bytes
from qft.planning.afterwards import merge_and_export
from qft.planning.calibration import Calibration, Kind
from qft.planning.forecast import Forecast, as_dict, forecast, safe_peak, speed, train_phase
from qft.planning.job import PlannedJob
from qft.planning.maximize import maximize as find_largest
from qft.planning.maximize import smaller_that_fits
from qft.planning.opening import opened_job
from qft.planning.probe import probe as run_probe
from qft.planning.solver import Forecast as Forecaster
from qft.planning.solver import Remedy, Solution, solve
from qft.planning.speed import record_speed
from qft.planning.unseen import metered_bytes, record_step
from qft.progress import human_bytes
from qft.recipe import Recipe


def plan(
    recipe: Recipe,
    *,
    device: str = "auto",
    budget_bytes: int | None = None,
    maximize: str | None = None,
    exports: Sequence[str] = (),
    probe: bool = False,
    label_share: float = 1.0,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Says what a training would take, without a weight and, where they are not here, without rows.

    Args:
        recipe: from :func:`qft.load_recipe`, :func:`qft.build_recipe`, or
            :func:`qft.planning.opening.recipe_of` for a model alone.
        device: ``auto`` (what the recipe and this machine say), ``cpu`` or ``cuda``, which need not
            be here.
        budget_bytes: else `memory.budget`, else what is free on a device that is here.
        maximize: ``max_length``, ``batch_size`` or ``model``: the largest that fits.
        exports: formats whose writing is planned too, beside those of `export`.
        probe: also run a few real steps, and keep how far the plan was off.
        label_share: of the tokens of imagined rows.
        calibration: former measurements; None is this user's store.

    Returns:
        `fits` (None without a budget), `budget_bytes`, `peak_bytes` with `low_bytes` and
        `high_bytes`, `phases`, `changes` (ways that make it fit), `speed`, `disk_bytes`, and more.

    Raises:
        QftError: there is no such model, or the training would be refused.
    """
    store = Calibration() if calibration is None else calibration
    with opened_job(recipe, device, label_share) as (job, notes):
        measured = None
        if probe:
            measured = _probed(job, store)
        made = forecast(job, store)
        budget, whence = _budget(job, budget_bytes)
        after = merge_and_export(job, [*recipe.export, *exports])
        result = {
            "model": recipe.model,
            **_what_trains(job),
            **made.as_dict(),
            "device_name": hardware.device_name(job.device),
            "phases": [as_dict(phase) for phase in (*made.phases, *after)],
            "budget_bytes": budget,
            "budget_is": whence,
            "fits": None if budget is None else made.peak.expected <= budget,
            "close": budget is not None and made.peak.low <= budget < made.peak.high,
            "speed": None if (found := speed(made, store)) is None else asdict(found),
            **_disk(job, made, after),
            "probe": measured,
        }
        if budget is not None:
            result |= _changes(job, budget, store)
        if maximize is not None:
            limit = budget if budget is not None else _needs_budget()
            result["largest"] = asdict(find_largest(job, limit, safe_peak(store), maximize, True))
        result["notes"] = [*notes, *store.notes]
    return result


def _probed(job: PlannedJob, store: Calibration) -> dict[str, Any]:
    """Runs a few real steps in a process of their own, and keeps how far the plan was off."""
    found = run_probe(job, lambda probed: train_phase(forecast(probed, store)))
    seen = found.measured
    seen_bytes = (seen.live_bytes, seen.resident_bytes)
    record_step(found.probed, found.predicted, *seen_bytes, store, longest_only=True)
    record_speed(Kind.of(found.probed), seen.flops, seen.seconds, store)
    return {
        **asdict(seen),
        "predicted_live_bytes": metered_bytes(found.predicted),
        "predicted_bytes": found.predicted.peak_bytes,
        "random_weights": found.random_weights,
    }


def _what_trains(job: PlannedJob) -> dict[str, Any]:
    return {
        "strategy": job.recipe.strategy.name,
        "task": job.recipe.task,
        "parameters": sum(p.numel() for p in job.ready.skeleton.parameters()),
        "trained_parameters": job.ready.trained_parameters,
    }


def _budget(job: PlannedJob, asked: int | None) -> tuple[int | None, str]:
    """What the job may take, and who says so."""
    budget = job.recipe.memory.budget
    if asked is not None:
        return asked, "--memory"
    if isinstance(budget, int):
        return budget, "memory.budget"
    here = hardware.choose().device == job.device
    free = hardware.free_memory_bytes(job.device) if here else None
    return free, "free now"


def _needs_budget() -> int:
    raise WillNotFitError("Nobody knows how much memory there is.", where="--maximize",
                          fix="--memory 12GiB")  # fmt: skip


def _changes(job: PlannedJob, budget: int, calibration: Calibration) -> dict[str, Any]:
    peak = safe_peak(calibration)
    found = solve(job, budget, peak)
    return {
        "changes": [_remedy(remedy) for remedy in found.remedies],
        "smallest": None if found.smallest is None else _remedy(found.smallest),
        "instead": _instead(job, found, budget, peak),
        "refused": dict(found.refused),
    }


def _remedy(remedy: Remedy) -> dict[str, Any]:
    return {
        "words": remedy.words,
        "peak_bytes": remedy.peak_bytes,
        "costs": [step.change.cost for step in remedy.steps],
        "contrary": list(remedy.contrary),
    }


def _instead(job: PlannedJob, found: Solution, budget: int, peak: Forecaster) -> str | None:
    """What would fit where nothing makes this job fit: more memory, or a smaller model."""
    if found.nearest is not None or found.smallest is None:
        return None
    more = f"a budget of {human_bytes(found.smallest.peak_bytes)} with {found.smallest.words}"
    smaller = smaller_that_fits(job, budget, peak)
    if smaller is None:
        return more
    return f"{more}, or with {smaller.words} ({human_bytes(smaller.peak_bytes)})"


def _disk(job: PlannedJob, made: Forecast, after: Sequence[Any]) -> dict[str, Any]:
    phases = [*made.phases, *after]
    kept = sum(sum(phase.disk.values()) for phase in phases)
    most = max((phase.disk_peak for phase in phases), default=0)
    return {
        "disk_bytes": kept,
        "disk_peak_bytes": max(kept, most),
        "free_disk_bytes": free_disk_bytes(Path(job.recipe.output)),
    }
