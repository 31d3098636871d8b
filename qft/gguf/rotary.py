"""Rotary settings as llama.cpp reads them: keys, and divisors of the frequencies as tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch

from qft.gguf.contract import Config, Mapped
from qft.gguf.file import Value

_YARN_BETAS = {"beta_fast": 32, "beta_slow": 1}  # these architectures read no others


def rope_of(config: Config, layers: str = "full_attention") -> dict[str, Any]:
    """Rotary settings of a whole config; of one kind of layers where the kinds differ."""
    values: Mapping[str, Any] = config.get("rope_parameters") or {}
    return dict(values.get(layers, values))


def head_size(config: Config) -> int:
    """Numbers a head."""
    own = config.get("head_dim")
    return int(own or int(config["hidden_size"]) // int(config["num_attention_heads"]))


def rotated(config: Config) -> int:
    """How many numbers of a head are rotated."""
    return int(head_size(config) * float(rope_of(config).get("partial_rotary_factor") or 1.0))


def rope_problems(config: Config, kinds: Collection[str], *, partial: bool = False) -> list[str]:
    """What llama.cpp has no setting for.

    Args:
        config: from :func:`qft.gguf.contract.whole_config`.
        kinds: the ``rope_type`` values its architecture can run, beside ``default``.
        partial: whether it can leave a part of each head as it is.
    """
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    found = [] if kind in ("default", *kinds) else [f"rope_type: {kind}"]
    if not partial and rotated(config) != head_size(config):
        found.append(f"partial_rotary_factor: {rope['partial_rotary_factor']}")
    if kind == "yarn":
        for key, value in _YARN_BETAS.items():
            if (rope.get(key) or value) != value:
                found.append(f"{key}: {rope[key]}")
        if rope.get("truncate", True) is not True:
            found.append(f"truncate: {rope['truncate']}")
    return found


def rope_settings(config: Config) -> dict[str, Value]:
    """The keys of the rotary embedding."""
    rope = rope_of(config)
    values: dict[str, Value] = {
        "rope.dimension_count": rotated(config),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "yarn":
        values |= _yarn(config, rope)
    elif kind == "longrope":
        values |= {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": _original(config, rope),
            "rope.scaling.attn_factor": _longrope_scale(config, rope),
        }
    return values


def rope_tensors(config: Config) -> list[Mapped]:
    """Divisors of the frequencies, where scaling is not the same for all of them."""
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        return [_divisors("rope_freqs.weight", _llama3(config, rope))]
    if kind != "longrope":
        return []
    return [
        _divisors(f"rope_factors_{length}.weight", torch.tensor(rope[f"{length}_factor"]))
        for length in ("long", "short")
    ]


def _divisors(name: str, values: torch.Tensor) -> Mapped:
    exact = values.float()
    return Mapped(name, tuple(exact.shape), lambda: iter([exact]))


def _original(config: Config, rope: Mapping[str, Any]) -> int:
    """The context before it was extended."""
    own = rope.get("original_max_position_embeddings")
    return int(own or config["max_position_embeddings"])


def _yarn(config: Config, rope: Mapping[str, Any]) -> dict[str, Value]:
    """https://arxiv.org/abs/2309.00071; llama.cpp multiplies its own scale by ``attn_factor``."""
    factor = float(rope.get("factor")
                   or int(config["max_position_embeddings"]) / _original(config, rope))  # fmt: skip
    values: dict[str, Value] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": _original(config, rope),
    }
    scale = rope.get("attention_factor")
    both = (rope.get("mscale"), rope.get("mscale_all_dim"))
    if scale is None and all(both):
        scale = _yarn_scale(factor, both[0]) / _yarn_scale(factor, both[1])
    if scale is not None:
        values["rope.scaling.attn_factor"] = float(scale) / _yarn_scale(factor, 1.0)
    return values


def _yarn_scale(factor: float, weight: Any) -> float:
    return 1.0 if factor <= 1 else 0.1 * float(weight) * math.log(factor) + 1.0


def _longrope_scale(config: Config, rope: Mapping[str, Any]) -> float:
    """What queries and keys are multiplied by: https://arxiv.org/abs/2402.13753, section 3."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = _original(config, rope)
    factor = float(rope.get("factor") or int(config["max_position_embeddings"]) / original)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _llama3(config: Config, rope: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1's slowed-down frequencies.

    https://github.com/meta-llama/llama-models/blob/main/models/llama3/reference_impl/model.py
    """
    size = head_size(config)
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    wavelength = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    factor, context = float(rope["factor"]), float(_original(config, rope))
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
