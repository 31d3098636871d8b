"""A subject of a verification as a model whose layers come into memory one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qft import hardware, models, quantized_linears
from qft.adapter_folder import AdapterFolder
from qft.errors import ModelError
from qft.layer_stream import only_stack
from qft.layer_weights import LayerWeights, StoredTensors, module_names_of
from qft.merging.tensors import ModuleTensors, tied_names
from qft.shards import ShardedCheckpoint
from qft.strategy import Context
from qft.verification.adapter_file import AdapterFile
from qft.verification.gguf_config import OpenedGGUF, config_of
from qft.verification.read_back import GGUFTensors, SafetensorsFolder
from qft.verification.subject import Subject


class CannotStreamError(ModelError):
    """The model has to be in memory whole."""


@contextmanager
def open_weights(subject: Subject, dtype: torch.dtype) -> Iterator[LayerWeights]:
    """A subject on the meta device, in eval mode, with its files open.

    Raises:
        CannotStreamError: its structure does not allow it; says why.
        ModelError: it is broken.
    """
    device = hardware.choose().device
    if isinstance(subject, AdapterFile):
        raise CannotStreamError("A base with an adapter file beside it is opened whole.",
                                where=subject.file)  # fmt: skip
    if subject.gguf is not None:
        yield _gguf(subject, dtype, device)
        return
    if subject.onnx is not None:
        raise CannotStreamError("An ONNX graph runs whole, not layer by layer.",
                                where=subject.onnx)  # fmt: skip
    models.check_folder(subject.folder, subject.spec.trust)
    if subject.adapter is None:
        yield _folder(subject, dtype, device)
        return
    with ShardedCheckpoint(subject.folder) as checkpoint:
        yield _adapted(subject.adapter, checkpoint, dtype, device)


def _folder(subject: Subject, dtype: torch.dtype, device: str) -> LayerWeights:
    """A model folder, quantized or not, read by safetensors itself."""
    spec = _changed(subject.spec, dtype)
    skeleton = models.open_skeleton(subject.folder, spec)
    _require_stack(skeleton, subject)
    names = models.module_names(subject.folder, skeleton)
    tensors = SafetensorsFolder(subject.folder, names, tied_names(skeleton, names))
    stored = subject.config().get("quantization_config")
    if stored:
        _put_in_stored(skeleton, tensors, models.stored_kind(stored), dtype, subject)
    return LayerWeights(_still(skeleton), tensors, device)


def _put_in_stored(
    skeleton: nn.Module, tensors: StoredTensors, kind: str, dtype: torch.dtype, subject: Subject
) -> None:
    if kind not in ("int8", "nf4", "fp4"):
        raise CannotStreamError(f"{kind} cannot be read layer by layer.", where=subject.folder)
    held = quantized_linears.stored_linears(skeleton, set(tensors.names()))
    others = [name for name, module in skeleton.named_modules()
              if _is_linear(module) and name not in held]  # fmt: skip
    quantized_linears.put_in(skeleton, kind, dtype, others, stored=True)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _gguf(subject: Subject, dtype: torch.dtype, device: str) -> LayerWeights:
    from transformers import AutoModelForCausalLM

    assert subject.gguf is not None
    opened = OpenedGGUF(subject.gguf)
    if opened.architecture == "bert":
        raise CannotStreamError("An encoder's GGUF file is opened whole.", where=subject.gguf)
    try:
        with torch.device("meta"):
            skeleton: Any = AutoModelForCausalLM.from_config(config_of(opened), dtype=dtype)
        skeleton.tie_weights()
        pairs = dict(getattr(skeleton, "all_tied_weights_keys", None) or {})
        tensors = GGUFTensors(opened, skeleton, pairs)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CannotStreamError("transformers cannot read this GGUF file layer by layer.",
                                where=subject.gguf, found=error) from error  # fmt: skip
    _require_stack(skeleton, subject)
    return LayerWeights(_still(skeleton), tensors, device)


def _adapted(
    found: AdapterFolder, checkpoint: ShardedCheckpoint, dtype: torch.dtype, device: str
) -> LayerWeights:
    """A base with an adapter attached: the adapter whole in memory, the base by layers."""
    if not found.strategy.mergeable:
        raise CannotStreamError(
            f"What {found.strategy.name} trains is no part of the layers alone.",
            where=found.folder,
        )
    spec = found.spec(dtype=dtype)
    skeleton = models.open_skeleton(found.base, spec)
    _require_stack(skeleton, found.base)
    keep = found.strategy.needs(skeleton).full_precision
    names = models.module_names(found.base, skeleton)
    tensors = ModuleTensors(checkpoint, names, tied_names(skeleton, names))
    stored = models.read_config(found.base).get("quantization_config")
    if stored:
        raise CannotStreamError("A base that is stored quantized is opened whole.",
                                where=found.base)  # fmt: skip
    if spec.quantize != "none":
        kept = models.unquantized_in(found.base, spec, keep)
        quantized_linears.put_in(skeleton, spec.quantize, dtype, kept, stored=False)
    modules = module_names_of(skeleton)
    base = [(parameter, parameter._version) for parameter in skeleton.parameters()]
    model = found.strategy.attach(skeleton, Context(task=found.task))
    own = _materialise(model, modules, tensors, device)
    with torch.no_grad():
        found.strategy.load(model, found.folder)
    changed = any(parameter._version != version for parameter, version in base)
    empty = any(torch.isnan(parameter).any() for parameter in own)
    if changed or empty:
        raise CannotStreamError("Loading this adapter needs the whole base.", where=found.folder)
    model.eval().requires_grad_(False)
    return LayerWeights(_still(skeleton), tensors, device, modules)


def _materialise(
    model: nn.Module, modules: dict[nn.Module, str], tensors: StoredTensors, device: str
) -> list[nn.Parameter]:
    """Real parameters for what a strategy added, NaN until it is loaded, and for what it freed.

    Raises:
        CannotStreamError: it added what no adapter folder holds.
    """
    made: dict[int, nn.Parameter] = {}
    added = []
    for module in model.modules():
        own = module not in modules
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta or not (own or parameter.requires_grad):
                continue
            if id(parameter) not in made:
                if own:
                    value = torch.full_like(parameter, torch.nan, device=device)
                else:
                    prefix = f"{modules[module]}." if modules[module] else ""
                    value = tensors.read(prefix + key).to(device, parameter.dtype)
                made[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
                added += [made[id(parameter)]] * own
            module._parameters[key] = made[id(parameter)]
        if own and any(
            buffer is not None and buffer.is_meta for buffer in module._buffers.values()
        ):
            raise CannotStreamError("This adapter keeps parts of the base.",
                                    found=type(module).__name__)  # fmt: skip
    return added


def _require_stack(skeleton: nn.Module, where: object) -> None:
    try:
        only_stack(skeleton, where)
    except ModelError as error:
        raise CannotStreamError(error.what, where=error.where, found=error.found) from None


def _changed(spec: models.ModelSpec, dtype: torch.dtype) -> models.ModelSpec:
    from dataclasses import replace

    return replace(spec, dtype=dtype)


def _still(skeleton: nn.Module) -> nn.Module:
    return skeleton.eval().requires_grad_(False)
