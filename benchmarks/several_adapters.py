"""Two real adapters combined in every way: what each way keeps of either task.

    python benchmarks/several_adapters.py MODELS DATA [--steps 100] [--seeds 0,1,2]

mini-6m with a LoRA (rank 16, all linear layers) for each of two tasks it has not seen: French
captions (Multi30k, English to French) and descriptions of restaurants (E2E). Both are trained on
1,600 rows, the same steps and learning rate. Then `qft merge A B` by every method, on the weights
and on the factors, with the weights 1 and 1, and 0.5 and 0.5, and some densities; the mean loss of
the answers' tokens on 200 held-out captions and 128 held-out meanings (none of their meanings is
trained on). A line a seed, adapter or combination goes to
benchmarks/results/several_adapters.json, which is written anew, and a table to the terminal.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import qft
from qft.hardware import environment

RESULTS = Path(__file__).parent / "results" / "several_adapters.json"
TASKS = ("french", "restaurants")
COLUMNS: dict[str, str | int] = {"prompt": "prompt", "completion": "completion"}
TRAINED_ROWS = 1600
SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
SHARES = ((1.0, 1.0), (0.5, 0.5))


def french(data: Path) -> tuple[list[Any], list[Any]]:
    """Rows to train on, and rows held out."""
    files = [data / f"translation/multi30k/{name}.jsonl" for name in ("train", "val")]
    rows = [[json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in files]
    train, held_out = ([
        {"prompt": f"Translate to French: {row['en']}", "completion": row["fr"]} for row in part
    ] for part in rows)  # fmt: skip
    return train, held_out[:200]


def restaurants(data: Path) -> tuple[list[Any], list[Any]]:
    """The same of E2E's test split, split by meaning."""
    texts: dict[str, list[str]] = {}
    for line in (data / "nlg/e2e/test.txt").read_text("utf-8").splitlines():
        meaning, _, text = line.partition("||")
        texts.setdefault(meaning.strip(), []).append(text.strip())
    meanings = sorted(texts)
    random.Random(0).shuffle(meanings)
    held_out = [{"prompt": m, "completion": texts[m][0]} for m in meanings[:128]]
    train = [{"prompt": m, "completion": t} for m in meanings[128:] for t in texts[m]]
    return train, held_out


def write_rows(data: Path, folder: Path) -> None:
    """Two files a task."""
    for task, rows in (("french", french(data)), ("restaurants", restaurants(data))):
        train, held_out = rows
        random.Random(0).shuffle(train)
        for kind, part in (("train", train[:TRAINED_ROWS]), ("dev", held_out)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (folder / f"{task}-{kind}.jsonl").write_text(text, encoding="utf-8")


def train(base: Path, folder: Path, task: str, seed: int, steps: int) -> Path:
    """One adapter."""
    out = folder / f"{task}-{seed}"
    qft.train(qft.build_recipe({
        "model": str(base), "task": "instruct", "dtype": "float32",
        "data": {"train": str(folder / f"{task}-train.jsonl"),
                 "eval": str(folder / f"{task}-dev.jsonl"), "columns": COLUMNS},
        "strategy": {"name": "lora", "rank": 16},
        "train": {"max_steps": steps, "batch_size": 16, "max_length": 192, "learning_rate": 2e-3,
                  "seed": seed, "eval_every": 10**6, "save_every": 10**6},
        "output": str(out),
    }))  # fmt: skip
    return out


def losses(model: Path, folder: Path) -> dict[str, float]:
    """Held-out loss of each task."""
    found = {}
    for task in TASKS:
        told = qft.evaluate(
            str(model), data=str(folder / f"{task}-dev.jsonl"), task="instruct", columns=COLUMNS,
            max_length=192, dtype="float32",
        )  # fmt: skip
        found[task] = float(told["loss"])
    return found


def ways(seed: int) -> Iterator[dict[str, Any]]:
    """Every combination of the table."""
    for weights in SHARES:
        yield {"space": "weights", "method": "linear", "weights": weights}
        yield {"space": "factors", "method": "linear", "weights": weights}
        yield {"space": "factors", "method": "svd", "weights": weights}
    for space in ("weights", "factors"):
        for method in SPARSE:
            for density in (0.2, 0.5):
                drawn = {"seed": seed} if method.startswith("dare") else {}
                yield {"space": space, "method": method, "weights": (1.0, 1.0),
                       "density": density, **drawn}  # fmt: skip


def run(base: Path, folder: Path, seed: int, steps: int) -> Iterator[dict[str, Any]]:
    """All rows of one seed."""
    pair = [train(base, folder, task, seed, steps) for task in TASKS]
    for task, adapter in zip(TASKS, pair, strict=True):
        yield {"seed": seed, "model": f"{task} alone", **losses(adapter, folder)}
    for way in ways(seed):
        out = folder / "merged"
        qft.merge(pair, out, combine=way, overwrite=True)
        yield {"seed": seed, "model": "both", **way, **losses(out, folder)}


def name_of(row: dict[str, Any]) -> str:
    """What a row of the table is called."""
    if "method" not in row:
        return str(row["model"])
    density = f", density {row['density']}" if "density" in row else ""
    shares = " / ".join(f"{w:g}" for w in row["weights"])
    return f"{row['method']}, {row['space']}, {shares}{density}"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Means and standard deviations over the seeds, in Markdown."""
    lines = ["| model | French | restaurants | mean |", "|---|---|---|---|"]
    for name in dict.fromkeys(name_of(row) for row in rows):
        held = [row for row in rows if name_of(row) == name]
        cells = [[row[task] for row in held] for task in TASKS]
        cells.append([statistics.mean(row[task] for task in TASKS) for row in held])
        shown = (
            f"{statistics.mean(cell):.3f}"
            + (f" ± {statistics.stdev(cell):.3f}" if len(cell) > 1 else "")
            for cell in cells
        )
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines


def main() -> None:
    """Runs all seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", default="0,1,2")
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, base = Path(name), chosen.models / "mini-6m"
        write_rows(chosen.data, folder)
        rows.append({"seed": None, "model": "the base", **losses(base, folder)})
        for seed in (int(part) for part in chosen.seeds.split(",")):
            for row in run(base, folder, seed, chosen.steps):
                rows.append(row)
                print(f"{time.process_time():.0f}s", name_of(row),
                      *(f"{row[task]:.3f}" for task in TASKS), flush=True)  # fmt: skip
    result = {
        "benchmark": "several_adapters", "date": date.today().isoformat(), "steps": chosen.steps,
        "trained_rows": TRAINED_ROWS, "cpu_seconds": round(time.process_time()), "rows": rows,
        "environment": environment(),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
