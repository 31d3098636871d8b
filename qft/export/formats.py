"""`write_format`: any tensor source in any of the FORMATS, atomically."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qft.calibration import Calibration
from qft.errors import RecipeError
from qft.export.writers import WRITERS, ExportReport, Writing
from qft.files import require_absent
from qft.merging.merge import Progress
from qft.merging.tensors import MergedTensors
from qft.shard_writer import MAX_SHARD_BYTES

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
    "torchao:int8": "transformers with torchao, weights of 8 bits",
    "safetensors:bf16": "transformers, vLLM and most others, 16 bits",
    "safetensors:fp16": "the same, for hardware without bfloat16",
    "safetensors:fp32": "the same, 32 bits",
    "onnx:fp32": "onnxruntime, encoders only, 32 bits",
    "onnx:int8": "onnxruntime, encoders only, 8 bits",
}

# Families, or formats where one differs from its family, whose rounding can be fitted to rows →
# whether it is, unless the user says otherwise.
FITTED: dict[str, bool] = {
    "gguf": False,  # it costs a pass of the rows through the model
    "compressed-tensors": False,  # 8 bits lose next to nothing as it is
    "compressed-tensors:w4a16": True,
    "torchao": False,
}
_BY_ITSELF = ("gguf:f32", "gguf:f16", "gguf:bf16", "gguf:q8_0")  # each number, or its block


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
    job = Writing(source, format, out, max_shard_bytes, calibration, stops, overwrite, progress)
    return WRITERS[format.partition(":")[0]](job)


def fits_to_rows(format: str) -> bool:
    """Whether the rounding of a format can be fitted to rows."""
    return format.split(":")[0] in FITTED and format not in _BY_ITSELF


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
