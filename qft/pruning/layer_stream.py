"""A model folder's layers in turn, for whoever scores or changes them; see `qft.layer_stream`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qft import hardware, models
from qft.errors import ModelError
from qft.layer_stream import Stream, StreamedLayer
from qft.layer_weights import LayerWeights
from qft.merging.tensors import ModuleTensors, tied_names
from qft.shards import ShardedCheckpoint

Propagate = Literal["changed", "original"]


def stream_layers(
    folder: Path,
    spec: models.ModelSpec,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    propagate: Propagate = "changed",
) -> Iterator[StreamedLayer]:
    """Each layer in turn, loaded, with the inputs that the layers below made of ``batches``.

    Args:
        folder: a model of one stack of layers, 16 or 32 bits, in safetensors.
        spec: its task; ``dtype`` (None is float32) is what is computed in.
        batches: as a task collates them; what a model should answer is not looked at.
        propagate: whether the next layer sees what the layer makes with the weights the caller
            ``changed``, or with its ``original`` ones, which are then read once more.

    Raises:
        ModelError: the folder is broken or quantized, or the model has not one stack of layers.
    """
    models.check_folder(folder, spec.trust)
    refuse_quantized(folder)
    device = hardware.choose(spec.device or "auto").device
    skeleton = models.open_skeleton(folder, replace(spec, dtype=spec.dtype or torch.float32))
    skeleton.eval().requires_grad_(False)
    with ShardedCheckpoint(folder) as checkpoint:
        names = models.module_names(folder, skeleton)
        tensors = ModuleTensors(checkpoint, names, tied_names(skeleton, names))
        stream = Stream(LayerWeights(skeleton, tensors, device), batches, folder)
        yield from stream.layers(original=propagate == "original")


def refuse_quantized(folder: Path) -> None:
    """Raises ModelError where a model is stored quantized."""
    stored = models.read_config(folder).get("quantization_config")
    if stored:
        raise ModelError(
            "The model is stored quantized, and pruning needs its plain weights.",
            where=folder,
            found=models.stored_kind(stored),
            fix="prune the unquantized model, then quantize the result",
        )
