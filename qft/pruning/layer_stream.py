"""Rows run through a model layer by layer, with one layer's weights in memory at a time.

The model is built on the meta device. Its own forward runs once a batch with every layer replaced
by a recorder, so that each layer's own arguments (masks, sliding windows, position embeddings) and
the first hidden states are known before any layer is loaded; a module beside the layers is loaded
when it is first called, of embeddings only the rows that are looked up. Then a layer after the
other is read from the shards, run, and dropped. At the most there are in memory: one layer, the
hidden states of all rows, and what one batch needs within one layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qft import hardware, models
from qft.errors import ModelError
from qft.lean.model_parts import layer_stacks
from qft.merging.tensors import ModuleTensors, tied_names
from qft.shards import ShardedCheckpoint

Observer = Callable[[Tensor, Tensor, Tensor], None]
Propagate = Literal["changed", "original"]

_ANSWERS = ("labels", "start_positions", "end_positions")


class StreamedLayer:
    """One layer with its weights in memory, until the stream goes on to the next.

    The caller may hang hooks on parts of `module` (and takes them off again), call `run` as often
    as it likes, and change the weights in place.

    Attributes:
        index: the layer's number in its stack.
        name: its module name, such as ``model.layers.3``.
        stack: its stack's module name.
        module: in eval mode; its parameters need no gradient.
        tokens: while `run` is at it: which positions of the batch are text, bool
            ``[batch, length]``.
    """

    def __init__(
        self, index: int, stack: str, module: nn.Module, rows: Sequence[_Batch], device: str
    ) -> None:
        self.index, self.stack, self.name = index, stack, f"{stack}.{index}"
        self.module = module
        self.tokens = torch.empty(0, 0, dtype=torch.bool)
        self._rows, self._device = rows, device
        self._went_on = False

    @torch.no_grad()
    def run(self, observe: Observer | None = None, *, propagate: bool = False) -> None:
        """Runs the layer over all batches.

        Args:
            observe: called a batch with the layer's input and output ``[batch, length, hidden]``
                and which positions are text ``[batch, length]``.
            propagate: the outputs become the next layer's inputs, for which the stream then needs
                no pass of its own; the last thing to do with a layer.
        """
        for batch in self._rows:
            given = batch.hidden.to(self._device)
            self.tokens = batch.tokens.to(self._device)
            arguments, named = _moved(batch.arguments[self.index], self._device)
            made = self.module(given, *arguments, **named)
            output: Tensor = made[0] if isinstance(made, tuple) else made
            if observe is not None:
                observe(given, output, self.tokens)
            if propagate:
                batch.hidden = output.to(batch.hidden.device)
        self._went_on = self._went_on or propagate

    def _go_on(self) -> None:
        if not self._went_on:
            self.run(propagate=True)


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
    if not batches:
        raise ValueError("no batches to run")
    models.check_folder(folder, spec.trust)
    refuse_quantized(folder)
    device = hardware.choose(spec.device or "auto").device
    skeleton = models.open_skeleton(folder, replace(spec, dtype=spec.dtype or torch.float32))
    skeleton.eval().requires_grad_(False)
    stack_name, stack = only_stack(skeleton, folder)
    with ShardedCheckpoint(folder) as checkpoint:
        names = models.module_names(folder, skeleton)
        tensors = ModuleTensors(checkpoint, names, tied_names(skeleton, names))
        loader = _Loader(skeleton, tensors, device)
        rows = _record(skeleton, stack_name, stack, batches, loader)
        for index, module in enumerate(stack):
            name = f"{stack_name}.{index}"
            loader.load(module, name)
            layer = StreamedLayer(index, stack_name, module, rows, device)
            yield layer
            if propagate == "original" and not layer._went_on:
                loader.load(module, name)
            layer._go_on()
            module.to("meta")
            for batch in rows:
                batch.arguments[index] = ((), {})


def only_stack(model: nn.Module, folder: Path) -> tuple[str, nn.ModuleList]:
    """The name and the layers of a model's one stack.

    Raises:
        ModelError: it has none or, as encoder-decoders do, several.
    """
    stacks = layer_stacks(model)
    if len(stacks) != 1:
        raise ModelError(
            "Pruning needs a model of one stack of layers.",
            where=folder,
            found=f"{type(model).__name__}: {', '.join(stacks) or 'no stack'}",
            fix="a decoder such as Llama, Qwen or Mistral, or an encoder such as BERT",
        )
    return next(iter(stacks.items()))


@dataclass
class _Batch:
    """One batch on its way: hidden states on the host, and every layer's other arguments."""

    hidden: Tensor
    tokens: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


