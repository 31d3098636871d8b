"""Keys and values of a trained prefix, put before a model's own inside its attention.

They enter where attention is computed, not through the cache: so recomputed activations see them
again, a gradient reaches them, and a cache of generated tokens stays what the model expects.

Source: Li & Liang 2021, https://arxiv.org/abs/2101.00190.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qft.lean.model_parts import CROSS_ATTENTION, layer_stacks

Attention = Callable[..., tuple[Tensor, Any]]
_SLOT = "_qft_prefix"  # in an attention module's own dict, so that it is no submodule of it
_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


class PrefixEncoder(nn.Module):
    """The prefix's keys and values for every layer, in PEFT's layout.

    Args:
        length: virtual tokens.
        layers: attention modules that get a prefix.
        heads: key-value heads of each.
        head_dim: their width.
        hidden: width of the reparametrisation's hidden layer; None trains keys and values as such.
    """

    def __init__(
        self, length: int, layers: int, heads: int, head_dim: int, hidden: int | None = None
    ) -> None:
        super().__init__()
        self.length, self.layers, self.heads, self.head_dim = length, layers, heads, head_dim
        width = heads * head_dim
        self.embedding = nn.Embedding(length, width if hidden else layers * 2 * width)
        self.transform = (
            nn.Sequential(
                nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, layers * 2 * width)
            )
            if hidden
            else None
        )

    def layer(self, number: int) -> Tensor:
        """Keys and values of one layer: ``[2, heads, length, head_dim]``, float32."""
        width = self.heads * self.head_dim
        part = slice(2 * number * width, 2 * (number + 1) * width)
        if self.transform is None:
            flat = self.embedding.weight[:, part]
        else:  # this layer's rows alone: a layer that is recomputed repeats no other's work
            last: Any = self.transform[2]
            hidden = self.transform[1](self.transform[0](self.embedding.weight))
            flat = functional.linear(hidden, last.weight[part], last.bias[part])
        return flat.view(self.length, 2, self.heads, self.head_dim).permute(1, 2, 0, 3)

    def flat(self) -> Tensor:
        """All layers as PEFT stores them: ``[length, layers · 2 · heads · head_dim]``."""
        if self.transform is None:
            return self.embedding.weight
        flat: Tensor = self.transform(self.embedding.weight)
        return flat


@dataclass
class Slot:
    """What an attention module knows of the prefix.

    Attributes:
        encoder: where the keys and values come from.
        number: which of its layers.
        bias: gives T5's position bias of ``(queries, offset)`` towards the prefix, or None.
        record: while a text is read to start from, what the module's own keys and values were.
    """

    encoder: PrefixEncoder
    number: int
    bias: Callable[[int, int], Tensor] | None = None
    record: list[Tensor] | None = None


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention of each layer: a decoder's, an encoder's; of two halves the decoder's."""
    stack = list(layer_stacks(model).values())[-1]
    found = []
    for layer in stack:
        inner = [
            module
            for name, module in layer.named_modules()
            if hasattr(module, "is_causal") and not set(name.split(".")) & set(CROSS_ATTENTION)
        ]
        found += inner[:1]
    return found


def prefix_root(model: nn.Module) -> nn.Module:
    """The half of the model that gets the prefix; the whole of it where there is but one."""
    *others, name = layer_stacks(model)
    if not others:
        return model
    parts = name.split(".")
    return model.get_submodule(".".join(parts[: parts.index("decoder") + 1]))


def install_slots(
    modules: Sequence[nn.Module], encoder: PrefixEncoder, *, two_halves: bool = False
) -> None:
    """Gives each attention module its part of the prefix.

    Args:
        two_halves: the modules are those of an encoder-decoder's decoder.
    """
    first: Any = modules[0]
    # PEFT gives the decoder of an encoder-decoder every other layer's keys and values, round and
    # round; its folders must mean the same here
    step = 2 if two_halves else 1
    for number, module in enumerate(modules):
        bias = _BiasTo(first, encoder) if hasattr(first, "relative_attention_bias") else None
        module.__dict__[_SLOT] = Slot(encoder, step * number % len(modules), bias)


