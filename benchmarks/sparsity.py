"""What zeros cost: perplexity by method and pattern, and the memory that pruning takes.

    python benchmarks/sparsity.py ASSETS [--only quality memory]

`ASSETS` holds `data/` and `models/mini-6m`. *Quality*: half of the weights of all linear layers, as
a share and as 2:4, by each method; calibrated on 128 rows of kinds the model has seen in training,
drawn by three seeds; judged on texts it has not seen. *Memory*: one layer of the 8B shape, random
weights, on real tensors, counted by the meter; layers follow one another, so that a whole model
takes no more. Lines go to benchmarks/results/sparsity.jsonl, which is written anew for what is run.
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

import torch

import qft
from qft.bench.shapes import SHAPES
from qft.hardware import environment
from qft.lean.meter import Meter
from qft.models import ModelSpec
from qft.pruning.anatomy import open_anatomy
from qft.pruning.sparse_layers import by_sparsegpt, by_wanda, prune_layers
from qft.pruning.sparse_targets import sparse_targets
from qft.pruning.sparsity import Sparsity

RESULTS = Path(__file__).parent / "results" / "sparsity.jsonl"
ASKED: dict[str, dict[str, Any]] = {"50 %": {"ratio": 0.5}, "2:4": {"pattern": "2:4"}}
SEEDS = (0, 1, 2)
CALIBRATED = ("wanda", "sparsegpt")
ROWS, LENGTH = 128, 256


def write_texts(path: Path, texts: list[str]) -> str:
    """Texts as a jsonl file; its name."""
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return str(path)


def seen_texts(data: Path) -> list[str]:
    """As many rows each of stories, captions, sums and descriptions, as in the training."""
    stories = json.loads((data / "text/tinystories_1000/tinystories_1000.json").read_text("utf-8"))
    lines = (data / "translation/multi30k/train.jsonl").read_text("utf-8").splitlines()
    captions = [f"{row['en']}\n{row['de']}" for row in map(json.loads, lines)]
    lines = (data / "math/gsm8k/train.jsonl").read_text("utf-8").splitlines()
    sums = [f"{row['question']}\n{row['answer']}" for row in map(json.loads, lines)]
    descriptions = (data / "nlg/e2e/valid.txt").read_text("utf-8").splitlines()
    drawn = random.Random(0)
    kinds = (stories, captions, sums, descriptions)
    return [text for kind in kinds for text in drawn.sample(kind, 400)]


def unseen_texts(data: Path) -> dict[str, list[str]]:
    """Three sets that the model has not seen: articles, captions, sentences of film reviews."""
    wiki = (data / "text/wikitext2/valid.txt").read_text("utf-8").splitlines()
    captions = (data / "translation/multi30k/val.jsonl").read_text("utf-8").splitlines()
    reviews = (data / "sentiment/sst2/dev.tsv").read_text("utf-8").splitlines()
    return {
        "wikitext2": [line.strip() for line in wiki if len(line) > 300][:150],
        "multi30k": [f"{row['en']}\n{row['de']}" for row in map(json.loads, captions)][:500],
        "sst2": [line.partition("\t")[0] for line in reviews][:500],
    }


def perplexities(model: str, sets: dict[str, str]) -> dict[str, float]:
    """On every set, over its tokens."""
    return {
        name: qft.evaluate(model, data=path, task="text", max_length=LENGTH, dtype="float32",
                           too_long="truncate")["perplexity"]
        for name, path in sets.items()
    }  # fmt: skip


def quality(assets: Path) -> Iterator[dict[str, Any]]:
    """A line a pruned model, and the model as it is."""
    model = str(assets / "models/mini-6m")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sets = {n: write_texts(folder / f"{n}.jsonl", texts)
                for n, texts in unseen_texts(assets / "data").items()}  # fmt: skip
        seen = write_texts(folder / "seen.jsonl", seen_texts(assets / "data"))
        yield {"method": "none", "asked": "none", "perplexity": perplexities(model, sets)}
        for asked, settings in ASKED.items():
            for method in ("magnitude", *CALIBRATED):
                for seed in SEEDS if method in CALIBRATED else SEEDS[:1]:
                    started = time.process_time()
                    report = qft.prune(
                        model, folder / "out", method=method, data=seen, task="text", seed=seed,
                        calibration_rows=ROWS, max_length=LENGTH, dtype="float32", report=False,
                        overwrite=True, **settings,
                    )  # fmt: skip
                    yield {
                        "method": method, "asked": asked, "seed": seed, **report["layers"],
                        "cpu_seconds": time.process_time() - started,
                        "perplexity": perplexities(str(folder / "out"), sets),
                    }  # fmt: skip


def means(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Mean and standard deviation over the seeds."""
    for method, asked in dict.fromkeys((row["method"], row["asked"]) for row in rows):
        found = [r["perplexity"] for r in rows if (r["method"], r["asked"]) == (method, asked)]
        yield {
            "method": method, "asked": asked, "seeds": len(found),
            "mean_perplexity": {n: statistics.fmean(f[n] for f in found) for n in found[0]},
            "sd_perplexity": {n: statistics.stdev(f[n] for f in found) if len(found) > 1 else None
                              for n in found[0]},
        }  # fmt: skip


def memory(_: Path) -> Iterator[dict[str, Any]]:
    """One layer of the 8B shape in bfloat16, with four rows of 256 tokens, two at a time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {k: v for k, v in SHAPES["llama-3.1-8b"].items() if k != "model_type"}
    config = LlamaConfig(**{**sizes, "num_hidden_layers": 1, "vocab_size": 512})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config).bfloat16()
        layer_bytes = sum(p.nbytes for p in model.model.layers[0].parameters())
        model.save_pretrained(folder / "model")
        del model
        spec = ModelSpec(str(folder / "model"), dtype=torch.bfloat16, device="cpu")
        anatomy = open_anatomy(folder / "model", spec)
        wanted = Sparsity(0.5)
        ids = torch.randint(1, 512, (2, 256), generator=torch.Generator().manual_seed(1))
        batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 2
        for method, by in (("wanda", by_wanda), ("sparsegpt", by_sparsegpt)):
            started = time.process_time()
            with Meter(device="cpu") as counting:
                prune_layers(anatomy, sparse_targets(anatomy, wanted), batches, by, wanted,
                             folder / method)  # fmt: skip
            peak = counting.reading().peak_bytes
            hidden = 4 * 256 * config.hidden_size * 2
            yield {
                "method": method, "shape": "llama-3.1-8b, one layer", "dtype": "bfloat16",
                "rows": 4, "length": 256, "rows_at_a_time": 2, "layer_bytes": layer_bytes,
                "hidden_bytes": hidden, "peak_bytes": peak,
                "above_layer_and_hidden_bytes": peak - layer_bytes - hidden,
                "largest_hessian_bytes": config.intermediate_size**2 * 4,
                "cpu_seconds": time.process_time() - started,
            }  # fmt: skip


PARTS = {"quality": quality, "memory": memory}


def main() -> None:
    """Runs the parts that are named, else both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    kept = []
    if RESULTS.is_file():
        kept = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
        kept = [row for row in kept if row["benchmark"].partition(" ")[2] not in arguments.only]
    told = {"date": date.today().isoformat(), "environment": environment()}
    for part in arguments.only:
        rows = []
        for row in PARTS[part](arguments.assets):
            rows.append({"benchmark": f"sparsity {part}", **row})
            print(json.dumps(rows[-1]), flush=True)
        if part == "quality":
            rows += [{"benchmark": "sparsity quality", **row} for row in means(rows)]
        kept += [row | told for row in rows]
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


if __name__ == "__main__":
    main()
