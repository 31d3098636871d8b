"""The demo's training with three seeds: the gain over the base, and its spread.

    python benchmarks/demo_seeds.py

Writes qft/demo/result.json (what `qft demo` prints beside its own single seed) and appends a line
to benchmarks/results/demo_seeds.jsonl. The gain is in nats a token on held-out modules; the base is
one model and has no spread, so the standard deviation is that of the fine-tuned models alone.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
from datetime import date
from pathlib import Path

from qft.demo.docstrings import TEST_MODULES, TRAIN_MODULES, rows
from qft.demo.job import BASE, COMMITTED, demo_recipe
from qft.files import write_json, write_text
from qft.hardware import environment
from qft.models import fingerprint
from qft.progress import Reporter
from qft.scoring import evaluate
from qft.training import train

RESULTS = Path(__file__).parent / "results" / "demo_seeds.jsonl"
SEEDS = (0, 1, 2)


def main() -> None:
    """Measures the base once, trains every seed, and writes the result."""
    reporter = Reporter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts = {}
        for part, modules in (("train", TRAIN_MODULES), ("test", TEST_MODULES)):
            found, _ = rows(modules)
            counts[part] = len(found)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
            write_text(folder / f"{part}.jsonl", text)
        first = demo_recipe(folder, SEEDS[0])
        before = evaluate(first.model, data=first.data.eval, task=first.task,
                       max_length=first.train.max_length, too_long=first.data.too_long)  # fmt: skip
        losses = []
        for seed in SEEDS:
            recipe = demo_recipe(folder, seed).model_copy(
                update={"output": str(folder / f"run-{seed}")}
            )
            losses.append(train(recipe, reporter=reporter).metrics["loss"])
    gains = [before["loss"] - loss for loss in losses]
    spread = statistics.stdev(losses)
    result = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "rows": counts,
        "base_fingerprint": fingerprint(BASE),
        "base_loss": before["loss"],
        "losses": losses,
        "gains_nats": gains,
        "mean_gain_nats": statistics.mean(gains),
        "pooled_sd_nats": spread,
        "clearly_better": statistics.mean(gains) > 2 * spread,
        "environment": environment(),
    }
    write_json(COMMITTED, result)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"benchmark": "demo_seeds", **result}) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=2))


if __name__ == "__main__":
    main()
