"""Which hidden states a classification head sees.

Model families differ: BERT's own head reads its pooler, a tanh layer over the first token, which is
right for BERT itself and wrong for a sentence encoder that was trained with mean pooling.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qft.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG_KEY = "qft_pooling"


def resolve_pooling(asked: str, folder: Path, config: Any) -> str:
    """``mean``, ``cls``, ``last`` or ``model`` (the family's own head) for a checkpoint.

    ``auto`` takes, in this order: what the checkpoint was trained with by qft; mean, cls or last
    where a sentence-transformers folder says so; else the family's own head.
    """
    if asked != "auto":
        return asked
    stored = getattr(config, CONFIG_KEY, None)
    if stored in ("mean", "cls", "last", "model"):
        return str(stored)
    try:
        modes = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "model"
    return _sentence_pooling(modes) if isinstance(modes, dict) else "model"


def _sentence_pooling(modes: dict[str, Any]) -> str:
    """What a sentence-transformers pooling file says, in its new form or its former one."""
    mode = modes.get("pooling_mode")
    if mode is None:  # a flag a mode; several mean concatenated vectors, which no head here takes
        set_flags = [flag for flag, value in modes.items() if flag in _FLAGS and value is True]
        mode = _FLAGS[set_flags[0]] if len(set_flags) == 1 else None
    return {"mean": "mean", "cls": "cls", "lasttoken": "last"}.get(str(mode), "model")


_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def pool(hidden: Tensor, attention_mask: Tensor | None, kind: str) -> Tensor:
    """One vector a row: ``[batch, length, width] -> [batch, width]``, padding left out."""
    import torch

    if attention_mask is None:
        attention_mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    if kind in ("cls", "last"):  # the first or the last token that is not padding
        positions = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        order = positions if kind == "last" else positions.flip(0)
        chosen = (attention_mask * order).argmax(dim=1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), chosen]
    weights = attention_mask[..., None].to(torch.float32)
    total = (hidden.float() * weights).sum(dim=1)
    return (total / weights.sum(dim=1).clamp(min=1)).to(hidden.dtype)


def install_pooling(model: nn.Module, kind: str) -> None:
    """Makes a sequence classifier pool by ``kind``; ``model`` leaves the family's own head.

    The model's ``forward`` is replaced on this instance only, and an unused pooler is dropped, so
    that no strategy trains what reaches no loss.

    Raises:
        RecipeError: the family's head is not a single linear layer on the hidden width.
    """
    from torch import nn

    config: Any = model.config
    setattr(config, CONFIG_KEY, kind)
    if kind == "model":
        return
    head_name = next(
        (n for n in ("score", "classifier") if isinstance(getattr(model, n, None), nn.Linear)), None
    )
    if head_name is None:
        raise RecipeError(
            f"pooling: {kind} needs a head that is one linear layer; this family's is not.",
            where="pooling",
            found=type(model).__name__,
            fix="pooling: model",
        )
    base: Any = getattr(model, str(model.base_model_prefix))
    if getattr(base, "pooler", None) is not None:
        base.pooler = None
    model.forward = _pooled_forward(model, base, head_name, kind)  # type: ignore[method-assign]


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """By the labels' form: a class ``[batch]``, several ``[batch, classes]``, a number (float)."""
    from torch.nn import functional

    if not labels.is_floating_point():
        return functional.cross_entropy(logits, labels)
    if labels.dim() == 2:
        return functional.binary_cross_entropy_with_logits(logits, labels)
    return functional.mse_loss(logits.squeeze(-1), labels)


def _pooled_forward(model: Any, base: Any, head_name: str, kind: str) -> Callable[..., Any]:
    from torch import nn
    from transformers.modeling_outputs import SequenceClassifierOutput

    dropout = getattr(model, "dropout", None)

    def forward(
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        for unused in ("return_dict", "use_cache", "num_items_in_batch"):
            kwargs.pop(unused, None)
        hidden = base(input_ids=input_ids, attention_mask=attention_mask, **kwargs)[0]
        pooled = pool(hidden, attention_mask, kind)
        if isinstance(dropout, nn.Module):
            pooled = model.dropout(pooled)  # looked up: a strategy may replace it
        logits = getattr(model, head_name)(pooled)
        loss = None
        if labels is not None:
            loss = _loss(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    return forward
