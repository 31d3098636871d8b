"""What a cached teacher loses against one in memory: losses and gradients, on real text.

    python benchmarks/cache_gap.py MODELS DATA

Teacher: mini-6m. Student: the same with two layers cut out, as `qft prune --layers 2,3` leaves it.
Rows: sixty of GSM8K's test split, which neither has seen. One step over all of them, forward KL
alone, float32: loss, mean mass that is kept, and how far the gradient of all weights is from
the live teacher's (relative distance and cosine; of draws the mean of three seeds). A line a cache
goes to benchmarks/results/cache_gap.jsonl, which is written anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

import qft
from qft.data.tasks import pad_id
from qft.distillation.distilled_loss import DistilledLoss
from qft.distillation.lessons import Source
from qft.distillation.supply import live_source, settings_in
from qft.distillation.teach import TeacherCache
from qft.hardware import environment
from qft.inputs import open_inputs, spec_of
from qft.models import open_model
from qft.preparation import prepare
from qft.progress import QUIET
from qft.registry import build_strategy
from qft.step import accumulate_gradients
from qft.task_loss import TaskLoss

RESULTS = Path(__file__).parent / "results" / "cache_gap.jsonl"
CACHES: dict[str, dict[str, Any]] = {
    "k=8": {"top_k": 8}, "k=32": {"top_k": 32}, "k=128": {"top_k": 128},
    "k=V": {"top_k": 6144}, "k=V, float32": {"top_k": 6144, "cache_precision": "float32"},
    "16 draws": {"cache": "samples", "draws": 16}, "64 draws": {"cache": "samples", "draws": 64},
    "256 draws": {"cache": "samples", "draws": 256},
}  # fmt: skip


def recipe_of(
    student: Path, teacher: Path, rows: Path, folder: Path, seed: int, **cache: Any
) -> Any:
    """A training that is never run: its rows, its teacher and what is kept."""
    return qft.build_recipe({
        "model": str(student), "task": "instruct", "dtype": "float32",
        "data": {"train": str(rows), "columns": {"prompt": "question", "completion": "answer"}},
        "strategy": {"name": "distill", "teacher": str(teacher), "student": "full", "weight": 1.0,
                     **cache},
        "train": {"max_length": 512, "seed": seed},
        "output": str(folder / "run"),
    })  # fmt: skip


def gradient(recipe: Any, source: Source | None = None) -> tuple[float, torch.Tensor, Any]:
    """Loss and gradient of one step over all rows; the report of the cache, if it was one."""
    inputs, settings = open_inputs(recipe), settings_in(recipe)
    assert settings is not None
    report: dict[str, Any] = {}
    if settings.caches:
        cache = TeacherCache(recipe, settings, inputs, QUIET)
        source = cache.ready()
        report = cache.report
    else:
        source = live_source(recipe, settings, inputs, QUIET)
    model = prepare(open_model(inputs.base, spec_of(recipe)), build_strategy({"name": "full"}))
    loss = DistilledLoss(TaskLoss(), settings, source, inputs.task, model)
    result = accumulate_gradients(
        model, inputs.train.examples, inputs.task, step=1, micro_batch=4,
        pad_token_id=pad_id(inputs.tokenizer), loss=loss,
    )  # fmt: skip
    found = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
    return float(result.loss), found, report


def main() -> None:
    """Runs all caches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("data", type=Path)
    chosen = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher, student, rows = (
            chosen.models / "mini-6m",
            folder / "student",
            folder / "rows.jsonl",
        )
        source = next((chosen.data / "math/gsm8k").glob("test*"))
        rows.write_text("".join(source.read_text("utf-8").splitlines(keepends=True)[:60]), "utf-8")
        qft.prune(str(teacher), student, method="depth", layers="2,3", report=False)
        exact, wanted, _ = gradient(recipe_of(student, teacher, rows, folder, 0, cache="off"))
        for cache, settings in CACHES.items():
            seeds = (0, 1, 2) if "draws" in cache else (0,)
            losses, apart, cosines = [], [], []
            report: dict[str, Any] = {}
            for seed in seeds:
                job = recipe_of(student, teacher, rows, folder, seed, **settings)
                loss, found, report = gradient(job)
                losses.append(loss)
                apart.append(float((found - wanted).norm() / wanted.norm()))
                cosines.append(float(torch.cosine_similarity(found, wanted, dim=0)))
            row = {
                "benchmark": "cache_gap", "date": date.today().isoformat(), "cache": cache,
                "settings": settings, "tokens": report["rows"],
                "bytes_per_token": report["bytes_per_row"], "coverage": report.get("coverage"),
                "loss": statistics.mean(losses), "live_loss": exact, "seeds": len(seeds),
                "gradient_distance": statistics.mean(apart),
                "gradient_cosine": statistics.mean(cosines), "environment": environment(),
            }  # fmt: skip
            lines.append(json.dumps(row) + "\n")
            print({k: v for k, v in row.items() if k != "environment"}, flush=True)
    RESULTS.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
