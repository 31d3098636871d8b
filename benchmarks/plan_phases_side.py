"""One phase of a training in a process of its own: what it held above its imports.

    python -m benchmarks.plan_phases_side < CASE

`CASE` is a JSON object: `phase`; `recipe` of the job, whose rows are imagined; `adapter` and `out`,
folders for merge and export. The last line of what is printed is the report. The imports, and one
small model opened the same way, come before the peak is reset.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import qft.export.delivery
import qft.training
from benchmarks.peers.channel import peak_bytes, reset_peak, resident_bytes
from qft import models
from qft.checkpoints import save_checkpoint
from qft.data.tasks import TASKS
from qft.evaluation import evaluate
from qft.lean.engine import Savers
from qft.lean.meter import Meter
from qft.planning.job import PlannedJob, imagined_inputs, planned_job
from qft.preparation import prepare
from qft.recipe import build_recipe

Run = Callable[[], Any]


def job_of(case: dict[str, Any]) -> PlannedJob:
    """The case's job, with imagined rows."""
    recipe = build_recipe(case["recipe"])
    return planned_job(recipe, imagined_inputs(recipe, Path(recipe.model)), "cpu")


def opened(job: PlannedJob) -> torch.nn.Module:
    """Its model, as training opens it."""
    recipe, ready = job.recipe, job.ready
    model = models.open_model(job.inputs.base, ready.spec, ready.needs.full_precision)
    return prepare(
        model, recipe.strategy, checkpointing=recipe.memory.checkpointing,
        savers=Savers(**recipe.memory.savers.model_dump()), context=ready.context,
    )  # fmt: skip


def touched(model: torch.nn.Module) -> int:
    """Reads one number a page, so that weights that are a file's own pages are there."""
    found = 0
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            step = 4096 // tensor.element_size()
            found += int(tensor.detach().reshape(-1)[::step].isnan().sum())
    return found


def loading(case: dict[str, Any], job: PlannedJob) -> Run:
    """Opens the model and looks at all of it."""

    def run() -> object:
        model = opened(job)
        touched(model)
        return model

    return run


def evaluation(case: dict[str, Any], job: PlannedJob) -> Run:
    """One batch; the model is opened within, so that its weights count."""

    def run() -> object:
        model = opened(job)
        touched(model)
        reset_peak()  # loading has a case of its own
        rows = job.inputs.train.examples
        with Meter(model) as counting:
            evaluate(model, rows, TASKS[job.recipe.task], pad_token_id=0)
        return counting.reading().peak_bytes

    return run


def saving(case: dict[str, Any], job: PlannedJob) -> Run:
    """A checkpoint after the optimizer's first step on gradients of zeros."""
    from transformers import TrainerState

    def run() -> object:
        model = opened(job)
        touched(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        reset_peak()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        save_checkpoint(Path(case["out"]), 1, model=model, strategy=job.recipe.strategy,
                        optimizer=optimizer, scheduler=scheduler, trainer_state=TrainerState(),
                        card={})  # fmt: skip
        return None

    return run


def merging(case: dict[str, Any], job: PlannedJob) -> Run:
    """As `qft merge`."""
    return lambda: qft.export.delivery.merge(
        case["adapter"], case["out"], base=case["recipe"]["model"]
    )


def exporting(case: dict[str, Any], job: PlannedJob) -> Run:
    """As `qft export --no-verify`."""
    format = case["phase"].partition(":")[2]
    return lambda: qft.export.delivery.export(
        case["adapter"], case["out"], base=case["recipe"]["model"], format=format, verify=False
    )


RUNS = {"load": loading, "evaluate": evaluation, "save": saving, "merge": merging,
        "export": exporting}  # fmt: skip


def warm_up(case: dict[str, Any]) -> None:
    """A small model goes the same way first: what is imported late is imported then."""
    small = {**case, **case["warm_up"]}
    with tempfile.TemporaryDirectory() as scratch:
        small["out"] = str(Path(scratch) / "out")
        RUNS[case["phase"].partition(":")[0]](small, job_of(small))()


def main() -> None:
    """Runs the phase once and reports."""
    case = json.load(sys.stdin)
    warm_up(case)
    run = RUNS[case["phase"].partition(":")[0]](case, job_of(case))
    qft.lean.trunk.give_back()
    gc.collect()
    reset_peak()
    imports, began = resident_bytes(), time.process_time()
    result = run()
    report = {
        "imports_bytes": imports,
        "peak_bytes": peak_bytes() - imports,
        "after_bytes": resident_bytes() - imports,
        "live_bytes": result if isinstance(result, int) else None,
        "cpu_seconds": time.process_time() - began,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
