"""What a merge keeps of what was trained: every way out of base and adapter, measured.

    python benchmarks/merge_truth.py train MODELS DATA WORK
    python benchmarks/merge_truth.py measure WORK
    python benchmarks/merge_truth.py tables

`MODELS` holds the folders mini-6m and stories260K, `DATA` the folder text/tinyshakespeare, which
neither model has seen; `WORK` keeps the adapters, so that they can be measured again. The base is
the model in bfloat16 (stories260K is stored in float32). `measure` writes
benchmarks/results/merge_truth.json, and `tables` prints it; the ways are in merge_ways.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from torch import Tensor

import qft
from benchmarks import merge_ways as ways
from qft.export.delivery import export
from qft.hardware import environment

RESULTS = Path(__file__).parent / "results" / "merge_truth.json"
WAYS = ("bf16-dequantized", "bf16-original", "nf4-original", "nf4-fused", "nf4-beside")
MODELS = ("mini-6m", "stories260K")
BASES = {"nf4": "nf4", "bf16": "none"}  # what the adapter is trained on → `quantize`
SEEDS = (0, 1, 2)
MAX_LENGTH = 128
_HELD_OUT_BYTES = 60_000
_PIECE_BYTES = 2_000


@dataclass(frozen=True)
class Strength:
    """How strongly an adapter is trained."""

    steps: int
    learning_rate: float


STRENGTHS = {"gently": Strength(40, 2e-4), "strongly": Strength(100, 2e-3)}


@dataclass(frozen=True)
class Job:
    """One training."""

    model: str
    base: str
    strength: str
    seed: int

    @property
    def name(self) -> str:
        """Of its run folder."""
        return f"{self.model}-{self.base}-{self.strength}-{self.seed}"


def jobs() -> Iterator[Job]:
    """All of them."""
    for seed in SEEDS:
        for model in MODELS:
            for base in BASES:
                for strength in STRENGTHS:
                    yield Job(model, base, strength, seed)


def write_rows(data: Path, work: Path) -> None:
    """Pieces of Shakespeare; the last 60 kB, which follow the others, are held out."""
    text = (data / "text/tinyshakespeare/input.txt").read_text("utf-8")
    held_out = text[-_HELD_OUT_BYTES:]
    for name, part in (("train", text[:-_HELD_OUT_BYTES]), ("eval", held_out),
                       ("few", held_out[:_PIECE_BYTES])):  # fmt: skip
        pieces = [part[i : i + _PIECE_BYTES] for i in range(0, len(part), _PIECE_BYTES)]
        random.Random(0).shuffle(pieces)
        lines = (json.dumps({"text": piece}) + "\n" for piece in pieces)
        (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_bf16(source: Path, folder: Path) -> None:
    """The model with its tensors in bfloat16: the original, to all that follows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16").save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def train(job: Job, work: Path) -> dict[str, float]:
    """Trains one adapter; its held-out metrics."""
    strength = STRENGTHS[job.strength]
    recipe = qft.build_recipe({
        "model": str(work / job.model),
        "task": "text",
        "data": {"train": str(work / "train.jsonl"), "eval": str(work / "eval.jsonl")},
        "strategy": {"name": "lora", "rank": 16},
        "quantize": BASES[job.base],
        "dtype": "bfloat16",
        "train": {"max_steps": strength.steps, "learning_rate": strength.learning_rate,
                  "batch_size": 16, "max_length": MAX_LENGTH, "seed": job.seed,
                  "eval_every": 10**6, "save_every": 10**6},
        "output": str(work / "runs" / job.name),
    })  # fmt: skip
    return qft.train(recipe, overwrite=True).metrics


def train_all(models: Path, data: Path, work: Path) -> None:
    """Every adapter that is not there yet."""
    work.mkdir(parents=True, exist_ok=True)
    write_rows(data, work)
    for model in MODELS:
        if not (work / model).is_dir():
            write_bf16(models / model, work / model)
    for job in jobs():
        if not (work / "runs" / job.name / "adapter").is_dir():
            print(job.name, f"{train(job, work)['loss']:.4f}", flush=True)


