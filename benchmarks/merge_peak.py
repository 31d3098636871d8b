"""How much memory a merge takes: qft, PEFT and mergekit on a checkpoint of 1.5 GB.

    python benchmarks/merge_peak.py --mergekit PYTHON [--rounds 3] [--scratch FOLDER]

`PYTHON` is the interpreter of an environment that holds mergekit (`pip install torch==2.13.0`, then
`pip install torch==2.13.0 mergekit`). The checkpoints are made here: random weights of Llama's
shape, bf16, with an embedding of 525 MB, each once in one file and once in eight. Every
merge is a process of its own (see merge_peak_side.py); the sides take turns. Then the merged
tensors are compared with PEFT's merge done in float32 and rounded once. All of it goes to
benchmarks/results/merge_peak.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.driver import REPOSITORY
from qft.hardware import environment

RESULTS = Path(__file__).parent / "results" / "merge_peak.json"
LAYOUTS = (1, 8)  # files a checkpoint
SIDES = ("qft", "peft", "peft-best", "mergekit", "mergekit-copy")
FIGURES = (
    "peak_above_imports_bytes", "peak_bytes", "imports_bytes", "cpu_seconds", "seconds"
)  # fmt: skip
BOUND_BYTES = 300 * 10**6
VOCABULARY, HIDDEN, INTERMEDIATE = 128_256, 2048, 8192


@dataclass(frozen=True)
class Case:
    """A checkpoint and an adapter on it.

    Attributes:
        layers: of Llama-3.2-1B's shape; embedding and, where it is not tied, head come on top.
        targets: PEFT's target modules.
        sides: mergekit has PEFT merge, so it is run in one case only.
    """

    tied: bool
    layers: int
    targets: tuple[str, ...]
    dora: bool = False
    sides: tuple[str, ...] = ("qft", "peft")


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CASES = {
    "lora": Case(True, 8, LINEAR, sides=SIDES),
    "lora-embedding-head": Case(False, 4, (*LINEAR, "embed_tokens", "lm_head")),
    "dora-head": Case(False, 4, (*LINEAR, "lm_head"), dora=True),
}


def write_checkpoint(case: Case, folder: Path) -> None:
    """A random model in one file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
        num_hidden_layers=case.layers, num_attention_heads=32, num_key_value_heads=8,
        tie_word_embeddings=case.tied, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(value.shape).mul_(0.02).to(torch.bfloat16)
        for name, value in skeleton.state_dict().items()
        if not (case.tied and name == "lm_head.weight")
    }
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    _save(tensors, 1, folder)


def split_checkpoint(source: Path, files: int, folder: Path) -> None:
    """The same model in several files."""
    folder.mkdir()
    shutil.copyfile(source / "config.json", folder / "config.json")
    _save(dict(tensors_of(source)), files, folder)


def _save(tensors: Mapping[str, Tensor], files: int, folder: Path) -> None:
    """As transformers would: one file, or several with an index, none much fuller than needed."""
    from safetensors.torch import save_file

    meta = {"format": "pt"}
    if files == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata=meta)
        return
    shards: list[dict[str, Tensor]] = [{} for _ in range(files)]
    for name, value in sorted(tensors.items(), key=lambda item: -item[1].nbytes):
        min(shards, key=lambda s: sum(t.nbytes for t in s.values()))[name] = value
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata=meta)
    places = {t: n for n, s in zip(names, shards, strict=True) for t in s}
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_adapter(case: Case, base: Path, folder: Path) -> None:
    """A PEFT folder of rank 16 with no matrix zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=16, lora_alpha=32, target_modules=list(case.targets), use_dora=case.dora,
                   task_type="CAUSAL_LM"),
    )  # fmt: skip
    for name, value in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            value.data.normal_(std=0.01)
        if "lora_magnitude" in name:
            value.data.mul_(1 + 0.02 * torch.randn_like(value))
    model.save_pretrained(folder, save_embedding_layers=False)


def run_side(side: str, python: str, job: Mapping[str, str]) -> dict[str, Any]:
    """One merge in a fresh process; what it reports."""
    command = [python, "-m", "benchmarks.merge_peak_side", side]
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1",
                 "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, env=variables,
        cwd=Path(job["out"]).parent,
    )  # fmt: skip
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]}
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


def row_of(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and maximum over the rounds."""
    failed = [report["failed"] for report in reports if "failed" in report]
    if failed:
        return {"failed": failed[0]}
    row: dict[str, Any] = {}
    for report in reports:
        report["peak_above_imports_bytes"] = report["peak_bytes"] - report["imports_bytes"]
    for key in FIGURES:
        values = [report[key] for report in reports]
        row[key] = {"median": statistics.median(values), "max": max(values), "all": values}
    return row | {key: reports[0][key] for key in ("files", "versions", "late_imports")}


