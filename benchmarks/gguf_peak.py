"""From a base of 1.5 GB and an adapter to Q4_K_M: qft in one step, and what users do today.

    python -m benchmarks.gguf_peak --llama-cpp FOLDER [--rounds 3] [--threads 1] [--scratch FOLDER]

`FOLDER` holds llama.cpp's sources (`vendor/llama.cpp` in the source distribution of
llama-cpp-python, which must be installed as well: its library quantizes; so must sentencepiece,
which the converter imports). Today's way is three
steps, each a process of its own: PEFT's merge is saved, llama.cpp's converter makes 16 bits of it,
llama.cpp's quantizer Q4_K_M of those. The sides take turns; all have the same number of threads.
The base is `merge_peak`'s, with a byte-level tokenizer of 128,256 entries. Then both files are
compared: the types of all tensors, and how far each is from the merged model. All of it goes to
benchmarks/results/gguf_peak.json.
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
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.merge_peak import CASES, VOCABULARY, write_adapter, write_checkpoint
from benchmarks.peers.driver import REPOSITORY
from qft.hardware import environment

RESULTS = Path(__file__).parent / "results" / "gguf_peak.json"
BOUND_BYTES = 400 * 10**6
TODAY = ("merge", "convert", "quantize")
FIGURES = ("peak_above_imports_bytes", "seconds", "cpu_seconds", "written_bytes")
_PATTERN = (  # Llama 3's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of Llama 3's size and cut: every byte, pairs of them, and some triples."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys(alphabet)
    merges: list[tuple[str, str]] = []
    specials = ["<|begin_of_text|>", "<|end_of_text|>"]
    pairs = [(one, two) for one in alphabet for two in alphabet]
    triples = ((one + two, three) for one, two in pairs for three in alphabet)
    for left, right in [*pairs, *(next(triples) for _ in range(VOCABULARY))]:
        if len(tokens) == VOCABULARY - len(specials):
            break
        if left + right not in tokens:
            tokens[left + right] = None
            merges.append((left, right))
    numbers = {token: number for number, token in enumerate(tokens)}
    inner = Tokenizer(models.BPE(vocab=numbers, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(special, special=True) for special in specials])
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=specials[0], eos_token=specials[1]
    ).save_pretrained(folder)


def run_step(step: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """One step in a fresh process; what it reports."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "HF_HUB_OFFLINE": "1",
                 "OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false",
                 "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gguf_peak_side", step], input=json.dumps(job),
        capture_output=True, text=True, env=variables, cwd=Path(job["base"]).parent,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{step} failed:\n{done.stderr[-3000:]}")
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


def row_of(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and maximum over the rounds."""
    row: dict[str, Any] = {}
    for key in FIGURES:
        values = [report[key] for report in reports]
        row[key] = {"median": statistics.median(values), "max": max(values), "all": values}
    return row | {key: reports[0][key] for key in ("imports_bytes", "versions", "late_imports")}


def take_turns(
    job: Mapping[str, Any], rounds: int, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Both ways, in turn, saved after each round; the files of the last round stay."""
    reports: dict[str, list[dict[str, Any]]] = {step: [] for step in ("qft", *TODAY)}
    for number in range(rounds):
        for step in reports:
            reports[step].append(run_step(step, job))
            found = {key: round(reports[step][-1][key] / 1e6, 3) for key in FIGURES[::3]}
            print(number, step, found, reports[step][-1]["cpu_seconds"], flush=True)
        save(_rows(reports))
        if number < rounds - 1:
            for key in ("out", "merged"):
                shutil.rmtree(job[key])
            for key in ("f16", "quantized"):
                Path(job[key]).unlink()
    return _rows(reports)


def _rows(reports: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    rows = {step: row_of(found) for step, found in reports.items()}
    return {"steps": rows, "qft": _sum(reports, ("qft",)), "today": _sum(reports, TODAY)}


def _sum(reports: Mapping[str, list[dict[str, Any]]], steps: tuple[str, ...]) -> dict[str, Any]:
    """A way of several steps: times and bytes on disk add up, of peaks the highest counts."""
    rounds = list(zip(*(reports[step] for step in steps), strict=True))
    total: dict[str, Any] = {
        key: statistics.median(sum(report[key] for report in each) for each in rounds)
        for key in ("seconds", "cpu_seconds", "written_bytes")
    }
    peaks = [max(report["peak_above_imports_bytes"] for report in each) for each in rounds]
    return total | {"peak_above_imports_bytes": max(peaks)}


def compare(job: Mapping[str, Any]) -> dict[str, Any]:
    """The two files' tensors: are their types the same, and how far is each from the 16 bits?"""
    import gguf

    plain = {t.name: t for t in gguf.GGUFReader(job["f16"]).tensors}
    ours = {t.name: t for t in gguf.GGUFReader(Path(job["out"]) / "model-q4_k_m.gguf").tensors}
    theirs = {t.name: t for t in gguf.GGUFReader(job["quantized"]).tensors}
    found: dict[str, Any] = {
        "tensors": len(theirs),
        "same_names": ours.keys() == theirs.keys(),
        "same_types": sum(ours[n].tensor_type == t.tensor_type for n, t in theirs.items()),
        "error_ratio": {},
    }
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.1.ffn_down.weight",
                 "blk.3.ffn_up.weight", "blk.7.attn_v.weight"):  # fmt: skip
        rows = slice(0, 2048)
        wanted = torch.tensor(plain[name].data[rows]).float()
        errors = [
            (torch.tensor(gguf.dequantize(t[name].data[rows], t[name].tensor_type)) - wanted)
            .square().mean().item()
            for t in (ours, theirs)
        ]  # fmt: skip
        found["error_ratio"][name] = errors[0] / errors[1]
    return found


def main() -> None:
    """Makes base and adapter, and runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-cpp", required=True, type=Path, help="its sources")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--scratch", type=Path, help="where 9 GB may be written for a while")
    chosen = parser.parse_args()
    result: dict[str, Any] = {
        "benchmark": "gguf_peak", "date": date.today().isoformat(), "rounds": chosen.rounds,
        "bound_bytes": BOUND_BYTES, "environment": environment(), "by_threads": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=chosen.scratch) as name:
        folder = Path(name)
        case = CASES["lora"]
        write_checkpoint(case, folder / "base")
        write_tokenizer(folder / "base")
        write_adapter(case, folder / "base", folder / "adapter")
        names = {"base": "base", "adapter": "adapter", "out": "out", "merged": "merged",
                 "f16": "f16.gguf", "quantized": "q4_k_m.gguf"}  # fmt: skip
        job = {key: str(folder / value) for key, value in names.items()}
        result["base_bytes"] = (folder / "base" / "model.safetensors").stat().st_size
        for threads in chosen.threads:
            full = {**job, "sources": str(chosen.llama_cpp.resolve()), "threads": threads}

            def save(rows: dict[str, Any], threads: int = threads) -> None:
                result["by_threads"][str(threads)] = rows
                RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

            save(take_turns(full, chosen.rounds, save))
            result["files"] = compare(full)
            for key in ("out", "merged"):
                shutil.rmtree(job[key])
            RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
