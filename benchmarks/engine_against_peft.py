"""The lean engine beside plain PEFT in real trainings: loss curves, final weights, bytes, time.

    python benchmarks/engine_against_peft.py ASSETS [--steps 200]

Both sides see the same tokens in the same order, with the same start, AdamW and schedule: the
stories260K model on tinyshakespeare, and the demo's base on docstrings. Plain PEFT is
`get_peft_model` and the model's own loss; the other side is `qft.prepare` on the same model. Blocks
of steps alternate in one process. A line a run is appended to
benchmarks/results/engine_against_peft.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qft
from adapters.lora import LoRA
from qft.demo.job import BASE
from qft.hardware import environment
from qft.lean.meter import Meter
from qft.models import ModelSpec, open_model, open_tokenizer

RESULTS = Path(__file__).parent / "results" / "engine_against_peft.jsonl"
BATCH, LENGTH, BLOCK = 4, 128, 20
RANK = 16


@dataclass
class Side:
    """One side's model, optimizer and record."""

    model: Any
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of each block
    peak_bytes: int = 0


def side(folder: Path, lean: bool, dtype: torch.dtype) -> Side:
    """The model with a fresh adapter, the same on both sides."""
    import peft

    model: Any = open_model(folder, ModelSpec(str(folder), dtype=dtype, device="cpu"))
    torch.manual_seed(1)
    if lean:
        model = qft.prepare(model, LoRA(rank=RANK), checkpointing="none")
    else:
        config = peft.LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return Side(model, torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.0))


def batches(folder: Path, text: str, steps: int) -> list[Tensor]:
    """``steps`` batches of ``[BATCH, LENGTH]`` tokens, drawn by a seed."""
    ids = torch.tensor(open_tokenizer(folder)(text)["input_ids"])
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(ids) - LENGTH, (steps, BATCH), generator=generator)
    return [torch.stack([ids[s : s + LENGTH] for s in row]) for row in starts.tolist()]


def run_block(one: Side, tokens: list[Tensor]) -> None:
    """Some steps; the first of them is metered, and not timed."""
    started = 0.0
    for number, batch in enumerate(tokens):
        if number == 1:
            started = time.process_time()
        with Meter(one.model, one.optimizer) if number == 0 else _Nothing() as meter:
            loss = one.model(input_ids=batch, labels=batch).loss
            loss.backward()
            one.losses.append(float(loss.detach()))
            del loss
            one.optimizer.step()
            one.optimizer.zero_grad(set_to_none=True)
        if isinstance(meter, Meter):
            one.peak_bytes = max(one.peak_bytes, meter.reading().peak_bytes)
    one.cpu_seconds.append((time.process_time() - started) / max(1, len(tokens) - 1))


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What was trained, by name."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def compare(name: str, folder: Path, text: str, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    """Trains both sides; the line for the results."""
    tokens = batches(folder, text, steps)
    plain, lean = (side(folder, way, dtype) for way in (False, True))
    start = {n: w.clone() for n, w in weights(plain.model).items()}
    same = weights(lean.model)
    assert set(start) == set(same)
    with torch.no_grad():
        for key, value in start.items():
            same[key].copy_(value)
    for at in range(0, steps, BLOCK):
        order = (plain, lean) if at // BLOCK % 2 == 0 else (lean, plain)
        for one in order:
            gc.collect()
            run_block(one, tokens[at : at + BLOCK])
    apart = [abs(a - b) / b for a, b in zip(lean.losses, plain.losses, strict=True)]
    theirs, ours = weights(plain.model), weights(lean.model)
    moved = sum(float((theirs[n] - start[n]).square().sum()) for n in start) ** 0.5
    distance = sum(float((ours[n] - theirs[n]).square().sum()) for n in start) ** 0.5
    medians = [statistics.median(one.cpu_seconds) for one in (plain, lean)]
    return {
        "benchmark": "engine_against_peft",
        "date": date.today().isoformat(),
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "steps": steps,
        "batch": [BATCH, LENGTH],
        "first_and_last_loss": [plain.losses[0], plain.losses[-1], lean.losses[-1]],
        "largest_relative_loss_difference": max(apart),
        "weights_distance_over_distance_moved": distance / moved,
        "peak_bytes": {"peft": plain.peak_bytes, "qft": lean.peak_bytes},
        "median_cpu_seconds_a_step": {"peft": medians[0], "qft": medians[1]},
        "blocks": len(plain.cpu_seconds),
        "losses": {"peft": plain.losses[::10], "qft": lean.losses[::10]},
        "environment": environment(),
    }


def main() -> None:
    """Runs both models in both types."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    play = (arguments.assets / "data/text/tinyshakespeare").glob("*.txt")
    shakespeare = "".join(p.read_text(encoding="utf-8") for p in sorted(play))[:400_000]
    code = "\n".join(
        p.read_text(encoding="utf-8") for p in sorted(Path(qft.__file__).parent.glob("*.py"))
    )
    jobs = [
        ("stories260K", arguments.assets / "models/stories260K", shakespeare),
        ("demo base", Path(BASE), code),
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    for name, folder, text in jobs:
        for dtype in (torch.float32, torch.bfloat16):
            row = compare(name, folder, text, arguments.steps, dtype)
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            shown = {k: v for k, v in row.items() if k not in ("environment", "losses")}
            print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