def reference(base: Path, adapter: Path) -> dict[str, Tensor]:
    """PEFT's merge, computed in float32 and rounded once to bf16."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, one at a time."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def compare(folder: Path, expected: Mapping[str, Tensor]) -> dict[str, Any]:
    """How many tensors of a merged folder are, bit for bit, what was expected."""
    count, equal, values = 0, 0, 0
    for name, tensor in tensors_of(folder):
        count += 1
        same = tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])
        equal += same
        values += 0 if same else int((tensor != expected[name]).sum())
    return {"tensors": count, "equal": equal, "unequal_values": values}


def measure(name: str, sides: Mapping[str, str], rounds: int, scratch: Path) -> dict[str, Any]:
    """One case in both layouts; the adapter and what is expected are of the one-file model."""
    case = CASES[name]
    base, adapter = scratch / "one-file", scratch / "adapter"
    write_checkpoint(case, base)
    write_adapter(case, base, adapter)
    found = describe(case, base)
    expected = reference(base, adapter)
    found["changed_tensors"] = sum(
        1 for tensor, value in tensors_of(base) if not torch.equal(value, expected[tensor])
    )
    for files in LAYOUTS:
        if files > 1:
            split_checkpoint(base, files, scratch / "several-files")
            shutil.rmtree(base)
            base = scratch / "several-files"
        rows, equal = take_turns(base, adapter, sides, rounds, expected)
        for side, row in rows.items():
            print(f"{name}, {files} files, {side}: {_said(row)}, {equal.get(side)}", flush=True)
        found["layouts"][str(files)] = {"sides": rows, "against_float32_peft": equal}
    shutil.rmtree(base)
    shutil.rmtree(adapter)
    return found


def describe(case: Case, base: Path) -> dict[str, Any]:
    """Shapes and bytes for the results."""
    tensors = {name: (list(value.shape), value.nbytes) for name, value in tensors_of(base)}
    largest = max(tensors, key=lambda name: tensors[name][1])
    return {
        **asdict(case),
        "bytes": sum(size for _, size in tensors.values()),
        "tensors": len(tensors),
        "largest": [largest, *tensors[largest]],
        "shapes": {n: shape for n, (shape, _) in tensors.items()
                   if ".layers." not in n or ".layers.0." in n},
        "layouts": {},
    }  # fmt: skip


def take_turns(
    base: Path, adapter: Path, sides: Mapping[str, str], rounds: int, expected: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Every side's row, and how its last merge compares with what was expected."""
    reports: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    equal: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for side, python in sides.items():
            out = base.parent / f"out-{side}"
            job = {"base": str(base), "adapter": str(adapter), "out": str(out)}
            reports[side].append(run_side(side, python, job))
            if number == rounds - 1 and out.is_dir() and side != "mergekit-copy":
                equal[side] = compare(out, expected)
            for folder in (out, out.with_name(f"{out.name}-cache")):
                shutil.rmtree(folder, ignore_errors=True)
    return {side: row_of(reports[side]) for side in sides}, equal


def _said(row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return f"failed: {row['failed']}"
    peak = row["peak_above_imports_bytes"]
    return (
        f"{peak['median'] / 1e6:.0f} MB above imports (at most {peak['max'] / 1e6:.0f}), "
        f"{row['cpu_seconds']['median']:.1f} CPU-seconds, {row['seconds']['median']:.1f} s"
    )


def main() -> None:
    """Runs the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", help="Python of an environment with mergekit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--scratch", type=Path, help="where 6 GB may be written for a while")
    chosen = parser.parse_args()
    sides = {
        side: chosen.mergekit if side.startswith("mergekit") else sys.executable
        for side in chosen.sides
        if chosen.mergekit or not side.startswith("mergekit")
    }
    result: dict[str, Any] = {
        "benchmark": "merge_peak",
        "date": date.today().isoformat(),
        "rounds": chosen.rounds,
        "bound_bytes": BOUND_BYTES,
        "environment": environment(),
        "cases": {},
    }
    with tempfile.TemporaryDirectory(dir=chosen.scratch) as folder:
        for name in chosen.only:
            own = {side: python for side, python in sides.items() if side in CASES[name].sides}
            result["cases"][name] = measure(name, own, chosen.rounds, Path(folder))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
