"""Where transformers asks for attention: the engine's own on a CPU, SDPA's everywhere else.

What comes through here is what SDPA is asked, mask included, and the answer is SDPA's. Beyond that,
``cu_seq_lens_q`` (the borders of several examples in one long row, as transformers names them for
FlashAttention) is heeded, so that a micro-batch needs no padding.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qft.lean.attention import Visible, attention
from qft.lean.model_parts import device_of

NAME = "qft_lean"  # under which transformers knows it


def route_attention(model: nn.Module) -> list[Any]:
    """Sends the attention of a model on a CPU through `attend`, if SDPA's was chosen.

    A model on the meta device may come to a CPU yet: there `attend` decides when it is called.

    Returns:
        The configs that said ``sdpa`` and say `NAME` now.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    if device_of(model).type not in ("cpu", "meta"):
        return []
    AttentionInterface.register(NAME, attend)
    # the masks go by the same name: without one, padding would silently be seen
    AttentionMaskInterface.register(NAME, _mask)
    configs: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
    several = {id(config): config for config in configs}
    chosen = [c for c in several.values() if getattr(c, "_attn_implementation", None) == "sdpa"]
    for config in chosen:
        config._attn_implementation = NAME
    return chosen


def _mask(*args: Any, **kwargs: Any) -> Any:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls an attention function.

    Args:
        query: ``[batch, heads, queries, width]``.
        key: ``[batch, key-value heads, keys, width]``, like ``value``.
        attention_mask: ``[batch or 1, 1, queries, keys]``, or None.
        cu_seq_lens_q: where the examples of a single row begin and end.
        kwargs: others are for SDPA.

    Returns:
        ``[batch, queries, heads, width]``, and no weights.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    borders = [0, query.shape[2]]
    if cu_seq_lens_q is not None and query.shape[0] == 1:
        borders = cu_seq_lens_q.tolist()
    several = len(borders) > 2
    square = query.shape[2] == key.shape[2]
    by_hand = (
        query.dtype == torch.bfloat16  # in float32 SDPA's kernel is as fast
        and query.device.type == "cpu"
        and (module.training or several)
        and dropout == 0
        and square
        and _is_known(attention_mask)
        and not any(kwargs.get(name) is not None for name in _SPECIAL)
    )
    if by_hand:
        visible = Visible(borders, causal and attention_mask is None, attention_mask)
        return attention(query, key, value, scale, visible), None
    if several:
        return _one_by_one(query, key, value, borders, attention_mask, dropout, scale, causal), None
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    answer: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask,
        dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
    )  # fmt: skip
    return answer


_SPECIAL = ("position_bias", "cache", "softcap")


def _is_known(mask: Tensor | None) -> bool:
    """Whether a mask only says what is visible, the same for all heads."""
    return mask is None or (mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1)


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, borders: list[int], mask: Tensor | None,
    dropout: float, scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    """Each example of a row by SDPA."""
    sizes = [end - start for start, end in itertools.pairwise(borders)]
    parts = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), borders, sizes, strict=False)
    found = [
        functional.scaled_dot_product_attention(
            q, k, v,
            attn_mask=None if mask is None else mask[..., at : at + size, at : at + size],
            dropout_p=dropout, is_causal=causal and mask is None, scale=scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        for q, k, v, at, size in parts
    ]  # fmt: skip
    return torch.cat(found, dim=2).transpose(1, 2)
