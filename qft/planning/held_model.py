"""A model on the meta device with as many bytes as loading leaves of it, quantized or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor, nn

from qft import models, quantization
from qft.lean.standins import quantize_skeleton
from qft.planning.stored_weights import stored_tensors

# how a stored quantization holds a weight, where it is no kind of bitsandbytes'
_HELD_AS = {"torchao": "int8"}


def held_skeleton(folder: Path, spec: models.ModelSpec, keep: Sequence[str] = ()) -> nn.Module:
    """The model that `qft.models.open_model` opens, without a byte.

    Args:
        keep: names of modules that stay unquantized, beside heads and embeddings.
    """
    skeleton = models.open_skeleton(folder, spec)
    kind = models.held_as(models.read_config(folder), spec.quantize)
    kind = _HELD_AS.get(kind, kind)
    if kind in quantization.KINDS and kind != "none":  # vLLM's format is unpacked on loading
        quantize_skeleton(skeleton, kind, unquantized(folder, spec, skeleton, keep))
    return skeleton


def unquantized(
    folder: Path, spec: models.ModelSpec, skeleton: nn.Module, keep: Sequence[str] = ()
) -> tuple[str, ...]:
    """Names of the linear modules that a quantized model keeps in full precision.

    Of a folder that is stored quantized its files say so, or else its config.
    """
    config = models.read_config(folder)
    stored = config.get("quantization_config")
    if not stored:
        return tuple(models.unquantized_in(folder, spec, keep))
    found = stored_tensors(folder, skeleton)
    listed = stored.get("llm_int8_skip_modules") or stored.get("modules_to_not_convert") or ()
    if found.there:
        plain = (name for name, dtype in found.dtypes.items() if dtype.is_floating_point)
        listed = [name.removesuffix(".weight") for name in plain if name.endswith(".weight")]
    return (*quantization.unquantized_modules(skeleton), *listed)  # a tied head is in no file


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, each once."""
    seen: set[int] = set()
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def held_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, each once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in held_tensors(model))
