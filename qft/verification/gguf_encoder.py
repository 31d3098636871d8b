"""A BERT in a GGUF file as a transformers model: transformers' own loader knows no encoder.

Written from llama.cpp's side, by its names for the tensors.
"""

from __future__ import annotations

import re
from typing import Any

import gguf
import torch
from torch import nn

from qft.errors import ModelError
from qft.pooling import install_pooling
from qft.verification.gguf_config import OpenedGGUF, config_of, pooling_of

_EMBEDDINGS = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
}
_LAYER = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
_HEAD = {"cls": "bert.pooler.dense", "cls.output": "classifier"}
_IN_LAYER = re.compile(r"blk\.(\d+)\.([a-z_]+)$")


def read_encoder(opened: OpenedGGUF, dtype: torch.dtype) -> nn.Module:
    """The encoder, or the classifier where the file pools by rank.

    Raises:
        ModelError: a tensor is missing, of another shape, or of no use.
    """
    from transformers import BertForSequenceClassification, BertModel

    config = config_of(opened)
    classifier = pooling_of(opened) == "rank"
    model: Any
    if classifier:
        model = BertForSequenceClassification(config)
        if "cls.weight" not in opened.tensors:
            mean = opened.own("classifier.pooling_type") == 1
            install_pooling(model, "mean" if mean else "cls")
    else:
        model = BertModel(config, add_pooling_layer=False)
    state = {}
    for name, tensor in opened.tensors.items():
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        state[_module(name, "bert." if classifier else "")] = values
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ModelError("The GGUF file does not hold all of the model.", where=opened.file,
                         found=str(error).replace("\n", " ")[:300]) from error  # fmt: skip
    return model.to(dtype)  # type: ignore[no-any-return]


def _module(name: str, prefix: str) -> str:
    """A tensor's module name, by llama.cpp's."""
    part, _, kind = name.rpartition(".")
    if part in _HEAD:
        return f"{_HEAD[part]}.{kind}"
    if part in _EMBEDDINGS:
        return f"{prefix}{_EMBEDDINGS[part]}.{kind}"
    found = _IN_LAYER.match(part)
    inner = _LAYER.get(found[2]) if found else None
    if found is None or inner is None:
        return name
    return f"{prefix}encoder.layer.{found[1]}.{inner}.{kind}"
