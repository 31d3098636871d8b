"""Bytes and FLOPs of a training step at true scale, with plain PEFT and with the lean engine.

    python benchmarks/step_bytes.py [--only 8b]

Metered on fake tensors (`qft bench step`): no weights, no GPU, the same numbers on every machine.
bf16 base, LoRA r=16 on all linear layers, AdamW, one sequence. A line a step goes to
benchmarks/results/step_bytes.jsonl, which is written anew.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.lora import LoRA
from qft.bench.step import ALL, PLAIN, StepSettings, as_row, meter_step
from qft.hardware import versions

RESULTS = Path(__file__).parent / "results" / "step_bytes.jsonl"


def jobs() -> dict[str, StepSettings]:
    """Every step by its name; a name that ends in ``-peft`` is the plain path."""
    eight = StepSettings("llama-3.1-8b", length=8192)
    one = StepSettings("llama-3.2-1b", length=2048, checkpointing="none")
    gemma = StepSettings("gemma-3-1b", length=2048)
    small = replace(eight, length=512, quantize="nf4")
    tiled = replace(ALL, tiled_mlp=True)
    found = {
        "8b": eight,
        "8b-offload": replace(eight, offload="host"),
        "8b-offload-tiled": replace(eight, offload="host", savers=tiled),
        "8b-nf4": small,
        "8b-nf4-smallest": replace(
            small,
            optimizer="adamw-8bit",
            savers=replace(ALL, host_embeddings=True, int8_head=True),
        ),
        "1b-kept": one,
        "1b-recomputed": replace(one, checkpointing="full"),
        "1b-quarter-labels": replace(one, checkpointing="full", label_share=0.25),
        "gemma-1b": gemma,
        "bert-base": StepSettings("bert-base", length=512, batch=8, checkpointing="none"),
        "t5-base": StepSettings("t5-base", length=512, batch=4, checkpointing="none"),
    }
    for name in ("8b", "1b-kept", "1b-recomputed", "gemma-1b", "bert-base", "t5-base"):
        found[f"{name}-peft"] = replace(found[name], savers=PLAIN)
    for saver in ("label_loss", "lora", "gated_mlp", "norms"):
        found[f"1b-kept-without-{saver}"] = replace(one, savers=replace(ALL, **{saver: False}))
    return found


def main() -> None:
    """Runs the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(jobs()))
    chosen = parser.parse_args().only or list(jobs())
    kept: dict[str, dict[str, Any]] = {}
    if RESULTS.is_file():
        lines = RESULTS.read_text(encoding="utf-8").splitlines()
        kept = {row["name"]: row for row in map(json.loads, lines)}
    for name in chosen:
        settings, strategy = jobs()[name], LoRA(rank=16)
        row = as_row(settings, strategy, meter_step(settings, strategy))
        kept[name] = {"name": name, **row, "versions": versions()}
        text = "".join(json.dumps(kept[n]) + "\n" for n in jobs() if n in kept)
        RESULTS.write_text(text, encoding="utf-8")
        print(
            f"{name}: static {row['static_bytes'] / 2**30:.2f}, peak "
            f"{row['peak_bytes'] / 2**30:.2f} GiB, "
            f"{row['bytes_per_token_above_resident'] / 1000:.0f} kB a token above resident",
            flush=True,
        )


if __name__ == "__main__":
    main()
