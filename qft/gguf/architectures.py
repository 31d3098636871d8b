"""llama.cpp's name for each architecture, its settings, and where each tensor of a model goes.

Facts of llama.cpp's own converter: the rows of Llama's query and key projections are reordered for
its rotary embedding, and the output matrix is left out where it is tied to the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from qft.errors import ModelError
from qft.gguf.file import Value
from qft.merging.tensors import RowSource
from qft.shards import row_blocks

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Mapped:
    """One tensor of the file.

    Attributes:
        name: in the file.
        shape: as torch says it; the last axis is a row.
        blocks: its numbers in blocks of rows, floating, in order.
        source: the tensor of the checkpoint it is made from; None for a computed one.
    """

    name: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]
    source: str | None = None


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures, as a checkpoint of transformers is written in it.

    Attributes:
        name: llama.cpp's.
        settings: config.json → what llama.cpp reads, keys without the architecture's prefix.
        interleaved: whether the rows of q and k are reordered (:func:`reorder_rows`).
    """

    name: str
    settings: Callable[[Config], dict[str, Value]]
    interleaved: bool = False

    def metadata(self, config: Config) -> dict[str, Value]:
        """What the file says of the architecture."""
        return {f"{self.name}.{key}": value for key, value in self.settings(config).items()}

    def tensors(self, source: RowSource) -> list[Mapped]:
        """Every tensor of the file, in its order.

        Raises:
            ModelError: GGUF has no name for one of the model's.
        """
        config = source.config
        numbers = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(numbers[self.name], int(config["num_hidden_layers"]))
        found = [*_rope_factors(config)]
        for name in source.names():
            module = source.module(name)
            if module.endswith("rotary_emb.inv_freq"):
                continue  # computed from the settings
            written = names.get_name(module, try_suffixes=(".weight", ".bias"))
            if written is None:
                raise ModelError("GGUF has no name for a tensor of this model.", where=module)
            if written == "output.weight" and config.get("tie_word_embeddings"):
                continue
            found.append(self._mapped(source, name, written))
        return found

    def _mapped(self, source: RowSource, name: str, written: str) -> Mapped:
        shape, heads = source.shape(name), self._heads(source.config, written)
        blocks = reordered(source, name, heads) if heads else lambda: source.blocks(name)
        return Mapped(written, shape, blocks, name)

    def _heads(self, config: Config, written: str) -> int:
        """Into how many heads the rows of a tensor are to be reordered; 0: not at all."""
        if not self.interleaved:
            return 0
        if ".attn_q." in written:
            return int(config["num_attention_heads"])
        return kv_heads(config) if ".attn_k." in written else 0


def architecture_of(config: Config) -> Architecture:
    """The architecture of a model.

    Raises:
        ModelError: llama.cpp has none for it, or would silently run it with other arithmetic.
    """
    named = str((config.get("architectures") or ["unknown"])[0])
    if named not in ARCHITECTURES:
        raise ModelError(
            f"qft cannot write {named} as GGUF.",
            found=f"it can write {', '.join(ARCHITECTURES)}",
            fix="export to bnb:nf4, bnb:int8 or safetensors:bf16",
        )
    _refuse_settings(config)
    return ARCHITECTURES[named]


def reordered(source: RowSource, name: str, heads: int) -> Callable[[], Iterator[Tensor]]:
    """The tensor in blocks of whole heads, each reordered by :func:`reorder_rows`."""
    shape = source.shape(name)
    size = shape[0] // heads

    def blocks() -> Iterator[Tensor]:
        for part in row_blocks((heads, size, *shape[1:])):
            rows = source.rows(name, slice(part.start * size, part.stop * size))
            yield reorder_rows(rows, part.stop - part.start)

    return blocks


def reorder_rows(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection: each head's two halves interleaved.

    transformers rotates the pairs (i, i + d/2) of a head, llama.cpp's Llama the pairs (2i, 2i + 1).
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def kv_heads(config: Config) -> int:
    """How many heads of keys and values there are."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def head_size(config: Config) -> int:
    """Numbers a head."""
    own = config.get("head_dim")
    return int(own or int(config["hidden_size"]) // int(config["num_attention_heads"]))


def rope_settings(config: Config) -> dict[str, Any]:
    """Rotary settings in transformers 5's spelling, from either spelling."""
    values = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    values.setdefault("rope_type", values.pop("type", "default"))
    values.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    return values


def _refuse_settings(config: Config) -> None:
    """Settings llama.cpp would silently run differently."""
    rope = rope_settings(config)
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


def _llama_settings(config: Config) -> dict[str, Value]:
    size = head_size(config)
    values: dict[str, Value] = {
        "block_count": int(config["num_hidden_layers"]),
        "context_length": int(config["max_position_embeddings"]),
        "embedding_length": int(config["hidden_size"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": int(config["num_attention_heads"]),
        "attention.head_count_kv": kv_heads(config),
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "vocab_size": int(config["vocab_size"]),
        "rope.dimension_count": size,
    }
    rope = rope_settings(config)
    values["rope.freq_base"] = float(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return values


def _rope_factors(config: Config) -> list[Mapped]:
    """Llama 3.1's slowed-down frequencies, as the divisors llama.cpp reads from a tensor.

    https://github.com/meta-llama/llama-models/blob/main/models/llama3/reference_impl/model.py
    """
    rope = rope_settings(config)
    if rope["rope_type"] != "llama3":
        return []
    size = head_size(config)
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    wavelength = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    factor, context = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    divisors = 1 / ((1 - smooth) / factor + smooth)
    return [Mapped("rope_freqs.weight", tuple(divisors.shape), lambda: iter([divisors]))]


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", _llama_settings, interleaved=True),
    "MistralForCausalLM": Architecture("llama", _llama_settings, interleaved=True),
    "Qwen2ForCausalLM": Architecture("qwen2", _llama_settings),
}
