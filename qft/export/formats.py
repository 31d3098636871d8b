"""`write_format`: any tensor source in any of the FORMATS, atomically."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qft.calibration import Calibration
from qft.errors import RecipeError
from qft.export.delta_rounding import DeltaRounding
from qft.files import new_folder, require_absent, require_disk
from qft.merging.merge import Progress, write_model
from qft.merging.side_files import files_bytes
from qft.merging.tensors import MergedTensors, TensorSource
from qft.shard_writer import MAX_SHARD_BYTES
from qft.shards import tensor_bytes

FORMATS = {
    "gguf:f16": "llama.cpp and Ollama, 16 bits",
    "gguf:q8_0": "llama.cpp and Ollama, 8 bits",
    "gguf:bf16": "llama.cpp and Ollama, 16 bits, the range of float32",
    "gguf:f32": "llama.cpp and Ollama, 32 bits",
    "bnb:nf4": "transformers, 4 bits",
    "bnb:int8": "transformers, 8 bits",
    "safetensors:bf16": "transformers, vLLM and most others, 16 bits",
    "safetensors:fp16": "the same, for hardware without bfloat16",
    "safetensors:fp32": "the same, 32 bits",
    "onnx:fp32": "onnxruntime, encoders only, 32 bits",
    "onnx:int8": "onnxruntime, encoders only, 8 bits",
}

# Families whose rounding can be fitted to rows → whether it is, unless the user says otherwise.
FITTED: dict[str, bool] = {}


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        format: one of FORMATS.
        path: the .gguf file, or the model folder.
        bytes: of the tensors on disk.
        notes: what a user should know, a sentence each.
        delta_rounding: what a quantized format has left of an adapter's change.
    """

    format: str
    path: Path
    bytes: int
    notes: tuple[str, ...] = ()
    delta_rounding: DeltaRounding | None = None


def write_format(
    source: MergedTensors,
    format: str,
    out: Path | str,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    calibration: Calibration | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes ``source`` in one of FORMATS into the folder ``out``, tensor by tensor.

    Args:
        source: from :func:`qft.merging.merge.open_source`; no merged copy is made on disk.
        format: a key of FORMATS.
        out: the folder to make; a GGUF file lies in it beside its tokenizer and config.
        max_shard_bytes: larger models are split (not GGUF).
        calibration: rows to fit the rounding to, for a format that :func:`fits_to_rows`.
        overwrite: replace what ``out`` holds, once the new one is complete.
        progress: called with the source's bytes done; they add up to the source's own total.

    Raises:
        RecipeError: there is no such format.
        ModelError: the format cannot express this model or its tokenizer.
        OutputExistsError: ``out`` is taken.
        SaveError: the disk is full; nothing is left behind.
    """
    out = Path(out)
    require_known(format)
    require_absent(out, overwrite=overwrite)
    family, _, kind = format.partition(":")
    total = _source_bytes(source)
    if family == "safetensors":
        from qft.export.safetensors_format import DTYPES, InDtype

        cast = InDtype(source, DTYPES[kind])
        written = write_model(
            cast, out, max_shard_bytes=max_shard_bytes, overwrite=overwrite,
            progress=_scaled(progress, _source_bytes(cast), total),
        )  # fmt: skip
        return ExportReport(format, out, written)
    if family == "bnb":
        from qft.export.bnb_format import BnbPlan, write_bnb

        quantized = BnbPlan(source, kind)
        require_disk(out, quantized.bytes + files_bytes(source.files))
        with new_folder(out, overwrite=overwrite) as folder:
            write_bnb(quantized, folder, max_shard_bytes,
                      _scaled(progress, quantized.bytes, total))  # fmt: skip
        return ExportReport(format, out, quantized.bytes, tuple(quantized.notes),
                            quantized.delta_rounding())  # fmt: skip
    if family == "onnx":
        from qft.export.onnx_format import OnnxPlan, write_onnx

        traced = OnnxPlan(source, kind)
        require_disk(out, traced.bytes + files_bytes(source.files))
        with new_folder(out, overwrite=overwrite) as folder:
            written = write_onnx(traced, folder, progress)
        return ExportReport(format, out, written, tuple(traced.notes))
    from qft.export.gguf_format import GGUFPlan, write_gguf

    plan = GGUFPlan(source, kind)
    require_disk(out, plan.bytes + files_bytes(source.files))
    with new_folder(out, overwrite=overwrite) as folder:
        name = write_gguf(plan, folder, _scaled(progress, plan.tensor_bytes, total)).name
    return ExportReport(format, out / name, (out / name).stat().st_size, tuple(plan.notes))


def _source_bytes(source: TensorSource) -> int:
    return sum(tensor_bytes(source.shape(name), source.dtype(name)) for name in source.names())


def _scaled(progress: Progress | None, written: int, total: int) -> Progress | None:
    """Reports bytes of the file as bytes of the source, exact at the end."""
    if progress is None:
        return None
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        progress(done * total // max(1, written) - before * total // max(1, written))

    return advance


def fits_to_rows(format: str) -> bool:
    """Whether the rounding of a format can be fitted to rows."""
    return format.split(":")[0] in FITTED


def require_known(format: str) -> None:
    """Raises RecipeError where there is no such format."""
    if format not in FORMATS:
        raise RecipeError(
            "There is no such export format.",
            where="--format",
            found=format,
            fix=f"one of {', '.join(FORMATS)}",
        )
