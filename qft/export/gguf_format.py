"""GGUF, the format of llama.cpp and Ollama: one file with weights, settings and tokenizer.

The layout follows llama.cpp's own converter: matrices in the asked type, vectors in float32, the
rows of Llama's query and key projections reordered for its rotary embedding, and the output matrix
left out where it is tied to the embedding.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qft.errors import ModelError
from qft.export.gguf_tokenizer import Vocabulary, read_vocabulary, write_vocabulary
from qft.merging.merge import Progress, write_config
from qft.merging.side_files import copy_files
from qft.merging.tensors import TensorSource
from qft.models import open_tokenizer

_Type = gguf.GGMLQuantizationType
TYPES: dict[str, tuple[Any, Any]] = {
    "f32": (_Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (_Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (_Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (_Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
# Architecture → llama.cpp's name for it, and whether its q and k rows are reordered.
_ARCHITECTURES = {
    "LlamaForCausalLM": (gguf.MODEL_ARCH.LLAMA, True),
    "MistralForCausalLM": (gguf.MODEL_ARCH.LLAMA, True),
    "Qwen2ForCausalLM": (gguf.MODEL_ARCH.QWEN2, False),
}
_HEADER_SLACK_BYTES = 2**20
_LARGEST_F16 = 65504


@dataclass(frozen=True)
class _Planned:
    """One tensor of the file."""

    name: str  # in the checkpoint
    written: str  # in the file
    shape: tuple[int, ...]
    type: Any
    heads: int  # > 0: the rows are reordered for so many heads

    @property
    def bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // int(block) * int(size)


class GGUFPlan:
    """What a GGUF file of a source will hold; refuses before anything is written.

    Args:
        source: the model.
        kind: one of TYPES.

    Raises:
        ModelError: the architecture, a setting or a tensor cannot be expressed.
    """

    def __init__(self, source: TensorSource, kind: str) -> None:
        self.source, self.kind = source, kind
        self.config = source.config
        named = str((self.config.get("architectures") or ["unknown"])[0])
        if named not in _ARCHITECTURES:
            raise ModelError(
                f"qft cannot write {named} as GGUF.",
                found=f"it can write {', '.join(_ARCHITECTURES)}",
                fix="export to bnb:nf4, bnb:int8 or safetensors:bf16",
            )
        self.arch, self._reorder = _ARCHITECTURES[named]
        _refuse_settings(self.config)
        self.notes: list[str] = []
        self.tensors = self._plan()
        fell_back = [t.written for t in self.tensors if t.type == _Type.F16 and kind == "q8_0"]
        if fell_back:
            self.notes.append(
                f"{len(fell_back)} tensor(s) stay in f16, because q8_0 needs rows in multiples of "
                f"32: {', '.join(fell_back[:3])}{' …' * (len(fell_back) > 3)}"
            )

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Bytes of the tensors, plus room for the header and the vocabulary."""
        padding = int(gguf.GGUF_DEFAULT_ALIGNMENT) * len(self.tensors)
        return (
            self.tensor_bytes + padding + _HEADER_SLACK_BYTES + 64 * int(self.config["vocab_size"])
        )

    def _plan(self) -> list[_Planned]:
        mapping = gguf.get_tensor_name_map(self.arch, int(self.config["num_hidden_layers"]))
        planned = [self._planned(name, mapping) for name in self.source.names()]
        tensors = [tensor for tensor in planned if tensor is not None]
        if self.config.get("tie_word_embeddings"):
            tensors = [tensor for tensor in tensors if tensor.written != "output.weight"]
        return tensors

    def _planned(self, name: str, mapping: Any) -> _Planned | None:
        module = self.source.module(name)
        if module.endswith("rotary_emb.inv_freq"):
            return None  # computed from the settings
        written = mapping.get_name(module, try_suffixes=(".weight", ".bias"))
        if written is None:
            raise ModelError("GGUF has no name for a tensor of this model.", where=module)
        shape = self.source.shape(name)
        wanted = TYPES[self.kind][0]
        kind = _Type.F32 if len(shape) == 1 else wanted
        if kind == _Type.Q8_0 and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = _Type.F16
        return _Planned(name, written, shape, kind, self._heads(written))

    def _heads(self, written: str) -> int:
        if not self._reorder:
            return 0
        if ".attn_q." in written:
            return int(self.config["num_attention_heads"])
        return _kv_heads(self.config) if ".attn_k." in written else 0

    def values(self, tensor: _Planned) -> NDArray[Any]:
        """A tensor's data as it is in the file."""
        value = self.source.read(tensor.name)
        if tensor.heads:
            value = reorder_rows(value, tensor.heads)
        if tensor.type == _Type.F16 and value.abs().max() > _LARGEST_F16:
            raise ModelError("A weight is too large for float16.", where=tensor.name,
                             fix="export to gguf:bf16 or gguf:f32")  # fmt: skip
        array = value.float().numpy()
        del value  # one copy of a large embedding less
        data: NDArray[Any] = gguf.quantize(array, tensor.type)
        return data


