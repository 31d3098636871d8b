"""What the importance of columns, taken from the user's own rows, gains a GGUF file.

    QFT_ASSETS=FOLDER python benchmarks/gguf_importance.py [--rounds 3] [--mixes q2_k q4_k_m]

mini-6m is rounded to each mix without importance and with that of 16 packed rows of 512 tokens of
the user's domain (GSM8K's training rows, drawn by three seeds); by qft, and by llama.cpp's own
quantizer, which is given the same importance. Each file is read by transformers and compared with
the float32 model on rows it has never met (GSM8K's test rows): mean KL in nats a token. All of it
goes to benchmarks/results/gguf_importance.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qft.export.calibration import calibrate_on
from qft.export.gguf_format import GGUFPlan, write_gguf
from qft.gguf.importance import Importance, importance_of
from qft.gguf.mixes import MIXES
from qft.hardware import environment
from qft.merging.merge import open_source
from qft.merging.tensors import MergedTensors
from qft.models import ModelSpec, open_skeleton, open_tokenizer
from qft.verification.read_back import read_back
from qft.verification.subject import locate

RESULTS = Path(__file__).parent / "results" / "gguf_importance.json"
TRAINING_ROWS, CALIBRATION_ROWS, JUDGED_ROWS, LENGTH = 1000, 16, 32, 128


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="seeds of calibration rows")
    parser.add_argument("--mixes", nargs="+", default=["q2_k", "q4_k_m", "q4_0", "q3_k_m"])
    chosen = parser.parse_args()
    assets = Path(os.environ["QFT_ASSETS"])
    report = {"date": date.today().isoformat(), "environment": environment(),
              "calibration_rows": CALIBRATION_ROWS, "judged_rows": JUDGED_ROWS}  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        for rows in _Bench(assets, Path(name)).measure(chosen.mixes, chosen.rounds):
            RESULTS.write_text(json.dumps({**report, "rows": rows}, indent=2) + "\n", "utf-8")


class _Bench:
    """The model, its answers, and a folder for files."""

    def __init__(self, assets: Path, folder: Path) -> None:
        self.folder, self.model = folder, assets / "models" / "mini-6m"
        self.spec = ModelSpec(str(self.model), dtype=torch.float32)
        domain = assets / "data" / "math" / "gsm8k"
        self.train = _as_text(domain / "train.jsonl", folder / "train.jsonl")
        held_out = _as_text(domain / "test.jsonl", folder / "test.jsonl")
        texts = [json.loads(line)["text"] for line in held_out.read_text("utf-8").splitlines()]
        tokenizer = open_tokenizer(self.model)
        self.judged = [tokenizer(text)["input_ids"][:LENGTH] for text in texts[:JUDGED_ROWS]]
        plain = write_gguf(GGUFPlan(self.source(), "f32"), self._new("f32"))
        self.plain, self.expected = plain, self._answers(read_back(plain))

    def source(self) -> MergedTensors:
        return open_source(self.model, open_skeleton(self.model, self.spec))

    def measure(self, mixes: list[str], rounds: int) -> Iterator[list[dict[str, Any]]]:
        """All rows so far, mix by mix: a row a mix, a writer and a seed (None: no importance)."""
        known: dict[int | None, Importance | None] = {None: None}
        for seed in range(rounds):
            calibration = calibrate_on(locate(self.model, task="text"), str(self.train),
                                       rows=CALIBRATION_ROWS, seed=seed)  # fmt: skip
            known[seed] = importance_of(self.source(), calibration)
        rows = []
        for mix in mixes:
            for drawn, importance in known.items():
                for writer in ("qft", "llama.cpp"):
                    begun = time.process_time()
                    file = self._write(writer, mix, importance)
                    seconds = time.process_time() - begun
                    row = {"mix": mix, "writer": writer, "seed": drawn, "kl": self._kl(file),
                           "bytes": file.stat().st_size, "cpu_seconds": seconds}  # fmt: skip
                    rows.append(row)
                    print(json.dumps(row), flush=True)
            _say(mix, rows)
            yield rows

    def _write(self, writer: str, mix: str, importance: Importance | None) -> Path:
        if writer == "qft":
            return write_gguf(GGUFPlan(self.source(), mix, importance), self._new(mix))
        named = {} if importance is None else self._as_in_file(importance)
        out = self._new(mix) / "model.gguf"
        quantize(self.plain, out, mix, named)
        return out

    def _as_in_file(self, importance: Importance) -> dict[str, Tensor]:
        plan = GGUFPlan(self.source(), "f32")
        mapped = plan.architecture.tensors(plan.source)
        return {t.name: importance.columns[t.source] for t in mapped
                if t.source is not None and t.source in importance.columns}  # fmt: skip

    def _new(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=name, dir=self.folder))

    @torch.no_grad()
    def _answers(self, model: Any) -> list[Tensor]:
        return [nn.functional.log_softmax(model(torch.tensor([ids])).logits[0, :-1].float(), -1)
                for ids in self.judged]  # fmt: skip

    def _kl(self, file: Path) -> float:
        found = self._answers(read_back(file, dtype=torch.float32))
        each = [(a.exp() * (a - b)).sum(-1) for a, b in zip(self.expected, found, strict=True)]
        return float(torch.cat(each).mean())


def _as_text(source: Path, target: Path) -> Path:
    rows = [json.loads(line) for line in source.read_text("utf-8").splitlines() if line]
    texts = [f"{row['question']}\n{row['answer']}" for row in rows[:TRAINING_ROWS]]
    lines = [json.dumps({"text": text}) for text in texts]
    target.write_text("\n".join(lines), encoding="utf-8")
    return target


def quantize(source: Path, out: Path, mix: str, importance: dict[str, Tensor]) -> None:
    """By llama.cpp's own quantizer, on one thread."""
    import llama_cpp

    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    held = []
    for entry, (name, columns) in zip(entries, importance.items(), strict=False):
        values = (ctypes.c_float * len(columns))(*columns.tolist())
        held.append(values)
        entry.name, entry.size = name.encode(), len(columns)
        entry.data = ctypes.cast(values, ctypes.POINTER(ctypes.c_float))
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = MIXES[mix], 1
    if importance:
        settings.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(out).encode(), ctypes.byref(settings)
    )
    if failed:
        raise RuntimeError(f"llama.cpp could not write {mix}")


def _say(mix: str, rows: list[dict[str, Any]]) -> None:
    for writer in ("qft", "llama.cpp"):
        own = [row for row in rows if (row["mix"], row["writer"]) == (mix, writer)]
        plain = next(row["kl"] for row in own if row["seed"] is None)
        fitted = [row["kl"] for row in own if row["seed"] is not None]
        spread = statistics.stdev(fitted) if len(fitted) > 1 else 0.0
        print(f"{mix} by {writer}: KL {plain:.5f}, with importance "
              f"{statistics.mean(fitted):.5f} ± {spread:.5f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
