"""What a plan says of each phase against what it takes on a CPU: resident set above the imports.

    python -m benchmarks.plan_phases --mini FOLDER [--only WORD] [--scratch FOLDER]

`FOLDER` is a small real model with a tokenizer (it warms every process up). The others are made
here: random Llamas of 121 M and 413 M parameters, stored in bfloat16 or float32. Every measurement
is a process of its own (see plan_phases_side.py), and a line in results/plan_phases.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.driver import REPOSITORY
from benchmarks.plan_phases_side import job_of, opened
from qft.files import folder_bytes
from qft.hardware import environment
from qft.planning.afterwards import FIXED_BYTES, merge_and_export
from qft.planning.amounts import PhaseBytes
from qft.planning.fake_training import FakeTraining
from qft.planning.phases import phases_of

RESULTS = Path(__file__).parent / "results" / "plan_phases.jsonl"
SHAPES: dict[str, dict[str, Any]] = {
    "121m": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 14,
             "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 32000,
             "tie_word_embeddings": True},
    "413m": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20,
             "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 48000,
             "tie_word_embeddings": False},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        phase: one of `qft.planning.amounts.PHASES`; of an export with its format.
        shape: a key of SHAPES.
        stored: the files' type.
        dtype: what the recipe asks for.
        recipe: what else it says.
    """

    phase: str
    shape: str = "121m"
    stored: str = "bfloat16"
    dtype: str = "bfloat16"
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people."""
        said = ", ".join(str(value) for value in self.recipe.values())
        parts = [self.phase, self.shape, f"{self.stored} -> {self.dtype}", said]
        return ", ".join(part for part in parts if part)


NF4, INT8 = {"quantize": "nf4"}, {"quantize": "int8"}
LONG = {"train": {"max_length": 256, "batch_size": 8}}
CASES = (
    Case("load"),
    Case("load", dtype="float32"),
    Case("load", stored="float32"),
    Case("load", recipe=NF4),
    Case("load", stored="float32", recipe=NF4),
    Case("load", dtype="float32", recipe=INT8),
    Case("load", "413m", dtype="float32"),
    Case("load", "413m", recipe=NF4),
    Case("evaluate", recipe=LONG),
    Case("evaluate", dtype="float32", recipe=LONG),
    Case("evaluate", recipe={**LONG, **NF4}),
    Case("save"),
    Case("save", stored="float32", dtype="float32", recipe={"strategy": "full"}),
    Case("merge"),
    Case("merge", "413m"),
    Case("export:safetensors:fp16"),
    Case("export:gguf:q8_0"),
    Case("export:gguf:q4_k_m"),
    Case("export:bnb:nf4"),
    Case("export:bnb:nf4", "413m"),
    Case("export:compressed-tensors:w8a16"),
)


def recipe_of(case: Case, model: Path) -> dict[str, Any]:
    """As a mapping."""
    values = {
        "model": str(model), "task": "text", "data": {"train": "x", "eval_share": 0.1},
        "strategy": {"name": "lora", "rank": 16}, "dtype": case.dtype, "device": "cpu",
        "memory": {"checkpointing": "none"},
        "train": {"max_length": 64, "batch_size": 4}, "output": "run",
    }  # fmt: skip
    return {**values, **case.recipe}


def made_model(shape: str, stored: str, scratch: Path, mini: Path) -> Path:
    """A random model, with the small one's tokenizer."""
    folder = scratch / f"{shape}-{stored}"
    if (folder / "config.json").is_file():
        return folder
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    dtype = getattr(torch, stored)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, dtype=dtype)
    torch.set_default_dtype(dtype)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    for path in mini.glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    return folder


def made_adapter(recipe: dict[str, Any], folder: Path) -> Path:
    """As a training leaves it, without one."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        job = job_of({"recipe": recipe})
        job.recipe.strategy.save(opened(job), folder)
    return folder


def foreseen(case: Case, recipe: dict[str, Any]) -> PhaseBytes:
    """What the plan says."""
    job = job_of({"recipe": recipe})
    if case.phase.startswith(("merge", "export")):
        formats = [case.phase.partition(":")[2]] if ":" in case.phase else []
        return merge_and_export(job, formats)[-1]
    phases = {phase.phase: phase for phase in phases_of(job, FakeTraining(job).meter())}
    return phases[case.phase]


def measured(case: Case, recipe: dict[str, Any], mini: Path, scratch: Path) -> dict[str, Any]:
    """What a process says that does it."""
    own: dict[str, Any] = {"phase": case.phase, "recipe": recipe, "out": str(scratch / "out")}
    small = recipe_of(case, mini)
    own["warm_up"] = {"recipe": small}
    if case.phase.startswith(("merge", "export")):
        name = Path(recipe["model"]).name
        own["adapter"] = str(made_adapter(recipe, scratch / f"{name}-adapter"))
        own["warm_up"]["adapter"] = str(made_adapter(small, scratch / "mini-adapter"))
    shutil.rmtree(own["out"], ignore_errors=True)
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan_phases_side"], input=json.dumps(own), text=True,
        capture_output=True, cwd=REPOSITORY, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    if run.returncode:
        raise SystemExit(f"{case.name}: {run.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return {**report, "disk_bytes": folder_bytes(scratch / "out")}


def compared(case: Case, mini: Path, scratch: Path) -> dict[str, Any]:
    """A line of the results."""
    recipe = recipe_of(case, made_model(case.shape, case.stored, scratch, mini))
    said, found = foreseen(case, recipe), measured(case, recipe, mini, scratch)
    resident = said.peak_bytes
    if case.phase == "evaluate":  # without a training before it
        resident -= said.device.get("optimizer", 0)
    if case.phase.startswith(("merge", "export")):  # in a process that is warm
        resident -= FIXED_BYTES
    return {
        "case": case.name, "phase": case.phase, "predicted_bytes": resident,
        "resident_peak_bytes": found["peak_bytes"],
        "resident_error": resident / found["peak_bytes"] - 1,
        "resident_after_bytes": found["after_bytes"], "live_bytes": found["live_bytes"],
        "predicted_disk_bytes": sum(said.disk.values()), "disk_bytes": found["disk_bytes"],
        "device": dict(said.device), "imports_bytes": found["imports_bytes"],
        "cpu_seconds": found["cpu_seconds"],
    }  # fmt: skip


def main() -> None:
    """Measures the cases, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mini", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--scratch", type=Path)
    asked = parser.parse_args()
    scratch = asked.scratch or Path(tempfile.mkdtemp())
    for case in CASES:
        if asked.only not in case.name:
            continue
        line = compared(case, asked.mini, scratch)
        print(f"{line['case']}: {line['predicted_bytes'] / 1e6:.0f} MB, "
              f"{line['resident_peak_bytes'] / 1e6:.0f} measured, "
              f"{line['resident_error']:+.1%}", flush=True)  # fmt: skip
        facts = {"benchmark": "plan_phases", "date": date.today().isoformat(), **line,
                 "environment": environment()}  # fmt: skip
        with RESULTS.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(facts) + "\n")
    if asked.scratch is None:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
