"""Pruned and healed: what is lost, and what training on the unpruned model's word brings back.

    python benchmarks/healing.py MODELS DATA [--steps 150]

mini-6m without a quarter of its parameters, once by depth and once by width, healed by `qft heal`
on 600 stories (of which it has seen 99 %): everything trains, half of the loss towards the labels
and half towards the cached unpruned model; beside it the same without a teacher. Perplexity on 150
other stories, in blocks of 128 tokens, of the unpruned, the pruned and the healed model. A line a
chain goes to benchmarks/results/healing.jsonl, which is written anew.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import qft
from qft.hardware import environment

RESULTS = Path(__file__).parent / "results" / "healing.jsonl"
PRUNED: dict[str, dict[str, Any]] = {
    "depth": {"method": "depth", "ratio": 0.25},
    "width": {"method": "width", "ratio": 0.25},
}


def chain(
    base: Path,
    files: Mapping[str, str],
    prune: Mapping[str, Any],
    taught: bool,
    steps: int,
    out: Path,
) -> dict[str, Any]:
    """One `qft heal`; its figures."""
    full: dict[str, Any] = {"name": "full"}
    if taught:
        full = {"name": "distill", "teacher": str(base), "student": full, "weight": 0.5}
    return qft.heal(qft.build_recipe({
        "model": str(base), "task": "text", "data": dict(files), "prune": dict(prune),
        "strategy": full, "dtype": "float32",
        "train": {"max_steps": steps, "batch_size": 16, "max_length": 128, "learning_rate": 1e-3,
                  "eval_every": 10**6, "save_every": 10**6},
        "export": ["gguf:f16"],
        "output": str(out),
    }))  # fmt: skip


def main() -> None:
    """Runs the chains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    chosen = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stories = chosen.data / "text/tinystories_1000/tinystories_1000.json"
        texts = json.loads(stories.read_text("utf-8"))
        random.Random(0).shuffle(texts)
        files = {}
        for part, rows in (("train", texts[:600]), ("eval", texts[600:750])):
            files[part] = str(folder / f"{part}.jsonl")
            Path(files[part]).write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
        for kind, prune in PRUNED.items():
            for taught in (True, False):
                out = folder / f"{kind}-{taught}"
                found = chain(chosen.models / "mini-6m", files, prune, taught, chosen.steps, out)
                row = {"benchmark": "healing", "date": date.today().isoformat(), "prune": prune,
                       "taught": taught, "steps": chosen.steps, **found,
                       "environment": environment()}  # fmt: skip
                lines.append(json.dumps(row) + "\n")
                worth = {n: found[n]["metrics"]["perplexity"] for n in found}
                print(kind, "taught" if taught else "labels alone", worth, flush=True)
    RESULTS.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