def reorder_rows(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection: each head's two halves interleaved.

    transformers rotates the pairs (i, i + d/2) of a head, llama.cpp's Llama the pairs (2i, 2i + 1).
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _kv_heads(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings in transformers 5's spelling, from either spelling."""
    values = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    values.setdefault("rope_type", values.pop("type", "default"))
    values.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    return values


def _refuse_settings(config: Mapping[str, Any]) -> None:
    """Settings llama.cpp would silently run differently."""
    rope = _rope(config)
    problems = {
        f"rope_type: {rope['rope_type']}": rope["rope_type"] not in ("default", "linear", "llama3"),
        f"hidden_act: {config.get('hidden_act')}": config.get("hidden_act", "silu") != "silu",
        f"sliding_window: {config.get('sliding_window')}": bool(config.get("sliding_window"))
        and config.get("use_sliding_window", True) is not False
        and int(config["sliding_window"]) < int(config["max_position_embeddings"]),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    found = [name for name, wrong in problems.items() if wrong]
    if found:
        raise ModelError(
            "GGUF readers would run this model with other arithmetic than it was trained with.",
            where="config.json",
            found=", ".join(found),
            fix="export to bnb:nf4, bnb:int8 or safetensors:bf16",
        )


def write_gguf(plan: GGUFPlan, folder: Path, progress: Progress | None = None) -> Path:
    """Writes the file, and the tokenizer and config beside it; returns the file's path.

    Raises:
        ModelError: the tokenizer cannot be expressed.
    """
    if not plan.source.files:
        raise ModelError("GGUF holds a tokenizer, and this model folder has none.",
                         fix="add tokenizer.json and tokenizer_config.json")  # fmt: skip
    write_config(plan.source, folder)
    copy_files(plan.source.files, folder)
    tokenizer = open_tokenizer(folder)
    vocabulary = read_vocabulary(tokenizer, int(plan.config["vocab_size"]))
    path = folder / f"model-{plan.kind}.gguf"
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[plan.arch])
    try:
        _add_metadata(writer, plan, vocabulary, tokenizer)
        extra = _rope_factors(plan.config)
        _write(writer, plan, extra, progress)
    except OSError as error:
        if error.errno is None:  # numpy's word for a short write
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from error
        raise
    finally:
        writer.close()
    return path


def _add_metadata(writer: Any, plan: GGUFPlan, vocabulary: Vocabulary, tokenizer: Any) -> None:
    config = plan.config
    heads = int(config["num_attention_heads"])
    head_size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(int(TYPES[plan.kind][1]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(_kv_heads(config))
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_rope_dimension_count(head_size)
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    write_vocabulary(writer, vocabulary, tokenizer, config)


def _rope_factors(config: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """Llama 3.1's slowed-down frequencies, as the divisors llama.cpp reads from a tensor.

    https://github.com/meta-llama/llama-models/blob/main/models/llama3/reference_impl/model.py
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    wavelength = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    factor, context = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    divisors: NDArray[np.float32] = (1 / ((1 - smooth) / factor + smooth)).numpy()
    return divisors


def _write(
    writer: Any, plan: GGUFPlan, factors: NDArray[np.float32] | None, progress: Progress | None
) -> None:
    """Header first, then tensor by tensor; one tensor is in memory."""
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for tensor in plan.tensors:
        writer.add_tensor_info(
            tensor.written, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=tensor.type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for tensor in plan.tensors:
        writer.write_tensor_data(plan.values(tensor))
        if progress:
            progress(tensor.bytes)
