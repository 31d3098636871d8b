"""The largest context of well-known shapes on cards of several sizes, by the plan alone.

    python benchmarks/plan_contexts.py [--shapes llama-3.1-8b …] [--cards 8 12 16 24]

LoRA r=16 on all linear layers of an nf4 base, one sequence a forward pass, every token a label, all
layers recomputed; once as `qft train` would run it, once with the savers that change no number:
checkpoints and embeddings on the host, a tiled MLP, 8-bit optimizer states. Beside it what the
formulas of `accelerate estimate-memory` say of the same shape, which know neither length nor
adapters: the weights in 4 bits, and a training with Adam in 16 bits.

No weight is loaded and no GPU is needed: these are predictions, each with the seconds it took.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qft import hardware
from qft.planning.calibration import Calibration
from qft.planning.forecast import forecast
from qft.planning.job import PlannedJob
from qft.planning.maximize import maximize
from qft.planning.opening import opened_job, recipe_of

RESULTS = Path(__file__).parent / "results" / "plan_contexts.jsonl"
SHAPES = ("llama-3.1-8b", "qwen2.5-14b", "qwen2.5-32b", "llama-3.1-70b")
CARDS = (8, 12, 16, 24)
GIB = 2**30
SETTINGS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "savers": (
        "memory.offload=host", "memory.savers.tiled_mlp=true",
        "memory.savers.host_embeddings=true", "train.optimizer=adamw-8bit",
    ),
}  # fmt: skip
ALWAYS = ("quantize=nf4", "memory.micro_batch=1", "train.batch_size=1", "memory.checkpointing=full",
          "train.max_length=2048")  # fmt: skip


def cells(shape: str, cards: list[int], settings: list[str]) -> Iterator[dict[str, Any]]:
    """A row a card and setting."""
    calibration = Calibration(persistent=False)
    for name in settings:
        recipe = recipe_of(shape, [*ALWAYS, *SETTINGS[name]], {})
        with opened_job(recipe, "cuda") as (job, _):
            for card in cards:
                began = time.monotonic()
                found = maximize(job, card * GIB, lambda j: _peak(j, calibration), "max_length")
                yield {
                    "shape": shape,
                    "settings": name,
                    "card_gib": card,
                    "max_length": found.value,
                    "peak_bytes": found.peak_bytes,
                    "limited_by": found.limited_by,
                    "seconds": round(time.monotonic() - began, 1),
                }


def _peak(job: PlannedJob, calibration: Calibration) -> int:
    return forecast(job, calibration).peak.expected


def estimated(shape: str) -> dict[str, Any]:
    """What `accelerate estimate-memory` would print, by its own functions."""
    estimate = importlib.import_module("accelerate.commands.estimate")
    sizes = importlib.import_module("accelerate.utils")  # neither has types

    recipe = recipe_of(shape, [*ALWAYS], {"quantize": "none", "dtype": "float32"})
    with opened_job(recipe, "cpu") as (job, _):
        total, _ = sizes.calculate_maximum_sizes(job.ready.skeleton)
    training = max(estimate.estimate_training_usage(total, "bfloat16").values())
    return {"shape": shape, "accelerate_int4_bytes": total // 8,
            "accelerate_training_bytes": training}  # fmt: skip


def main() -> None:
    """Appends a line a cell."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--shapes", nargs="+", default=list(SHAPES))
    arguments.add_argument("--cards", nargs="+", type=int, default=list(CARDS))
    arguments.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    asked = arguments.parse_args()
    about = {"versions": hardware.versions(), "cpu": hardware.device_name("cpu")}
    for shape in asked.shapes:
        said = estimated(shape)
        for row in cells(shape, asked.cards, asked.settings):
            line = json.dumps({**row, **said, **about})
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
