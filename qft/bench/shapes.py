"""The shapes of well-known models, as their config.json has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qft.errors import RecipeError, first_line

_LLAMA = {"model_type": "llama", "vocab_size": 128256, "rope_theta": 500000.0,
          "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}  # fmt: skip
_QWEN = {"model_type": "qwen2", "rope_theta": 1000000.0, "max_position_embeddings": 32768,
         "rms_norm_eps": 1e-6}  # fmt: skip
_GEMMA = {"model_type": "gemma3_text", "rope_theta": 1000000.0, "max_position_embeddings": 32768,
          "head_dim": 256, "tie_word_embeddings": True, "attn_logit_softcapping": None,
          "final_logit_softcapping": None}  # fmt: skip


def _sizes(
    hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }


def _qwen(vocabulary: int, tied: bool, *sizes: int) -> dict[str, Any]:
    return _QWEN | {"vocab_size": vocabulary, "tie_word_embeddings": tied} | _sizes(*sizes)


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA | _sizes(4096, 14336, 32, 32, 8),
    "llama-3.1-70b": _LLAMA | _sizes(8192, 28672, 80, 64, 8),
    "llama-3.2-1b": _LLAMA | _sizes(2048, 8192, 16, 32, 8) | {"tie_word_embeddings": True},
    "llama-3.2-3b": _LLAMA | _sizes(3072, 8192, 28, 24, 8) | {"tie_word_embeddings": True},
    "qwen2.5-0.5b": _qwen(151936, True, 896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": _qwen(151936, True, 1536, 8960, 28, 12, 2),
    "qwen2.5-3b": _qwen(151936, True, 2048, 11008, 36, 16, 2),
    "qwen2.5-7b": _qwen(152064, False, 3584, 18944, 28, 28, 4),
    "qwen2.5-14b": _qwen(152064, False, 5120, 13824, 48, 40, 8),
    "qwen2.5-32b": _qwen(152064, False, 5120, 27648, 64, 40, 8),
    "gemma-3-1b": _GEMMA
    | {"vocab_size": 262144, "sliding_window": 512}
    | _sizes(1152, 6912, 26, 4, 1),
    "gemma-3-4b": _GEMMA
    | {"vocab_size": 262208, "sliding_window": 1024}
    | _sizes(2560, 10240, 34, 8, 4),
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32768,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "sliding_window": None,
    }
    | _sizes(4096, 14336, 32, 32, 8),
    "bert-base": {"model_type": "bert", "vocab_size": 30522},
    "t5-base": {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 3072,
        "num_layers": 12,
        "num_heads": 12,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    },
}
TASKS = {"bert": "classify", "t5": "seq2seq"}  # what a shape is metered for, if not as a text model


def shape_config(name: str) -> Any:
    """The transformers config of a built-in shape, or of a folder or file with a config.json.

    Raises:
        RecipeError: there is no such shape.
    """
    from transformers import AutoConfig

    if name in SHAPES:
        values = dict(SHAPES[name])
    else:
        path = Path(name)
        path = path / "config.json" if path.is_dir() else path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            from qft.registry import suggestion

            raise RecipeError(
                "There is no such shape.",
                where="--shape",
                found=f"{name} ({type(error).__name__})",
                fix=f"{suggestion(name, list(SHAPES))}; or a config.json",
            ) from None
    if not isinstance(values, dict):
        raise RecipeError("This is no model's config.", where="--shape", found=name)
    kind = values.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:  # transformers checks its configs with errors of many kinds
        raise RecipeError("transformers does not take this config.", where="--shape",
                          found=f"model_type {kind!r}: {first_line(error)}") from error  # fmt: skip
