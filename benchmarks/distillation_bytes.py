"""Bytes of a distillation step at true scale: teacher in memory, in 4 bits, or cached.

    python benchmarks/distillation_bytes.py

Metered on fake tensors (`qft.bench.step`): no weights, no GPU, the same numbers on every machine.
Student: Llama-3.2-1B, bf16, LoRA r=16 on all linear layers, AdamW, activations recomputed, one
sequence of 2,048 tokens, all with a label. Teacher: Llama-3.1-8B. The last row is what trainers
with a full-logit loss do: PEFT's student, the logits of both models, and TRL's own function
(`GKDTrainer.generalized_jsd_loss`, forward KL). A line a row goes to
benchmarks/results/distillation_bytes.jsonl, which is written anew.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters.lora import LoRA
from qft.bench.fake_model import DEVICE, fake_step
from qft.bench.step import (
    PLAIN,
    StepSettings,
    TeacherSettings,
    as_row,
    batch_of,
    meter_step,
    optimizer_of,
    skeleton_of,
)
from qft.hardware import versions
from qft.lean.meter import Reading, meter
from qft.preparation import prepare
from qft.strategy import Context

RESULTS = Path(__file__).parent / "results" / "distillation_bytes.jsonl"
STUDENT = StepSettings("llama-3.2-1b", length=2048)
EIGHT = TeacherSettings("llama-3.1-8b")
CASES: dict[str, TeacherSettings | None] = {
    "plain": None,
    "live-bf16": EIGHT,
    "live-nf4": replace(EIGHT, quantize="nf4"),
    "cached-k8": replace(EIGHT, top_k=8),
    "cached-k64": replace(EIGHT, top_k=64),
    "cached-k128": replace(EIGHT, top_k=128),
}


def full_logits(settings: StepSettings, teacher: TeacherSettings) -> Reading:
    """The logits of both models, ``[batch, tokens, vocabulary]``, and TRL's divergence of them."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    plain = replace(settings, savers=PLAIN)
    strategy = LoRA(rank=16)
    student, task = skeleton_of(plain, strategy)
    model: Any = prepare(
        student, strategy, checkpointing="full", savers=PLAIN,
        context=Context(task=task, total_steps=1000),
    )  # fmt: skip
    beside: nn.Module
    beside, _ = skeleton_of(
        replace(plain, shape=teacher.shape, quantize=teacher.quantize), strategy
    )
    beside.eval().requires_grad_(False)
    with fake_step(model, beside):
        optimizer = optimizer_of(model, "adamw")
        batch = batch_of(model, plain)
        labels = batch.pop("labels")

        def step() -> None:
            logits = model(**batch).logits
            with torch.no_grad():
                theirs = beside(**batch).logits
            loss = GKDTrainer.generalized_jsd_loss(
                student_logits=logits[:, :-1], teacher_logits=theirs[:, :-1], beta=0.0,
                num_items_in_batch=labels.numel(),
            )  # fmt: skip
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        held = nn.ModuleList([model, beside])
        return meter(step, model=held, optimizer=optimizer, device=DEVICE)


def main() -> None:
    """Runs the steps."""
    rows: list[dict[str, Any]] = []
    for name, teacher in CASES.items():
        rows.append(_row(name, teacher, meter_step(STUDENT, LoRA(rank=16), teacher)))
    for quantize in ("none", "nf4"):
        teacher = replace(EIGHT, quantize=quantize)  # type: ignore[arg-type]
        held = "bf16" if quantize == "none" else quantize
        rows.append(_row(f"full-logits-{held}", teacher, full_logits(STUDENT, teacher)))
        rows[-1]["versions"]["trl"] = version("trl")
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _row(name: str, teacher: TeacherSettings | None, reading: Reading) -> dict[str, Any]:
    row = as_row(STUDENT, LoRA(rank=16), reading)
    row = {"name": name, "teacher": vars(teacher) if teacher else None, **row}
    print(f"{name}: peak {row['peak_bytes'] / 2**30:.3f} GiB in {row['peak_phase']}", flush=True)
    return {**row, "versions": versions()}


if __name__ == "__main__":
    main()