class _AllRecordedError(Exception):
    """The last layer was reached; what lies above it need not run."""


def _record(
    skeleton: nn.Module,
    stack_name: str,
    stack: nn.ModuleList,
    batches: Sequence[Mapping[str, Tensor]],
    loader: _Loader,
) -> list[_Batch]:
    """Runs the model's own forward on every batch, without its layers."""
    base: Any = getattr(skeleton, "base_model", skeleton)
    seen: list[_Batch] = []
    for number, layer in enumerate(stack):
        layer.forward = _recorder(seen, number, len(stack))
    hooks = loader.load_when_called(stack_name)
    options = {"use_cache": False} if "use_cache" in _parameters(base) else {}
    try:
        for batch in batches:
            inputs = {k: v.to(loader.device) for k, v in batch.items() if k not in _ANSWERS}
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            seen.append(_Batch(torch.empty(0), mask.bool(), []))
            try:
                with torch.no_grad():
                    base(**inputs, **options)
            except _AllRecordedError:
                continue
            raise ModelError("This model does not run its layers one after another.",
                             found=type(skeleton).__name__)  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
        for layer in stack:
            del layer.forward
    for _, module in loader.outside(stack_name):
        module._apply(lambda tensor: tensor.to("meta"), recurse=False)
    return seen


def _recorder(seen: list[_Batch], number: int, count: int) -> Callable[..., Any]:
    def record(hidden_states: Tensor, *arguments: Any, **named: Any) -> Tensor:
        if len(seen[-1].arguments) != number:
            raise ModelError("This model does not run its layers one after another.")
        if number == 0:
            seen[-1].hidden = hidden_states.to("cpu")
        seen[-1].arguments.append((arguments, named))
        if number == count - 1:
            raise _AllRecordedError
        return hidden_states

    return record


class _Loader:
    """Puts weights into modules of the skeleton."""

    def __init__(self, skeleton: Any, tensors: ModuleTensors, device: str) -> None:
        self._skeleton, self._tensors, self.device = skeleton, tensors, device
        self._kept = set(skeleton.state_dict())

    def load(self, module: nn.Module, name: str) -> None:
        """A module's parameters and buffers, and those of all in it."""
        for inner, part in module.named_modules(prefix=name):
            self._load_own(part, inner)

    def load_when_called(self, stack_name: str) -> list[Any]:
        """Hooks that load what is beside the layers once it is needed, and only then."""
        return [
            module.register_forward_pre_hook(self._on_call(name))
            for name, module in self.outside(stack_name)
        ]

    def outside(self, stack_name: str) -> list[tuple[str, nn.Module]]:
        """The modules that are not in the stack."""
        every = self._skeleton.named_modules()
        return [(n, m) for n, m in every if not f"{n}.".startswith(f"{stack_name}.")]

    def _on_call(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> Any:
            if type(module) is nn.Embedding and len(given) == 1:
                return (self._look_up(module, name, given[0]),)
            if any(t is not None and t.is_meta for t in (*module._parameters.values(),
                                                         *module._buffers.values())):  # fmt: skip
                self._load_own(module, name)
            return None

        return hook

    def _look_up(self, module: nn.Embedding, name: str, tokens: Tensor) -> Tensor:
        """Loads the rows of these tokens alone, and says where each token's row is now."""
        rows: Tensor
        places: Tensor
        rows, places = torch.unique(tokens, return_inverse=True)
        value = self._tensors.read_rows(f"{name}.weight", rows.tolist())
        value = value.to(self.device, module.weight.dtype)
        module.weight = nn.Parameter(value, requires_grad=False)
        module.padding_idx = None  # it matters to gradients only, and counts the rows of old
        return places

    def _load_own(self, module: nn.Module, name: str) -> None:
        prefix = f"{name}." if name else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                value = self._tensors.read(prefix + key).to(self.device, parameter.dtype)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
        computed = False
        for key, buffer in module._buffers.items():
            if buffer is None:
                continue
            if prefix + key in self._kept:
                value = self._tensors.read(prefix + key).to(self.device, buffer.dtype)
                module._buffers[key] = value
            elif buffer.is_meta:  # not stored: a rotary embedding's frequencies, position ids
                module._buffers[key] = torch.zeros_like(buffer, device=self.device)
                computed = True
        if computed:
            self._skeleton._init_weights(module)


def _moved(
    given: tuple[tuple[Any, ...], dict[str, Any]], device: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    found: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(
        Tensor, lambda tensor: tensor.to(device), given
    )
    return found


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(module.forward).parameters


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
