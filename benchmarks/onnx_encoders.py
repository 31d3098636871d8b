"""A fine-tuned sentence encoder in PyTorch and as ONNX: accuracy, KL, bytes, rows a CPU-second.

    python benchmarks/onnx_encoders.py DATA_FOLDER [--seeds 0 1 2]

`DATA_FOLDER` holds SST-2's train.tsv and dev.tsv (`sentence<TAB>label`, no header). MiniLM (extra
`demo`) is trained with LoRA (rank 16) on 1,200 sentences for one epoch, a run a seed. Each run is
exported to `onnx:fp32` and `onnx:int8`, which qft verifies on the 872 dev sentences; accuracy is
that of `qft eval` on the same ones. For speed the merged model in PyTorch (float32, SDPA) and
both ONNX files answer the same 256 sentences in the same batches on one thread, in blocks that
take turns in one process; what is told is the median of seven blocks each, after one to warm up.
Results: benchmarks/results/onnx_encoders.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qft
from benchmarks.sst2_minilm import recipe
from qft import models
from qft.export.delivery import export
from qft.files import folder_bytes, write_json
from qft.hardware import environment
from qft.verification.read_back import read_back

RESULTS = Path(__file__).parent / "results" / "onnx_encoders.json"
FORMATS = ("onnx:fp32", "onnx:int8")
BLOCKS = 7
SENTENCES = 256
COLUMNS: dict[str, str | int] = {"text": 0, "label": 1}


def train(data: Path, seed: int, folder: Path) -> Path:
    """A LoRA run; its loss must have fallen."""
    values = recipe(data, "lora", "none", folder / f"run-{seed}")
    values["train"] |= {"epochs": 1, "seed": seed}
    result = qft.train(qft.build_recipe(values))
    lines = (Path(result.folder) / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert losses[-1] < losses[0], "it learned nothing"
    return Path(result.folder)


def quality(run: Path, data: Path, folder: Path, seed: int) -> list[dict[str, Any]]:
    """Accuracy of the run in float32 and of both exports, and how far these are from it."""
    dev = str(data / "dev.tsv")
    scores = qft.evaluate(str(run), data=dev, columns=COLUMNS, dtype="float32")
    rows = [{"seed": seed, "format": "pytorch float32", "accuracy": scores["accuracy"],
             "loss": scores["loss"]}]  # fmt: skip
    for format in FORMATS:
        out = folder / f"{format.replace(':', '-')}-{seed}"
        found = export(run, out, format=format, data=dev)["verification"]
        scores = qft.evaluate(str(out), data=dev, columns=COLUMNS)
        rows.append({
            "seed": seed, "format": format, "accuracy": scores["accuracy"], "loss": scores["loss"],
            **{name: found[name] for name in ("mean_kl", "p99_kl", "top1", "max_difference")},
            "file_bytes": (out / "model.onnx").stat().st_size,
        })  # fmt: skip
    return rows


def batches(data: Path, folder: Path, size: int) -> list[dict[str, Tensor]]:
    """The first dev sentences, like lengths together, as a server would batch them."""
    tokenizer = models.open_tokenizer(folder)
    lines = (data / "dev.tsv").read_text(encoding="utf-8").splitlines()[:SENTENCES]
    texts = sorted((line.split("\t")[0] for line in lines), key=len)
    return [
        dict(tokenizer(texts[at : at + size], padding=True, return_tensors="pt"))
        for at in range(0, len(texts), size)
    ]


def speed(sides: dict[str, nn.Module], work: list[dict[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Sentences a second of CPU and of wall, each side in turn."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    with torch.no_grad():
        for _ in range(BLOCKS + 1):
            for name, model in sides.items():
                start = time.process_time(), time.perf_counter()
                for batch in work:
                    model(**batch)
                taken[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return {
        name: {
            "rows_per_cpu_second": SENTENCES / statistics.median(cpu for cpu, _ in blocks[1:]),
            "rows_per_second": SENTENCES / statistics.median(wall for _, wall in blocks[1:]),
            "cpu_seconds": [round(cpu, 4) for cpu, _ in blocks[1:]],
        }
        for name, blocks in taken.items()
    }


def main() -> None:
    """Trains, exports and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"quality": [], "speed": {}}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for seed in chosen.seeds:
            run = train(chosen.data, seed, folder)
            found["quality"] += quality(run, chosen.data, folder, seed)
            print(json.dumps(found["quality"][-3:], indent=1), flush=True)
        merged = folder / "merged"
        qft.merge(run, merged, dtype="float32")
        found["pytorch_file_bytes"] = folder_bytes(merged)
        sides = {"pytorch float32": models.open_model(merged, models.ModelSpec(
            str(merged), "classify", dtype=torch.float32))}  # fmt: skip
        sides |= {name: read_back(folder / f"{name.replace(':', '-')}-{seed}") for name in FORMATS}
        for size in (1, 8, 32):
            found["speed"][f"batch {size}"] = speed(sides, batches(chosen.data, merged, size))
        print(json.dumps(found["speed"], indent=1), flush=True)
    write_json(RESULTS, {"benchmark": "onnx_encoders", **found, "environment": environment()})


if __name__ == "__main__":
    main()
