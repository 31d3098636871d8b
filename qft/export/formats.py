"""`write_format`: any tensor source in any of the FORMATS, atomically."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qft.calibration import Calibration
from qft.errors import RecipeError
from qft.export.delta_rounding import DeltaRounding
from qft.files import folder_bytes, new_folder, require_absent, require_disk, unfinished
from qft.merging.merge import Progress, write_model
from qft.merging.side_files import files_bytes
from qft.merging.tensors import MergedTensors, TensorSource
from qft.shard_writer import MAX_SHARD_BYTES
from qft.shards import tensor_bytes

# Bits of the GGUF mixes: of a model of Llama 3.1 8B's shape.
FORMATS = {
    "gguf:f16": "llama.cpp and Ollama, 16 bits",
    "gguf:q8_0": "llama.cpp and Ollama, 8.5 bits a weight",
    "gguf:q6_k": "llama.cpp and Ollama, 6.6 bits",
    "gguf:q5_k_m": "llama.cpp and Ollama, 5.7 bits",
    "gguf:q5_k_s": "llama.cpp and Ollama, 5.6 bits",
    "gguf:q4_k_m": "llama.cpp and Ollama, 4.9 bits: the usual choice",
    "gguf:q4_k_s": "llama.cpp and Ollama, 4.7 bits",
    "gguf:q3_k_l": "llama.cpp and Ollama, 4.3 bits",
    "gguf:q3_k_m": "llama.cpp and Ollama, 4.0 bits",
    "gguf:q3_k_s": "llama.cpp and Ollama, 3.6 bits",
    "gguf:q2_k": "llama.cpp and Ollama, 3.2 bits: a last resort",
    "gguf:iq4_nl": "llama.cpp and Ollama, 4.7 bits in blocks of 32, for narrow rows",
    "gguf:q4_0": "llama.cpp and Ollama, 4.6 bits; an older type, fast on ARM",
    "gguf:q4_1": "llama.cpp and Ollama, 5.1 bits; an older type",
    "gguf:q5_0": "llama.cpp and Ollama, 5.6 bits; an older type",
    "gguf:q5_1": "llama.cpp and Ollama, 6.0 bits; an older type",
    "gguf:bf16": "llama.cpp and Ollama, 16 bits, the range of float32",
    "gguf:f32": "llama.cpp and Ollama, 32 bits",
    "gguf-lora:f16": "the adapter alone, for llama.cpp and Ollama to add to its base, 16 bits",
    "gguf-lora:q8_0": "the same, 8 bits",
    "gguf-lora:f32": "the same, 32 bits",
    "bnb:nf4": "transformers, 4 bits",
    "bnb:int8": "transformers, 8 bits",
    "compressed-tensors:w4a16": "vLLM and transformers, weights of 4 bits",
    "compressed-tensors:w8a16": "vLLM and transformers, weights of 8 bits",
    "compressed-tensors:w8a8": "vLLM and transformers, weights and inputs of 8 bits",
    "safetensors:bf16": "transformers, vLLM and most others, 16 bits",
    "safetensors:fp16": "the same, for hardware without bfloat16",
    "safetensors:fp32": "the same, 32 bits",
    "onnx:fp32": "onnxruntime, encoders only, 32 bits",
    "onnx:int8": "onnxruntime, encoders only, 8 bits",
}

# Families, or formats where one differs from its family, whose rounding can be fitted to rows →
# whether it is, unless the user says otherwise.
FITTED: dict[str, bool] = {
    "compressed-tensors": False,  # 8 bits lose next to nothing as it is
    "compressed-tensors:w4a16": True,
}


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        format: one of FORMATS.
        path: the .gguf file (of the model, or of the adapter alone), or the model folder.
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
    stops: Sequence[int] = (),
) -> ExportReport:
    """Writes ``source`` in one of FORMATS into the folder ``out``, tensor by tensor.

    GGUF and safetensors that were killed or interrupted go on where they were, to the same bytes.

    Args:
        source: from :func:`qft.merging.merge.open_source`; no merged copy is made on disk.
        format: a key of FORMATS.
        out: the folder to make; a GGUF file lies in it beside its tokenizer and config.
        max_shard_bytes: larger models are split (not GGUF).
        calibration: rows to fit the rounding to, for a format that :func:`fits_to_rows`.
        overwrite: replace what ``out`` holds, once the new one is complete.
        progress: called with the source's bytes done; they add up to the source's own total.
        stops: tokens that must end a generation, beside those the source's own files name; a GGUF
            file holds them all.

    Raises:
        RecipeError: there is no such format.
        AdapterError: the adapter cannot stand apart from its base in this format.
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
    if family == "compressed-tensors":
        from qft.export.compressed_format import CompressedPlan, write_compressed

        compressed = CompressedPlan(source, kind, calibration)
        work = compressed.bytes + compressed.fitted_bytes
        write_compressed(compressed, out, max_shard_bytes=max_shard_bytes, overwrite=overwrite,
                         progress=_scaled(progress, work, total))  # fmt: skip
        return ExportReport(format, out, compressed.bytes, tuple(compressed.notes),
                            compressed.delta_rounding())  # fmt: skip
    if family == "gguf-lora":
        return _write_adapter(source, format, out, overwrite, progress, stops)
    from qft.export.gguf_format import GGUFPlan, write_gguf

    plan = GGUFPlan(source, kind, stops=stops)
    require_disk(out, max(0, plan.bytes - folder_bytes(unfinished(out))))
    with new_folder(out, overwrite=overwrite, go_on=True) as folder:
        name = write_gguf(plan, folder, _scaled(progress, plan.tensor_bytes, total)).name
    return ExportReport(format, out / name, (out / name).stat().st_size, tuple(plan.notes))


def _write_adapter(
    source: MergedTensors,
    format: str,
    out: Path,
    overwrite: bool,
    progress: Progress | None,
    stops: Sequence[int],
) -> ExportReport:
    from qft.export.gguf_adapter_format import AdapterPlan, write_adapter

    plan = AdapterPlan(source, format.partition(":")[2], stops)
    require_disk(out, max(0, plan.bytes - folder_bytes(unfinished(out))))
    with new_folder(out, overwrite=overwrite, go_on=True) as folder:
        scaled = _scaled(progress, plan.tensor_bytes, _source_bytes(source))
        name = write_adapter(plan, folder, scaled).name
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


def fitted_unasked(format: str) -> bool:
    """Whether it is fitted where the user does not say, and rows are at hand."""
    return FITTED.get(format, FITTED.get(format.split(":")[0], False))


def require_known(format: str) -> None:
    """Raises RecipeError where there is no such format."""
    if format not in FORMATS:
        raise RecipeError(
            "There is no such export format.",
            where="--format",
            found=format,
            fix=f"one of {', '.join(FORMATS)}",
        )
