"""Weights that are put into a model on the meta device when they are needed, and taken out again.

A module is known by what it was before a strategy wrapped it, so an adapter's wrappers change no
name; what a strategy added has weights of its own and is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qft import quantized_linears


class StoredTensors(Protocol):
    """A model's tensors under module names, read one at a time from its files."""

    def names(self) -> Sequence[str]:
        """Every tensor's name, tied ones included."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some of its rows."""


class LayerWeights:
    """Loads a skeleton's modules one by one.

    Args:
        skeleton: the plain model, on the meta device; wrapped by a strategy or not.
        names: its own modules and the names their tensors have, from `module_names_of` before any
            strategy wrapped them; None is as they are now.
        tensors: where the values are.
        device: to load to.
    """

    def __init__(
        self,
        skeleton: Any,
        tensors: StoredTensors,
        device: str,
        names: Mapping[nn.Module, str] | None = None,
    ) -> None:
        self.skeleton, self.device = skeleton, device
        self._tensors = tensors
        self._names = dict(module_names_of(skeleton) if names is None else names)
        self._stored = set(tensors.names())
        self._loaded: list[tuple[nn.Module, bool, str, Any]] = []
        self._looked_up: dict[nn.Embedding, Any] = {}

    def load(self, module: nn.Module) -> None:
        """A module's parameters and buffers, and those of all in it; see `drop`."""
        for part in module.modules():
            if part in self._names:
                self._load_own(part, self._names[part])

    def drop(self) -> None:
        """Takes everything out again that was loaded."""
        for module, is_parameter, key, former in reversed(self._loaded):
            held = module._parameters if is_parameter else module._buffers
            held[key] = former
            quantized_linears.release(module)
        for embedding, weight in self._looked_up.items():
            embedding.weight = weight
        self._loaded, self._looked_up = [], {}

    def load_when_called(self, stack_name: str) -> list[Any]:
        """Hooks that load what is beside the layers once it is needed, and only then.

        Of embeddings only the rows that are looked up.
        """
        hooks = []
        for name, module in self.skeleton.named_modules():
            if f"{name}.".startswith(f"{stack_name}."):
                continue
            if module in self._names:
                hooks.append(module.register_forward_pre_hook(self._on_call))
            elif any(part in self._names for part in module.modules()):
                hooks.append(module.register_forward_pre_hook(self._on_wrapper_call))
        return hooks

    def _on_call(self, module: Any, given: tuple[Any, ...]) -> Any:
        known = type(module) is nn.Embedding and len(given) == 1
        if known and (module.weight.is_meta or module in self._looked_up):
            return (self._look_up(module, given[0]),)
        self._load_own(module, self._names[module])
        return None

    def _on_wrapper_call(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        """A strategy's wrapper may read the weight of what it wraps without calling it."""
        self.load(module)

    def _look_up(self, module: nn.Embedding, tokens: Tensor) -> Tensor:
        """Loads the rows of these tokens alone, and says where each token's row is now."""
        rows: Tensor
        places: Tensor
        rows, places = torch.unique(tokens, return_inverse=True)
        value = self._tensors.read_rows(f"{self._names[module]}.weight", rows.tolist())
        former = self._looked_up.setdefault(module, module.weight)
        value = value.to(self.device, former.dtype)
        module.weight = nn.Parameter(value, requires_grad=False)
        module.padding_idx = None  # it matters to gradients only, and counts the rows of old
        return places

    def _load_own(self, module: nn.Module, name: str) -> None:
        """What of a module's own is not here yet."""
        prefix = f"{name}." if name else ""
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            self._loaded.append((module, True, key, parameter))
            value = quantized_linears.load(
                module, parameter, prefix + key, self._tensors, self._stored, self.device
            )
            if value is None:
                plain = self._tensors.read(prefix + key).to(self.device, parameter.dtype)
                value = nn.Parameter(plain, requires_grad=False)
            module._parameters[key] = value
        computed = False
        for key, buffer in module._buffers.items():
            if buffer is None or not buffer.is_meta:
                continue
            self._loaded.append((module, False, key, buffer))
            persistent = key not in module._non_persistent_buffers_set
            if persistent and prefix + key in self._stored:
                value = self._tensors.read(prefix + key).to(self.device, buffer.dtype)
                module._buffers[key] = value
            else:  # not stored: a rotary embedding's frequencies, position ids
                module._buffers[key] = torch.zeros_like(buffer, device=self.device)
                computed = True
        if computed:
            self._compute_buffers(module)

    def _compute_buffers(self, module: nn.Module) -> None:
        """As the model's own start does, which would draw the weights anew as well."""
        held = dict(module._parameters)
        for key, parameter in held.items():
            if parameter is not None:
                nothing = torch.empty_like(parameter, device="meta")
                module._parameters[key] = nn.Parameter(nothing, requires_grad=False)
        self.skeleton._init_weights(module)
        module._parameters.update(held)


def module_names_of(skeleton: nn.Module) -> dict[nn.Module, str]:
    """Every module and its name."""
    return {module: name for name, module in skeleton.named_modules()}