def measure(job: Job, work: Path) -> list[dict[str, Any]]:
    """Every way of one adapter: a row each."""
    run, original = work / "runs" / job.name, work / job.model
    quantized = work / f"{job.model}-nf4"
    if not quantized.is_dir():
        export(original, quantized, format="bnb:nf4", verify=False)
    whole, rounded = ways.stored_weights(original), ways.stored_weights(quantized)
    seen = whole if job.base == "bf16" else rounded
    changes = ways.changes_of(run / "adapter")
    judge = ways.Judge(original, run)
    trained = judge.refer_to(ways.added(seen, changes))
    known = {**asdict(job), "change_over_nf4_error": _size(changes) / _size(
        {name: rounded[name] - whole[name] for name in changes})}  # fmt: skip
    rows = [{**known, "way": "untrained", **judge.judge(seen)},
            {**known, "way": "unmerged", "loss": trained, "kl": 0.0, "top1": 1.0}]  # fmt: skip
    for way in WAYS:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            out = Path(folder) / "out"
            report = ways.write_way(way, run, quantized, work / "few.jsonl", out)
            stored = ways.read_way(way, out)
        base = whole if way.endswith("original") else rounded
        plain = {"nf4-original": rounded}.get(way, base)
        if way == "nf4-fused":
            plain = ways.requantized(rounded, changes)
        lost = ways.rounding(base, changes, plain, stored)
        _require_agreement(way, lost, report.get("delta_rounding") or {})
        rows.append({**known, "way": way, **judge.judge(stored), **lost})
    return rows


def _size(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))


def _require_agreement(
    way: str, found: Mapping[str, float], told: Mapping[str, float] | None
) -> None:
    """What qft itself reports of Δ's rounding is what is measured here."""
    for key in found if told else ():
        if abs(found[key] - (told or {})[key]) > 0.01 * max(1.0, abs(found[key])):
            raise SystemExit(f"{way}: {key} is {found[key]}, and qft reports {(told or {})[key]}")


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown: mean ± standard deviation over the seeds.

    A way's loss is given as what it is above the unmerged one of the same adapter.
    """
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        key = (row["model"], row["strength"], row["base"], row["way"])
        found.setdefault(key, []).append(row)
    loss = [["loss", "untrained", "unmerged", *WAYS]]
    near = [["mean KL; top-1", *WAYS]]
    left = [["rounding; kept", *WAYS]]
    for case in itertools.product(MODELS, STRENGTHS, BASES):
        name = f"{case[0]}, {case[1]}, on {case[2]}"
        unmerged, ways_of = found[(*case, "unmerged")], [found[(*case, way)] for way in WAYS]
        loss.append([
            name, *(_cell([r["loss"] for r in found[(*case, way)]]) for way in loss[0][1:3]),
            *(_cell([r["loss"] - u["loss"] for r, u in zip(way, unmerged, strict=True)], sign="+")
              for way in ways_of),
        ])  # fmt: skip
        near.append([name, *(_pair(way, "kl", 4, "top1", 3) for way in ways_of)])
        left.append([name, *(_pair(way, "rounding", 2, "kept", 2) for way in ways_of)])
    return "\n\n".join(_markdown(table) for table in (loss, near, left))


def _markdown(table: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])


def _pair(rows: Sequence[Mapping[str, Any]], one: str, digits: int, other: str, more: int) -> str:
    first, second = ([row[key] for row in rows] for key in (one, other))
    return f"{_cell(first, digits)}; {_cell(second, more)}"


def _cell(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    mean = round(statistics.mean(values), digits) + 0.0  # no -0.000
    return f"{mean:{sign}.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def measure_all(work: Path) -> None:
    """Measures every adapter that is there and was not measured; writes the results anew."""
    rows: list[dict[str, Any]] = []
    for job in jobs():
        file = work / "runs" / job.name / "measured.json"
        if not (file.parent / "adapter").is_dir():
            continue
        if not file.is_file():
            file.write_text(json.dumps(measure(job, work)), encoding="utf-8")
        rows += json.loads(file.read_text("utf-8"))
        print(job.name, {r["way"]: round(r["loss"], 4) for r in rows[-7:]}, flush=True)
    result = {
        "benchmark": "merge_truth",
        "date": date.today().isoformat(),
        "strengths": {name: asdict(strength) for name, strength in STRENGTHS.items()},
        "strategy": {"name": "lora", "rank": 16},
        "seeds": list(SEEDS),
        "environment": environment(),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Trains, measures or prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, places in (("train", ("models", "data", "work")), ("measure", ("work",)),
                         ("tables", ())):  # fmt: skip
        command = verbs.add_parser(verb)
        for place in places:
            command.add_argument(place, type=Path)
    chosen = parser.parse_args()
    if chosen.verb == "train":
        train_all(chosen.models, chosen.data, chosen.work)
    elif chosen.verb == "measure":
        measure_all(chosen.work)
    else:
        print(tables(json.loads(RESULTS.read_text("utf-8"))["rows"]))


if __name__ == "__main__":
    main()
