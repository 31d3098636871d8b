"""Keys and values of a generation, by the very cache that transformers makes for a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def key_value_bytes(config: Any, rows: int, positions: int, dtype: torch.dtype) -> int:
    """Of all layers' keys and values once so many positions were seen; windows forget.

    Args:
        config: the transformers config of a model that writes text.
        rows: texts written at once.
        positions: prompt and answer, of the longest.
        dtype: of the weights.
    """
    return sum(layer_bytes(config, rows, positions, dtype))


def layer_bytes(config: Any, rows: int, positions: int, dtype: torch.dtype) -> list[int]:
    """The same layer by layer, the lowest first, after the last token was written."""
    text = config.get_text_config(decoder=True)
    steps = [positions - 1, 1] if positions > 1 else [positions]
    return _held(text, rows, steps, dtype)


def prompt_bytes(config: Any, rows: int, prompt: int, dtype: torch.dtype) -> int:
    """After the prompt was read: layers with a window hold all of it until the next token."""
    return sum(_held(config.get_text_config(decoder=True), rows, [prompt], dtype))


def _held(text: Any, rows: int, steps: Sequence[int], dtype: torch.dtype) -> list[int]:
    from transformers.cache_utils import DynamicCache

    heads, width = _heads_of(text)
    cache: Any = DynamicCache(config=text)
    count = getattr(text, "num_hidden_layers", None) or text.num_layers
    sizes = []
    for number in range(count):
        for positions in steps:
            new = torch.empty(rows, heads, positions, width, dtype=dtype, device="meta")
            cache.update(new, new.clone(), number)
        layer = cache.layers[number]  # a window is a view of a few more positions
        sizes.append(sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values)))
    return sizes


def cross_bytes(config: Any, rows: int, source: int, dtype: torch.dtype) -> int:
    """What an encoder-decoder's decoder keeps of the encoder's output."""
    if not config.is_encoder_decoder:
        return 0
    text = config.get_text_config(decoder=True)
    heads, width = _heads_of(text)
    count = getattr(text, "num_decoder_layers", None) or text.num_hidden_layers
    return 2 * int(count) * rows * heads * width * source * dtype.itemsize


def _heads_of(config: Any) -> tuple[int, int]:
    """Heads of keys and values, and numbers a head."""
    all_heads = getattr(config, "num_attention_heads", None) or config.num_heads
    heads = getattr(config, "num_key_value_heads", None) or all_heads
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return int(heads), int(width or config.hidden_size // all_heads)
