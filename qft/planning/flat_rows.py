"""Whether a family keeps examples of one long row apart, before its weights are there.

The training asks the loaded model (`qft.packing_check.keeps_apart`); here the same is asked of a
random model of the same family with the same strategy, made small.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qft.data.tasks import Example
from qft.packing_check import keeps_apart
from qft.preparation import prepare
from qft.registry import settings_of
from qft.strategy import Context, Strategy

_VOCABULARY = 64
_SIZES = {
    "vocab_size": _VOCABULARY, "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
_MOST_LAYERS = 8


def would_keep_apart(skeleton: nn.Module, strategy: Strategy, context: Context) -> bool:
    """Whether examples in one long row would be as if each were alone.

    Args:
        skeleton: a decoder on the meta device, nothing attached.
        context: what the strategy attaches with.

    Returns:
        True where no small model of the family can be made: most families do.
    """
    config = _small(skeleton.config)
    kind: Any = type(skeleton)
    key = (kind.__name__, config.to_json_string(), str(settings_of(strategy)))
    if key not in _FOUND:
        with torch.random.fork_rng(devices=[]):
            _FOUND[key] = _tried(kind, config, strategy, replace(context, original_weight=None))
    return _FOUND[key]


_FOUND: dict[tuple[str, str, str], bool] = {}


def _tried(kind: Any, config: Any, strategy: Strategy, context: Context) -> bool:
    ids = [[(7 * place + 3) % 50 + 10 for place in range(count)] for count in (20, 16)]
    examples = [Example(n, {"input_ids": own, "labels": own}) for n, own in enumerate(ids)]
    chosen: Strategy | None
    for chosen in (strategy, None):  # the one may want data, or sizes that a small model has not
        try:
            model = _model(kind, config, chosen, context)
        except Exception:  # of many kinds, as a family's sizes may be odd in many ways
            continue
        return keeps_apart(model, examples, 0)
    return True


def _model(kind: Any, config: Any, strategy: Strategy | None, context: Context) -> nn.Module:
    torch.manual_seed(0)
    bare: nn.Module = kind(config).float()
    if strategy is None:
        bare.requires_grad_(False)
        next(iter(bare.parameters())).requires_grad_(True)
    return prepare(bare, strategy, checkpointing="none", context=context)


def _small(config: Any) -> Any:
    """A copy of a config with few and narrow layers, one of each kind at least."""
    small = copy.deepcopy(config)
    for part in {id(c): c for c in (small, small.get_text_config())}.values():
        kinds = list(getattr(part, "layer_types", None) or ())
        layers = max((kinds.index(kind) + 1 for kind in set(kinds)), default=2)
        layers = min(max(2, layers), len(kinds) or layers, _MOST_LAYERS)
        if kinds:
            part.layer_types = kinds[:layers]
        for name, size in {**_SIZES, "num_hidden_layers": layers}.items():
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, size)
        heads = getattr(config, "num_attention_heads", None)
        shared = getattr(config, "num_key_value_heads", None)
        if shared == heads:  # a family may know no other way
            part.num_key_value_heads = part.num_attention_heads
        for number, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
            setattr(part, name, number)
    return small
