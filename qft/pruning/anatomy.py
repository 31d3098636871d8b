"""What each tensor of a model is made of: which of its axes are neurons, heads, hidden channels.

Pruning cuts along dimensions that several tensors share. The table below says which axis of which
tensor is which dimension, by the tensor's name within its layer; every axis is checked against the
sizes in the model's config before it is believed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from qft import models
from qft.errors import ModelError
from qft.layer_stream import only_stack
from qft.lean.model_parts import head_names
from qft.merging.tensors import tied_names
from qft.pruning.layer_stream import refuse_quantized

Dimension = Literal["neurons", "queries", "keys", "hidden"]
Axes = tuple[Dimension | None, ...]

_WITHIN_A_LAYER: tuple[tuple[str, Axes], ...] = (
    (r"self_attn\.q_proj|attention\.self\.query", ("queries", "hidden")),
    (r"self_attn\.[kv]_proj|attention\.self\.(key|value)", ("keys", "hidden")),
    (r"self_attn\.o_proj|attention\.output\.dense", ("hidden", "queries")),
    (r"self_attn\.[qk]_norm", (None,)),  # as long as one head
    (r"mlp\.(gate_proj|up_proj)|intermediate\.dense", ("neurons", "hidden")),
    (r"mlp\.down_proj|output\.dense", ("hidden", "neurons")),
    (r"\w*layernorm|(attention\.)?output\.LayerNorm", ("hidden",)),
)  # fmt: skip
_BESIDE_THE_LAYERS: tuple[tuple[str, Axes], ...] = (
    (r"embed_tokens|embeddings\.\w+_embeddings", (None, "hidden")),
    (r"lm_head|score|classifier|qa_outputs|cls\.predictions\.decoder|cls\.seq_relationship",
     (None, "hidden")),
    (r"cls\.predictions", (None,)),  # its bias, a word each
    (r"norm|embeddings\.LayerNorm|cls\.predictions\.transform\.LayerNorm", ("hidden",)),
    (r"(pooler|cls\.predictions\.transform)\.dense", ("hidden", "hidden")),
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How large a model is along every dimension that pruning may cut.

    Attributes:
        neurons: of a layer's MLP; 0 where the config does not say.
        heads: query heads.
        groups: key-value heads; the query heads of one share it and are cut with it.
        head_size: channels of one head.
    """

    layers: int
    neurons: int
    heads: int
    groups: int
    head_size: int
    hidden: int

    def of(self, dimension: Dimension) -> int:
        """The length of an axis of this dimension."""
        match dimension:
            case "neurons":
                return self.neurons
            case "queries":
                return self.heads * self.head_size
            case "keys":
                return self.groups * self.head_size
            case "hidden":
                return self.hidden


@dataclass(frozen=True)
class Piece:
    """One tensor of a checkpoint.

    Attributes:
        stored: its name in the checkpoint.
        module: its name in the model.
        layer: the layer it belongs to; None beside the layers.
        within: its module name within the layer, or the whole one beside the layers.
    """

    stored: str
    module: str
    layer: int | None
    within: str


@dataclass(frozen=True)
class Anatomy:
    """A model's tensors and sizes, without its weights.

    Attributes:
        skeleton: the model on the meta device.
        config: config.json.
        stack: the module name of its stack of layers.
        pieces: every tensor that is written; a tied one once.
    """

    folder: Path
    spec: models.ModelSpec
    skeleton: nn.Module
    config: Mapping[str, Any]
    stack: str
    sizes: Sizes
    pieces: tuple[Piece, ...]

    def axes(self, piece: Piece, shape: tuple[int, ...]) -> Axes:
        """Which dimension each axis of a tensor is.

        Raises:
            ModelError: this family's tensors are others than those known here.
        """
        table = _BESIDE_THE_LAYERS if piece.layer is None else _WITHIN_A_LAYER
        name, _, kind = piece.within.rpartition(".")
        name = self._below_base(name) if piece.layer is None else name
        found = next((axes for pattern, axes in table if re.fullmatch(pattern, name)), None)
        if found is not None and kind == "bias":
            found = found[:1]
        if found is None or len(found) != len(shape) or not self._fits(found, shape):
            raise ModelError(
                "Width pruning does not know this family's tensors.",
                where=self.folder,
                found=f"{piece.module} {list(shape)}",
                fix="--method depth, which takes whole layers; width pruning knows the Llama, "
                "Mistral, Qwen and BERT kinds",
            )
        return found

    def untrained_heads(self) -> list[str]:
        """The task's heads that the checkpoint does not hold: what they say means nothing."""
        stored = {piece.module for piece in self.pieces}
        return [
            head
            for head in head_names(self.skeleton)
            if not any(name == head or name.startswith(f"{head}.") for name in stored)
        ]

    def _below_base(self, name: str) -> str:
        prefix = getattr(self.skeleton, "base_model_prefix", "")
        return name.removeprefix(f"{prefix}.") if prefix else name

    def _fits(self, axes: Axes, shape: tuple[int, ...]) -> bool:
        return all(
            dimension is None or self.sizes.of(dimension) == length
            for dimension, length in zip(axes, shape, strict=True)
        )


def open_anatomy(folder: Path, spec: models.ModelSpec) -> Anatomy:
    """Reads a model's config and headers; no weight.

    Raises:
        ModelError: the folder is broken or quantized, or the model is no single stack of layers.
    """
    models.check_folder(folder, spec.trust)
    config = models.read_config(folder)
    _refuse_unprunable(folder, config)
    skeleton = models.open_skeleton(folder, spec)
    stack, layers = only_stack(skeleton, folder)
    names = models.module_names(folder, skeleton)
    tied = tied_names(skeleton, names)
    inside = re.compile(rf"{re.escape(stack)}\.(\d+)\.(.+)")
    pieces = []
    for stored, module in names.items():
        if module in tied:
            continue
        found = inside.fullmatch(module)
        number = int(found[1]) if found else None
        pieces.append(Piece(stored, module, number, found[2] if found else module))
    return Anatomy(folder, spec, skeleton, config, stack, _sizes(skeleton, len(layers)),
                   tuple(pieces))  # fmt: skip


def _refuse_unprunable(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("is_encoder_decoder"):
        raise ModelError(
            "Encoder-decoder models cannot be pruned.", where=folder,
            found=config.get("model_type"), fix="a decoder or an encoder alone",
        )  # fmt: skip
    refuse_quantized(folder)


def _sizes(skeleton: Any, layers: int) -> Sizes:
    config = skeleton.config
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    stated = getattr(config, "head_dim", None)
    head_size = int(stated or (hidden // heads if heads else 0))
    neurons = getattr(config, "intermediate_size", 0)
    return Sizes(layers, neurons if isinstance(neurons, int) else 0, heads, groups, head_size,
                 hidden)  # fmt: skip
