"""Every GGUF mix of a small real model, beside llama.cpp's own quantization of the same file.

    python -m benchmarks.gguf_types ASSETS [--rows 6] [--mixes q4_k_m,q6_k] | --redraw

mini-6m as f32 is quantized by `qft export` and by llama.cpp's `llama_model_quantize`, neither with
an importance matrix. llama.cpp runs every file over the same held-out rows of 256 tokens (plays,
captions with their translation, arithmetic problems, film reviews: none of them in mini-6m's
training), and the answers are compared with those of the f32 file: KL(f32 ‖ file) in nats a
position. Mean squared errors are of every tensor as `gguf` dequantizes it. Needs the extra
`gguf-test`. The rows go to benchmarks/results/gguf_types.json and the table to docs/export.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
import torch
from torch import Tensor

from qft import models
from qft.export.formats import write_format
from qft.gguf.mixes import MIXES
from qft.gguf.rounding import encode
from qft.gguf.types import TYPES
from qft.hardware import environment
from qft.merging.merge import open_source

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "gguf_types.json"
PAGE = REPOSITORY / "docs" / "export.md"
BEGIN, END = "<!-- gguf types: begin -->", "<!-- gguf types: end -->"
LENGTH = 256
SHOWN = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "iq4_nl", "q4_k_s", "q4_k_m",
         "q5_0", "q5_1", "q5_k_s", "q5_k_m", "q6_k", "q8_0", "bf16", "f16")  # fmt: skip


def held_out(assets: Path) -> Iterator[str]:
    """Texts that mini-6m has not seen, each long enough for some rows."""
    data = assets / "data"
    yield next((data / "text/tinyshakespeare").rglob("*.txt")).read_text("utf-8")[:60000]
    pairs = (data / "translation/multi30k/val.jsonl").read_text("utf-8").splitlines()
    yield "\n".join(f"{row['en']}\n{row['de']}" for row in map(json.loads, pairs[:400]))
    problems = (data / "math/gsm8k/test.jsonl").read_text("utf-8").splitlines()
    yield "\n\n".join(
        f"{row['question']}\n{row['answer']}" for row in map(json.loads, problems[:100])
    )
    reviews = next((data / "sentiment/sst2").rglob("test*")).read_text("utf-8").splitlines()
    yield "\n".join(line.split("\t")[0] for line in reviews[:800])


def rows_of(assets: Path, model: Path, rows: int) -> list[list[int]]:
    """So many rows of each text, of LENGTH tokens, beginning with the model's first token."""
    tokenizer = models.open_tokenizer(model)
    found = []
    for text in held_out(assets):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        step = LENGTH - 1
        first = tokenizer.bos_token_id or tokenizer.eos_token_id
        found += [[first, *ids[at : at + step]] for at in range(0, rows * step, step)]
    return found


class Runner:
    """A GGUF file in llama.cpp."""

    def __init__(self, file: Path) -> None:
        import llama_cpp

        low = llama_cpp.llama_cpp
        default = low.llama_model_default_params

        def plain() -> Any:
            """Without repacking for AMX, which some virtual machines announce and do not have."""
            settings = default()
            settings.use_extra_bufts = False
            return settings

        with patch.object(low, "llama_model_default_params", plain):
            self._model = llama_cpp.Llama(
                str(file), n_ctx=LENGTH, n_batch=LENGTH, logits_all=True, n_threads=1,
                n_threads_batch=1, verbose=False)  # fmt: skip

    def token_ids(self, text: str) -> list[int]:
        """As llama.cpp cuts it."""
        found: list[int] = self._model.tokenize(text.encode(), add_bos=True, special=True)
        return found

    def log_probabilities(self, row: Sequence[int]) -> Tensor:
        """``[positions, vocabulary]``, float32."""
        self._model.reset()
        self._model.eval(row)
        return torch.from_numpy(self._model.scores[: len(row)].copy()).log_softmax(-1)


def divergence(
    reference: Sequence[Tensor], other: Runner, rows: Sequence[Sequence[int]]
) -> dict[str, float]:
    """KL(reference ‖ other) over all positions, and how often both find one token likeliest."""
    found, same = [], []
    for row, first in zip(rows, reference, strict=True):
        second = other.log_probabilities(row)
        found.append((first.exp() * (first - second)).sum(-1))
        same.append(first.argmax(-1) == second.argmax(-1))
    values = torch.cat(found)
    return {"mean_kl": float(values.mean()), "p99_kl": float(values.quantile(0.99)),
            "top1": float(torch.cat(same).float().mean())}  # fmt: skip


