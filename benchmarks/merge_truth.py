"""What a merge keeps of what was trained: every way out of base and adapter, measured.

    python benchmarks/merge_truth.py train MODELS DATA WORK
    python benchmarks/merge_truth.py measure WORK

`MODELS` holds the folders mini-6m and stories260K, `DATA` the folder text/tinyshakespeare, which
neither model has seen; `WORK` keeps the adapters, so that they can be measured again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import qft

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
    for name, part in (("train", text[:-_HELD_OUT_BYTES]), ("eval", text[-_HELD_OUT_BYTES:])):
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


def main() -> None:
    """Trains or measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    training = verbs.add_parser("train")
    training.add_argument("models", type=Path)
    training.add_argument("data", type=Path)
    training.add_argument("work", type=Path)
    chosen = parser.parse_args()
    train_all(chosen.models, chosen.data, chosen.work)


if __name__ == "__main__":
    main()