@dataclass
class _BiasTo:
    """T5: the bias that a query has towards the prefix, which lies before the first token."""

    attention: Any
    encoder: PrefixEncoder

    def __call__(self, queries: int, offset: int) -> Tensor:
        """``[1, heads, queries, prefix]``."""
        attention = self.attention
        table = attention.relative_attention_bias
        device = table.weight.device
        places = torch.arange(queries, device=device)[:, None] + offset + self.encoder.length
        distance = torch.arange(self.encoder.length, device=device)[None, :] - places
        bucket = attention._relative_position_bucket(
            distance,
            bidirectional=not attention.is_decoder,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        bias: Tensor = table(bucket)
        return bias.permute(2, 0, 1)[None]


def attend(
    inner: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attention with the module's prefix before its own keys and values, if it has one.

    Args:
        inner: the attention function that does the work.
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, key-value heads, keys, head_dim]``, like ``value``.
        attention_mask: ``[batch, 1, queries, keys]``, true or 0 where visible, or None.
        kwargs: as transformers hands them to an attention function.
    """
    slot: Slot | None = module.__dict__.get(_SLOT)
    if slot is None:
        return inner(module, query, key, value, attention_mask, **kwargs)
    if slot.record is not None:
        slot.record.append(torch.stack([key[0], value[0]]))
        return inner(module, query, key, value, attention_mask, **kwargs)
    prefix = slot.encoder.layer(slot.number).to(device=key.device, dtype=key.dtype)
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None and queries > 1 and getattr(module, "is_causal", True):
        attention_mask = torch.ones(
            1, 1, queries, keys, dtype=torch.bool, device=query.device
        ).tril(keys - queries)
    if attention_mask is not None:
        visible = 1.0 if attention_mask.dtype == torch.bool else 0.0
        attention_mask = functional.pad(attention_mask, (slot.encoder.length, 0), value=visible)
    if kwargs.get("position_bias") is not None:
        own = kwargs["position_bias"]
        towards = slot.bias(queries, keys - queries) if slot.bias else own.new_zeros(1)
        towards = towards.to(own).expand(*own.shape[:-1], slot.encoder.length)
        kwargs["position_bias"] = torch.cat([towards, own], dim=-1)
    batch = key.shape[0]
    key, value = (
        torch.cat([part.expand(batch, -1, -1, -1), own], dim=2)
        for part, own in zip(prefix, (key, value), strict=True)
    )
    return inner(module, query, key, value, attention_mask, **kwargs)


def shift_positions(root: nn.Module, by: int) -> None:
    """Lets the first real token stand at position ``by``: the prefix has those before it.

    Rotary and learned positions are shifted where they are looked up; relative ones need nothing.
    """
    for name, module in root.named_modules():
        rotary = "RotaryEmbedding" in type(module).__name__
        if rotary or (name.split(".")[-1] in _POSITIONS and not isinstance(module, nn.ModuleList)):
            module.register_forward_pre_hook(_Shift(by, 1 if rotary else 0), with_kwargs=True)


@dataclass
class _Shift:
    """Adds to the positions wherever a family's module takes them."""

    by: int
    place: int  # of the positions among the arguments

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for name in ("position_ids", "past_key_values_length"):
            if kwargs.get(name) is not None:
                return args, {**kwargs, name: kwargs[name] + self.by}
        if len(args) > 1 and isinstance(args[1], int):  # BART: ids, and how many came before
            return (args[0], args[1] + self.by, *args[2:]), kwargs
        moved = list(args)
        moved[self.place] = moved[self.place] + self.by
        return tuple(moved), kwargs


def recorded(modules: Sequence[nn.Module], read: Callable[[], object]) -> Tensor:
    """The keys and values that ``read`` makes the modules compute for its first row.

    Returns:
        ``[tokens, layers · 2 · heads · head_dim]``, as `PrefixEncoder.flat` has them.
    """
    slots: list[Slot] = [module.__dict__[_SLOT] for module in modules]
    try:
        for slot in slots:
            slot.record = []
        read()
        layers: dict[int, Tensor] = {}
        for slot in slots:
            assert slot.record
            layers.setdefault(slot.number, slot.record[0])
    finally:
        for slot in slots:
            slot.record = None
    unused = torch.zeros_like(next(iter(layers.values())))
    together = torch.stack([layers.get(number, unused) for number in range(len(slots))])
    # [layers, 2, heads, tokens, head_dim]
    return together.permute(3, 0, 1, 2, 4).flatten(1).float()