def quantize(file: Path, out: Path, mix: str) -> float:
    """llama.cpp's own file of a mix; returns its seconds of CPU time."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = MIXES[mix], 1
    began = time.process_time()
    failed = llama_cpp.llama_model_quantize(
        str(file).encode(), str(out).encode(), ctypes.byref(settings)
    )
    if failed:
        raise RuntimeError(f"llama.cpp cannot make {mix}")
    return time.process_time() - began


def errors(file: Path, reference: Path) -> dict[str, float]:
    """The mean squared error of every tensor that is stored in blocks."""
    exact = {tensor.name: tensor for tensor in gguf.GGUFReader(reference).tensors}
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.tensor_type.name in ("F32", "F16", "BF16"):
            continue
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        found[tensor.name] = float(np.mean((values - exact[tensor.name].data) ** 2))
    return found


def measured(
    model: Path, assets: Path, rows: int, mixes: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A row a mix."""
    skeleton = models.open_skeleton(model, models.ModelSpec(source=str(model)))
    source = open_source(model, skeleton)
    count = sum(int(np.prod(source.shape(name))) for name in source.names())
    texts = rows_of(assets, model, rows)
    with tempfile.TemporaryDirectory() as folder:
        exact = write_format(source, "gguf:f32", Path(folder) / "f32").path
        answers = Runner(exact)
        reference = [answers.log_probabilities(row) for row in texts]
        for mix in mixes:
            began = time.process_time()
            ours = write_format(source, f"gguf:{mix}", Path(folder) / mix).path
            seconds = time.process_time() - began
            theirs = Path(folder) / f"theirs-{mix}.gguf"
            their_seconds = quantize(exact, theirs, mix)
            mine, other = errors(ours, exact), errors(theirs, exact)
            ratios = [mine[name] / other[name] for name in mine] or [1.0]
            weights = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(ours).tensors)
            yield {
                "mix": mix, "bytes": ours.stat().st_size, "bits": weights * 8 / count,
                "same_types": types(ours) == types(theirs), "seconds": seconds,
                "seconds_llama_cpp": their_seconds,
                "qft": divergence(reference, Runner(ours), texts),
                "llama_cpp": divergence(reference, Runner(theirs), texts),
                "error_ratio_median": statistics.median(ratios), "error_ratio_max": max(ratios),
                "positions": len(texts) * LENGTH, "date": date.today().isoformat(),
            }  # fmt: skip


def types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


def speeds() -> Iterator[dict[str, Any]]:
    """Millions of numbers a CPU-second, by type, of both quantizers on one thread."""
    torch.manual_seed(0)
    rows, weights = torch.randn(512, 2048), torch.rand(2048) + 0.1
    for kind, stored in TYPES.items():
        if stored.block == 1:
            continue
        row: dict[str, Any] = {"type": kind}
        for name, importance in (("", None), ("_importance", weights)):
            row[f"qft{name}"] = speed(encode, rows, kind, importance)
            row[f"llama_cpp{name}"] = speed(encode_by_ggml, rows, kind, importance)
        yield row


def speed(make: Callable[[Tensor, str, Tensor | None], object], rows: Tensor, kind: str,
          importance: Tensor | None) -> float:  # fmt: skip
    """Millions of numbers a CPU-second, the median of five times."""
    taken = []
    for _ in range(5):
        began = time.process_time()
        make(rows, kind, importance)
        taken.append(time.process_time() - began)
    return rows.numel() / 1e6 / statistics.median(taken)


def encode_by_ggml(rows: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """Rows as the bytes of a type, rounded by ggml itself."""
    import llama_cpp

    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]  # fmt: skip
    out = torch.empty(len(rows), TYPES[kind].row_bytes(rows.shape[1]), dtype=torch.uint8)
    weights = None if importance is None else importance.data_ptr()
    library.ggml_quantize_chunk(TYPES[kind].number, rows.data_ptr(), out.data_ptr(), 0,
                                *rows.shape, weights)  # fmt: skip
    return out


def table(found: dict[str, Any]) -> str:
    """Both tables of docs/export.md."""
    lines = [
        "| mix | file, kB | bits a weight | KL, mean | llama.cpp's | KL, 99th percentile "
        "| llama.cpp's | same first choice | llama.cpp's "
        "| squared error, qft / llama.cpp: median | worst |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found["mixes"], key=lambda row: SHOWN.index(row["mix"])):
        mine, other = row["qft"], row["llama_cpp"]
        ratio = row["error_ratio_median"] != 1 or row["mix"] not in ("f16", "bf16")
        lines.append(
            f"| `{row['mix']}` | {row['bytes'] / 1000:,.0f} | {row['bits']:.2f} "
            f"| {mine['mean_kl']:.2g} | {other['mean_kl']:.2g} | {mine['p99_kl']:.2g} "
            f"| {other['p99_kl']:.2g} | {mine['top1']:.1%} | {other['top1']:.1%} "
            + (f"| {row['error_ratio_median']:.2f} | {row['error_ratio_max']:.2f} |"
               if ratio else "| – | – |")
        )  # fmt: skip
    lines += [
        "",
        "| type | qft, M numbers a CPU-second | llama.cpp's | qft with importance | llama.cpp's |",
        "|---|---|---|---|---|",
    ]
    for row in found["speeds"]:
        lines.append(
            f"| `{row['type']}` | {row['qft']:.1f} | {row['llama_cpp']:.1f} "
            f"| {row['qft_importance']:.1f} | {row['llama_cpp_importance']:.1f} |"
        )
    return "\n".join(lines)


def redraw() -> None:
    """Puts the tables between the marks of docs/export.md."""
    text = PAGE.read_text("utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    drawn = table(json.loads(RESULTS.read_text("utf-8")))
    PAGE.write_text(f"{before}{BEGIN}\n{drawn}\n{END}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, default=6, help="of each of the four texts")
    parser.add_argument("--mixes", default=",".join(SHOWN))
    parser.add_argument("--redraw", action="store_true", help="draw the tables and measure nothing")
    options = parser.parse_args()
    if not options.redraw:
        torch.set_num_threads(1)
        mixes = []
        for row in measured(options.assets / "models/mini-6m", options.assets, options.rows,
                            options.mixes.split(",")):  # fmt: skip
            print(json.dumps(row), flush=True)
            mixes.append(row)
        found = {"environment": environment(), "mixes": mixes, "speeds": list(speeds())}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    redraw()


if __name__ == "__main__":
    main()
