"""What each format may lose, and which format an artefact is stored in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from qft import models
from qft.errors import RecipeError
from qft.export.compressed_schemes import scheme_in
from qft.export.torchao_format import is_int8
from qft.gguf.mixes import MIXES
from qft.onnx_files import stored_kind
from qft.shards import ShardedCheckpoint


@dataclass(frozen=True)
class Thresholds:
    """What a format may lose at most.

    Attributes:
        mean_kl: mean Kullback-Leibler divergence from the reference, in nats a position.
        p99_kl: its 99th percentile.
        top1: the least share of positions where both find the same token (or class) likeliest.
        perplexity_ratio: artefact's over reference's perplexity, at most.
        layer: the most that hidden states may differ after the first layer, relative to their
            length, in the mean over positions. Roundings of independent layers add up in squares:
            after ``n`` layers it is √n times as much.
    """

    mean_kl: float
    p99_kl: float
    top1: float
    perplexity_ratio: float
    layer: float = math.inf


# About ten times what the formats cost on small trained models (they suffer most from rounding),
# below 6 bits ten times on mini-6m and twice on stories260K, whose figures are far above; a
# transposed, swapped or missing tensor costs hundreds of times as much. Hidden states: at least
# twice what rounding alone moves them on both, after any layer.
THRESHOLDS = {
    "gguf:f32": Thresholds(1e-5, 1e-4, 0.999, 1.001, 5e-5),
    "gguf:f16": Thresholds(1e-3, 1e-2, 0.98, 1.01, 1.5e-3),
    "gguf:bf16": Thresholds(5e-3, 5e-2, 0.95, 1.02, 2e-2),
    "gguf:q8_0": Thresholds(1e-2, 1e-1, 0.95, 1.02, 2.5e-2),
    "gguf:q6_k": Thresholds(1e-2, 1e-1, 0.93, 1.03, 4e-2),
    "gguf:q5_k_m": Thresholds(6e-2, 0.5, 0.80, 1.10, 0.1),
    "gguf:q5_k_s": Thresholds(6e-2, 0.5, 0.80, 1.10, 0.1),
    "gguf:q5_1": Thresholds(6e-2, 0.5, 0.80, 1.10, 0.1),
    "gguf:q5_0": Thresholds(0.1, 0.7, 0.75, 1.10, 0.12),
    "gguf:q4_k_m": Thresholds(0.1, 0.7, 0.75, 1.10, 0.12),
    "gguf:q4_k_s": Thresholds(0.1, 0.7, 0.75, 1.10, 0.12),
    "gguf:q4_1": Thresholds(0.25, 1.5, 0.65, 1.15, 0.2),
    "gguf:iq4_nl": Thresholds(0.3, 2.0, 0.60, 1.15, 0.2),
    "gguf:q4_0": Thresholds(0.3, 2.0, 0.60, 1.15, 0.2),
    "gguf:q3_k_l": Thresholds(0.3, 2.0, 0.60, 1.20, 0.2),
    "gguf:q3_k_m": Thresholds(0.3, 2.0, 0.60, 1.20, 0.2),
    "gguf:q3_k_s": Thresholds(0.35, 2.5, 0.55, 1.25, 0.25),
    "gguf:q2_k": Thresholds(0.5, 3.0, 0.50, 1.35, 0.4),
    "gguf-lora:f32": Thresholds(1e-5, 1e-4, 0.999, 1.001, 5e-5),
    "gguf-lora:f16": Thresholds(1e-3, 1e-2, 0.98, 1.01, 1.5e-3),
    "gguf-lora:q8_0": Thresholds(1e-2, 1e-1, 0.95, 1.02, 2.5e-2),
    "bnb:int8": Thresholds(3e-2, 3e-1, 0.90, 1.05, 5e-2),
    "bnb:nf4": Thresholds(0.15, 1.5, 0.75, 1.15, 0.3),
    "compressed-tensors:w4a16": Thresholds(0.15, 1.5, 0.75, 1.25, 0.3),
    "compressed-tensors:w8a16": Thresholds(5e-3, 5e-2, 0.95, 1.02, 2e-2),
    "compressed-tensors:w8a8": Thresholds(1e-2, 1e-1, 0.92, 1.03, 5e-2),
    "torchao:int8": Thresholds(5e-3, 5e-2, 0.95, 1.02, 2e-2),
    "safetensors:fp32": Thresholds(1e-5, 1e-4, 0.999, 1.001, 5e-5),
    "safetensors:fp16": Thresholds(1e-3, 1e-2, 0.98, 1.01, 1.5e-3),
    "safetensors:bf16": Thresholds(5e-3, 5e-2, 0.95, 1.02, 2e-2),
    "onnx:fp32": Thresholds(1e-5, 1e-4, 0.999, 1.001, 5e-5),
    "onnx:int8": Thresholds(3e-2, 3e-1, 0.90, 1.05, 0.4),
}
_STORED = {
    torch.float32: "safetensors:fp32",
    torch.float16: "safetensors:fp16",
    torch.bfloat16: "safetensors:bf16",
}
_HELD = {"int8": "bnb:int8", "nf4": "bnb:nf4", "fp4": "bnb:nf4"}  # by how a base is quantized


def thresholds_of(format: str) -> Thresholds:
    """The thresholds of a format.

    Raises:
        RecipeError: there are none.
    """
    if format not in THRESHOLDS:
        raise RecipeError(
            "There are no thresholds for this format.",
            where="--format",
            found=format,
            fix=f"--format with the nearest of {', '.join(THRESHOLDS)}",
        )
    return THRESHOLDS[format]


def limits(format: str, quantized: Iterable[str], dtype: torch.dtype) -> Thresholds:
    """The format's thresholds, widened by what rounds beside it.

    An artefact is made from the original base; a reference on a quantized one is the one that is
    rounded, and differs from it by as much as an export to that quantization may.

    Args:
        quantized: how the weights of each side's base are held in memory: ``none``, ``nf4``, ….
        dtype: of the arithmetic.

    Raises:
        RecipeError: there are no thresholds for the format.
    """
    causes = [thresholds_of(format)]
    causes += [THRESHOLDS[_HELD[kind]] for kind in quantized if kind in _HELD]
    if dtype != torch.float32:
        causes.append(THRESHOLDS["safetensors:bf16"])
    return Thresholds(
        mean_kl=max(limit.mean_kl for limit in causes),
        p99_kl=max(limit.p99_kl for limit in causes),
        top1=min(limit.top1 for limit in causes),
        perplexity_ratio=max(limit.perplexity_ratio for limit in causes),
        layer=max(limit.layer for limit in causes),
    )


def stored_format(folder: Path, gguf: Path | None = None, onnx: Path | None = None) -> str:
    """The format of a model folder, GGUF or ONNX file, as it says itself.

    By a config's quantization, a GGUF file's ``general.file_type``, else by the type that most
    bytes have.
    """
    if gguf is not None:
        return f"gguf:{_gguf_type(gguf)}"
    if onnx is not None:
        return f"onnx:{stored_kind(onnx)}"
    stored = models.read_config(folder).get("quantization_config")
    if stored:
        kind = models.stored_kind(stored)
        if kind == models.COMPRESSED:
            return f"{kind}:{scheme_in(stored) or 'unknown'}"
        if kind == "torchao":
            return f"{kind}:int8" if is_int8(stored) else f"{kind}:unknown"
        return f"bnb:{kind}" if kind in ("int8", "nf4", "fp4") else kind
    sizes: Counter[torch.dtype] = Counter()
    with ShardedCheckpoint(folder) as checkpoint:
        for name in checkpoint.names():
            dtype = checkpoint.dtype(name)
            sizes[dtype] += math.prod(checkpoint.shape(name)) * dtype.itemsize
    held = max(sizes, key=lambda dtype: sizes[dtype])
    return _STORED.get(held, f"safetensors:{str(held).removeprefix('torch.')}")


def _gguf_type(file: Path) -> str:
    """The mix a file names, else the one of the type that most bytes have."""
    import gguf

    opened = gguf.GGUFReader(file)
    named = opened.fields.get("general.file_type")
    number = None if named is None else named.contents()
    for mix, known in MIXES.items():
        if known == number:
            return mix
    sizes: Counter[str] = Counter()
    for tensor in opened.tensors:
        sizes[tensor.tensor_type.name.lower()] += int(tensor.n_bytes)
    most = max(sizes, key=lambda kind: sizes[kind])
    return next((mix for mix in (most, f"{most}_m") if mix in MIXES), most)
