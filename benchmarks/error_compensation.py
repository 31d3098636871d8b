"""What the compressed-tensors formats cost, and what error compensation gives back.

    python benchmarks/error_compensation.py ASSETS

`ASSETS` holds `data/` and `models/mini-6m`. The model is written as w8a8, w8a16 and w4a16, the last
rounded to nearest with the scales of the largest weight (as compressed-tensors does unasked), to
nearest with searched scales, and fitted to 128 rows of kinds the model has seen in training, drawn
by three seeds. Each folder is opened by plain transformers with the compressed-tensors library and
judged on three sets of text that the model has not seen: Kullback-Leibler divergence from the
float32 model, and loss. Lines go to benchmarks/results/error_compensation.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.sparsity import seen_texts, unseen_texts
from qft import models
from qft.calibration import Calibration
from qft.export import integer_plan
from qft.export.formats import write_format
from qft.hardware import environment
from qft.merging.merge import open_source

RESULTS = Path(__file__).parent / "results" / "error_compensation.jsonl"
SEEDS = (0, 1, 2)
ROWS, LENGTH = 128, 256
JUDGED = 60  # texts of each kind
Sets = dict[str, list[tuple[Tensor, Tensor]]]  # token ids, and what the reference makes of them
Judged = dict[str, dict[str, float]]


def encoded(folder: Path, texts: list[str]) -> list[Tensor]:
    """Token ids, ``[1, length]`` each; what is too short to predict anything is left out."""
    tokenizer = models.open_tokenizer(folder)
    found = [tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"] for text in texts]
    return [torch.tensor([ids]) for ids in found if len(ids) > 1]


def calibration(folder: Path, texts: list[str], seed: int) -> Calibration:
    """Rows drawn by a seed, in batches of eight of like length."""
    rows = encoded(folder, random.Random(seed).sample(texts, ROWS))
    rows.sort(key=lambda ids: -ids.shape[1])
    batches = []
    for begin in range(0, len(rows), 8):
        part = rows[begin : begin + 8]
        ids = torch.zeros(len(part), part[0].shape[1], dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(part):
            ids[place, : row.shape[1]] = row[0]
            mask[place, : row.shape[1]] = 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return Calibration(tuple(batches), len(rows), "seen texts", f"seed {seed}")


@torch.no_grad()
def predicted(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities of what follows each token but the last, ``[length - 1, vocabulary]``."""
    found: Tensor = model(ids).logits[0, :-1].log_softmax(-1)
    return found


def judged(model: nn.Module, sets: Sets) -> Judged:
    """Means over all tokens but the first of each text."""
    found: Judged = {}
    for name, texts in sets.items():
        divergence = loss = 0.0
        count = 0
        for ids, wanted in texts:
            own = predicted(model, ids)
            divergence += float((wanted.exp() * (wanted - own)).sum())
            loss -= float(own.gather(1, ids[0, 1:, None]).sum())
            count += len(own)
        found[name] = {"kl": divergence / count, "loss": loss / count}
    return found


@contextmanager
def largest_weight_scales() -> Iterator[None]:
    """Scales as the library makes them: the largest weight over half the number of steps."""

    def find(rows: Tensor, grid: Any, dtype: torch.dtype, importance: Any = None) -> Tensor:
        grouped = rows.float().unflatten(1, (grid.groups(rows.shape[1]), -1))
        scales: Tensor = grouped.abs().amax(-1) / ((grid.most - grid.least) / 2)
        return scales.to(dtype)

    with mock.patch.object(integer_plan, "find_scales", find):
        yield


def measured(
    folder: Path, sets: Sets, format: str, rows: Calibration | None = None
) -> dict[str, Any]:
    """Writes, opens with plain transformers, and judges."""
    from transformers import AutoModelForCausalLM

    source = open_source(folder, models.open_skeleton(folder, models.ModelSpec(str(folder))))
    with tempfile.TemporaryDirectory() as room:
        out = Path(room) / "out"
        begin = time.process_time()
        report = write_format(source, format, out, calibration=rows)
        spent = time.process_time() - begin
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        found = judged(model, sets)
    return {"sets": found, "cpu_seconds": round(spent, 2), "bytes": report.bytes}


def lines(assets: Path) -> Iterator[dict[str, Any]]:
    """One line a way of rounding and seed; the last one compares."""
    from transformers import AutoModelForCausalLM

    folder, data = assets / "models/mini-6m", assets / "data"
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sets = {
        name: [(ids, predicted(plain, ids)) for ids in encoded(folder, texts[:JUDGED])]
        for name, texts in unseen_texts(data).items()
    }
    seen = seen_texts(data)
    yield {"way": "float32", "sets": judged(plain, sets)}
    for kind in ("w8a8", "w8a16"):
        yield {"way": kind, **measured(folder, sets, f"compressed-tensors:{kind}")}
    format = "compressed-tensors:w4a16"
    with largest_weight_scales():
        yield {"way": "w4a16, scales of the largest weight", **measured(folder, sets, format)}
    nearest = measured(folder, sets, format)
    yield {"way": "w4a16, searched scales", **nearest}
    fitted = []
    for seed in SEEDS:
        fitted.append(measured(folder, sets, format, calibration(folder, seen, seed)))
        yield {"way": "w4a16, fitted to rows", "seed": seed, **fitted[-1]}
    yield {"way": "fitted against searched scales", "sets": compared(nearest, fitted)}


def compared(nearest: dict[str, Any], fitted: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean gain by set, beside twice the standard deviation over the seeds.

    Rounding to nearest has no seed, and so no deviation; the other side's own is taken, which is
    larger than both pooled.
    """
    found: dict[str, Any] = {}
    for name, before in nearest["sets"].items():
        for measure in ("kl", "loss"):
            after = [run["sets"][name][measure] for run in fitted]
            gain = before[measure] - statistics.mean(after)
            bound = 2 * statistics.stdev(after)
            found[f"{name} {measure}"] = {
                "gain": gain, "twice_the_deviation": bound, "clearly_better": gain > bound,
            }  # fmt: skip
    return found


def main() -> None:
    """Runs all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("assets", type=Path)
    assets = parser.parse_args().assets
    torch.set_num_threads(1)
    told = {"date": date.today().isoformat(), "environment": environment()}
    with RESULTS.open("w", encoding="utf-8") as file:
        for line in lines(assets):
            print(json.dumps(line), flush=True)
            file.write(json.dumps({"benchmark": "error compensation", **line, **told}) + "\n")


if __name__ == "__main__":
    main()
