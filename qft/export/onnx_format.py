"""ONNX, the format of onnxruntime and the browser: encoders with the head of their task."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qft import models
from qft.errors import ModelError
from qft.export.onnx_graph import OPSET, write_float32, write_int8
from qft.merging.merge import Progress, write_config
from qft.merging.side_files import copy_files
from qft.merging.tensors import RowSource
from qft.onnx_files import require_libraries
from qft.pooling import CONFIG_KEY, install_pooling
from qft.shards import row_blocks, tensor_bytes

# How a class's name ends → what transformers calls its answer.
_OUTPUTS = {
    "ForSequenceClassification": ("logits",),
    "ForTokenClassification": ("logits",),
    "ForQuestionAnswering": ("start_logits", "end_logits"),
    "Model": ("last_hidden_state",),
}
_GRAPH_BYTES = 16 * 2**20  # at most, without weights


class OnnxPlan:
    """What an ONNX folder of a source will hold; refuses before anything is written.

    Args:
        source: the model.
        kind: ``fp32`` or ``int8``.

    Raises:
        ModelError: it is no encoder, or a library is missing.
    """

    def __init__(self, source: RowSource, kind: str) -> None:
        require_libraries()
        self.source, self.kind = source, kind
        self.architecture = str((source.config.get("architectures") or ["unknown"])[0])
        self.outputs = _outputs(source.config, self.architecture)
        self.notes = [f"opset {OPSET}; inputs of any batch and length"]
        if self.outputs == ("last_hidden_state",):
            self.notes.append("without a head: it gives last_hidden_state, which is yours to pool")

    @property
    def bytes(self) -> int:
        """On the disk while it is written, at most: int8 is made of a float32 file, read twice."""
        held = sum(tensor_bytes(self.source.shape(name), torch.float32)
                   for name in self.source.names())  # fmt: skip
        return (held + _GRAPH_BYTES) * (3 if self.kind == "int8" else 1)


def _outputs(config: Mapping[str, Any], architecture: str) -> tuple[str, ...]:
    ending = next((e for e in _OUTPUTS if architecture.endswith(e)), None)
    halves = config.get("is_encoder_decoder")
    if ending is None or halves or not models.is_encoder(config):
        writes = "encoder-decoder" if halves else "decoder"
        raise ModelError(
            f"ONNX is written of encoders alone; this {writes} would run without its cache.",
            where="config.json",
            found=architecture,
            fix="export to gguf:q8_0, or to a safetensors or bnb format",
        )
    return _OUTPUTS[ending]


def write_onnx(plan: OnnxPlan, folder: Path, progress: Progress | None = None) -> int:
    """Writes the graph with its weights, and config and tokenizer beside it.

    In memory is the model in float32, and what the exporter makes of it.

    Returns:
        Bytes of the graph and its weights.

    Raises:
        ModelError: a tensor is missing or not finite, or the exporter cannot follow the model.
    """
    model = _loaded(plan, progress)
    inputs = _inputs(model)
    if plan.kind == "int8":
        head = plan.outputs != ("last_hidden_state",)
        write_int8(model, folder, inputs, plan.outputs, head=head)
    else:
        write_float32(model, folder, inputs, plan.outputs)
    size = sum(path.stat().st_size for path in folder.iterdir())
    write_config(plan.source, folder, dtype="float32")
    copy_files(plan.source.files, folder)
    return size


def _inputs(model: nn.Module) -> list[str]:
    """Token types only where the model tells several apart: RoBERTa's table has one row."""
    described: Any = model.config
    several = (getattr(described, "type_vocab_size", 0) or 0) > 1
    takes = "token_type_ids" in inspect.signature(type(model).forward).parameters
    return ["input_ids", "attention_mask", *(["token_type_ids"] if several and takes else [])]


def _loaded(plan: OnnxPlan, progress: Progress | None) -> nn.Module:
    """The model in memory, every tensor read from the source in blocks of rows."""
    model = _built(plan)
    source, held = plan.source, model.state_dict()
    filled = set()
    for name in source.names():
        shape = source.shape(name)
        place = held.get(source.module(name))
        for part, block in zip(row_blocks(shape), source.blocks(name), strict=True):
            if place is not None:
                _fill(place, name, block, part if shape else ...)
            if progress is not None:
                progress(block.numel() * block.element_size())
        if place is not None:
            filled.add(place.data_ptr())
    lost = sorted(name for name, value in held.items() if value.data_ptr() not in filled)
    if lost:
        raise ModelError("The source lacks tensors of the model.", where=plan.architecture,
                         found=f"{len(lost)}, first {lost[0]}")  # fmt: skip
    return model.eval().requires_grad_(False)


def _fill(place: torch.Tensor, name: str, block: torch.Tensor, part: Any) -> None:
    if place[part].shape != block.shape:
        raise ModelError("A tensor has another shape than the model's.", where=name,
                         found=f"{tuple(block.shape)}, not {tuple(place[part].shape)}")  # fmt: skip
    if block.is_floating_point() and not bool(torch.isfinite(block).all()):
        raise ModelError("A weight is not a finite number.", where=name,
                         fix="the training diverged, or the file is broken")  # fmt: skip
    with torch.no_grad():
        place[part] = block.to(place.dtype)


def _built(plan: OnnxPlan) -> nn.Module:
    """The architecture with tensors of no account, and its pooling."""
    import transformers

    cls: Any = getattr(transformers, plan.architecture, None)
    if cls is None:
        raise ModelError("transformers does not know this architecture.", where="config.json",
                         found=plan.architecture)  # fmt: skip
    config = cls.config_class.from_dict(dict(plan.source.config))
    config.dtype = torch.float32
    config._attn_implementation = "sdpa" if cls._supports_sdpa else "eager"
    model: Any = cls(config)
    if plan.architecture.endswith("ForSequenceClassification"):
        install_pooling(model, str(plan.source.config.get(CONFIG_KEY, "model")))
    if plan.outputs == ("last_hidden_state",) and getattr(model, "pooler", None) is not None:
        model.pooler = None  # nothing reads it
    return model.float()  # type: ignore[no-any-return]
