"""What strategies share that train tensors of the base itself: a head, biases, layers, everything.

Weights train in float32 whatever the base is held in (steps too small for bfloat16 must not be
lost); each module computes in its own type all the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from adapters.peft_backed import compare_tensors, stored_tensors
from qft.errors import AdapterError, RecipeError
from qft.lean.model_parts import head_names
from qft.strategy import BaseTensors, Context, Merge, Rows, Strategy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qft.shards import StoredTensor

# what names an adapter's parameters; a head that PEFT trains is a copy, its original stays frozen
_ADAPTERS = ("lora_", "ia3_l", "ranknum", "prefix_encoder", "prompt_encoder", "token_adapter",
             "modules_to_save", "original_module")  # fmt: skip
CONFIG_FILE = "trained_tensors.json"
WEIGHTS_FILE = "trained_tensors.safetensors"


class FreedTensors(Strategy):
    """A strategy that trains some of the base's own tensors; a subclass names them."""

    def trained(self, model: nn.Module) -> list[str]:
        """The parameters' names.

        Raises:
            RecipeError: the model has none of them.
        """
        raise NotImplementedError

    @property
    def mergeable(self) -> bool:
        """Always: the tensors take their former place."""
        return True

    def attach(self, model: nn.Module, context: Context) -> nn.Module:
        """Freezes all but the named tensors."""
        names = self.trained(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        free(model, names)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes trained_tensors.safetensors and trained_tensors.json."""
        from safetensors.torch import save_file

        parameters = own_parameters(model)
        tensors = {n: parameters[n].detach().cpu().contiguous() for n in self.trained(model)}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        values = {
            "format": 1,
            "strategy": self.name,
            "settings": self.model_dump(mode="json"),
            "heads": head_names(model),
            "tensors": sorted(tensors),
        }
        text = json.dumps(values, indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    def load(self, model: nn.Module, folder: Path) -> None:
        """Loads the tensors, exactly."""
        import torch

        found = _read(folder)
        parameters = own_parameters(model)
        expected = {name: parameters[name] for name in self.trained(model)}
        compare_tensors(found, expected, folder)
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(found[name])

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """A folder with a trained_tensors.json that names this strategy."""
        if not (folder / CONFIG_FILE).is_file():
            return None
        values = _read_config(folder)
        return cls(**values["settings"]) if values["strategy"] == cls.name else None

    def open_merge(self, folder: Path, base: BaseTensors) -> Merge:
        """The trained tensors replace the base's own, or join them."""
        heads = set(_read_config(folder).get("heads", ()))
        return TensorsMerge(_open(folder), base, heads, folder)


class TensorsMerge:
    """Trained tensors in the place of former ones; a new head is added."""

    def __init__(
        self, tensors: Mapping[str, Rows], base: BaseTensors, heads: set[str], folder: Path
    ) -> None:
        self._tensors = dict(tensors)
        self._base = base
        self._there = there = set(base.names())
        for name, tensor in self._tensors.items():
            # a head may have been wider or narrower before; within the model nothing may
            inside = name in there and name.split(".")[0] not in heads
            if inside and base.shape(name) != tuple(tensor.shape):
                raise AdapterError(
                    "The adapter was made for another base model.",
                    where=f"{folder}: {name}",
                    found=f"adapter {tuple(tensor.shape)}, base {base.shape(name)}",
                    fix="name the base model it was trained on",
                )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a merged tensor."""
        trained = self._trained(name)
        return self._base.shape(name) if trained is None else tuple(trained.shape)

    def edit(self, name: str, rows: Tensor, start: int = 0) -> Tensor:
        """The trained rows, or the very same object where nothing was trained."""
        trained = self._trained(name)
        return rows if trained is None else trained[start : start + len(rows)]

    def _trained(self, name: str) -> Rows | None:
        """One parameter trains for all that are tied to it, and is saved by one of its names."""
        names = [name, *self._base.shared(name)] if name in self._there else [name]
        return next((self._tensors[n] for n in names if n in self._tensors), None)

    def added(self) -> Mapping[str, Rows]:
        """The trained tensors: what the base has is replaced, the rest is new."""
        return self._tensors

    def config_changes(self) -> Mapping[str, Any]:
        """None."""
        return {}


def head_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters of the task's own head; empty for a language model."""
    heads = tuple(f"{name}." for name in head_names(model))
    return [name for name in own_parameters(model) if name.startswith(heads)]


def own_parameters(model: nn.Module) -> dict[str, Any]:
    """The base's parameters by their names in it, whatever adapters have been put into it."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if not any(part.startswith(_ADAPTERS) for part in name.split("."))
    }


def free(model: nn.Module, names: Sequence[str]) -> None:
    """Lets parameters train, in float32.

    A head computes in float32 too (its input is cast); other modules compute as they did.

    Raises:
        RecipeError: a parameter is held quantized and has no gradient.
    """

    parameters = own_parameters(model)
    wanted = {id(parameters[name]) for name in names}
    for name in names:
        if not parameters[name].is_floating_point():
            raise RecipeError(
                "A quantized weight cannot train.",
                where=name,
                found=str(parameters[name].dtype).removeprefix("torch."),
                fix="quantize: none, or a strategy that adds to the weights, such as lora",
            )
    heads = [model.get_submodule(name) for name in head_names(model)]
    inside_heads = {module for head in heads for module in head.modules()}
    for head in heads:
        if any(id(p) in wanted for p in head.parameters()):
            head.to(_precise(next(head.parameters())))
            head.register_forward_pre_hook(_cast_input)
    for module in model.modules():
        own = [(n, p) for n, p in module.named_parameters(recurse=False) if id(p) in wanted]
        if own and module not in inside_heads and own[0][1].dtype != _precise(own[0][1]):
            _compute_as_before(module, [name for name, _ in own], own[0][1].dtype)
    for name in names:
        parameter = parameters[name]
        parameter.data = parameter.data.to(_precise(parameter))
        parameter.requires_grad_(True)


def _precise(tensor: Tensor) -> torch.dtype:
    """float32, or what is more precise already."""
    import torch

    return torch.promote_types(tensor.dtype, torch.float32)


def _compute_as_before(module: Any, names: Sequence[str], dtype: torch.dtype) -> None:
    """The module's ``forward`` sees its parameters in their former type; gradients reach float32.

    An embedding is looked up first and cast then: its table is far larger than what is taken. A
    linear's input is cast: T5 casts it to the type of the weight, which looks like float32 outside.
    """
    from torch import nn

    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if isinstance(module, nn.Embedding):
            return plain(*args, **kwargs).to(dtype)
        if isinstance(module, nn.Linear):
            args = tuple(a.to(dtype) for a in args)
        held = {name: module._parameters[name] for name in names}
        try:
            for name, parameter in held.items():
                module._parameters[name] = parameter.to(dtype)
            return plain(*args, **kwargs)
        finally:
            module._parameters.update(held)

    module.forward = forward


def _cast_input(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    import torch

    return tuple(
        a.to(_precise(a)) if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if not isinstance(values["settings"], dict) or not isinstance(values["tensors"], list):
            raise TypeError("not a description of trained tensors")
        if not isinstance(values["strategy"], str):
            raise TypeError("names no strategy")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError("The trained tensors' description cannot be read.",
                           where=folder / CONFIG_FILE, found=error) from None  # fmt: skip
    return dict(values)


def _read(folder: Path) -> dict[str, Tensor]:
    return {name: stored.read() for name, stored in _open(folder).items()}


def _open(folder: Path) -> dict[str, StoredTensor]:
    """The trained tensors, read only when they are asked for, and by rows."""
    tensors = stored_tensors(folder, WEIGHTS_FILE)
    named = _read_config(folder)["tensors"]
    if sorted(tensors) != named:
        raise AdapterError(
            f"The trained tensors are not those that {CONFIG_FILE} names.",
            where=folder / WEIGHTS_FILE,
            found=", ".join(sorted(tensors)[:8]),
            fix=f"it must hold {', '.join(named[:8])}",
        )
    return tensors
