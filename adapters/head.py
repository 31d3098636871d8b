"""Head-only: the classification head trains, everything below it stays as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adapters.peft_backed import compare_tensors
from qft.errors import AdapterError, RecipeError
from qft.lean.model_parts import head_names, layer_stacks
from qft.strategy import BaseTensors, Context, Merge, Needs, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG_FILE = "head_config.json"
WEIGHTS_FILE = "head.safetensors"


class Head(Strategy):
    """Trains the new layers beside the base model: the cheapest thing that can work."""

    name: ClassVar[str] = "head"

    @property
    def mergeable(self) -> bool:
        """Always: the head is tensors of its own."""
        return True

    @property
    def tasks(self) -> frozenset[str]:
        """Only tasks with a head of their own; a language model's head is its vocabulary."""
        return frozenset({"classify", "extract", "token"})

    def needs(self, skeleton: nn.Module) -> Needs:
        """The head in full precision; no layer below it trains."""
        layers = sum(len(stack) for stack in layer_stacks(skeleton).values())
        return Needs(full_precision=tuple(_heads(skeleton)), lowest_trainable_layer=layers)

    def attach(self, model: nn.Module, context: Context) -> nn.Module:
        """Freezes all but the head, and keeps the head in float32 (its input is cast to match)."""
        names = _heads(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name in names:
            head = model.get_submodule(name).float()
            head.register_forward_pre_hook(_cast_input)
            for parameter in head.parameters():
                parameter.requires_grad_(True)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes head.safetensors and head_config.json."""
        from safetensors.torch import save_file

        tensors = {name: t.detach().cpu().contiguous() for name, t in _tensors(model).items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        values = {"format": 1, "strategy": "head", "tensors": sorted(tensors)}
        text = json.dumps(values, indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    def load(self, model: nn.Module, folder: Path) -> None:
        """Loads the head, exactly."""
        import torch

        found = _read(folder)
        expected = _tensors(model)
        compare_tensors(found, expected, folder)
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(found[name])

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """A folder with a head_config.json."""
        return cls() if (folder / CONFIG_FILE).is_file() else None

    def open_merge(self, folder: Path, base: BaseTensors) -> Merge:
        """The head's tensors are added to the base's own."""
        return HeadMerge(_read(folder), base)


class HeadMerge:
    """Nothing is edited; the head is added."""

    def __init__(self, tensors: Mapping[str, Tensor], base: BaseTensors) -> None:
        self._tensors = dict(tensors)
        self._base = base

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a merged tensor."""
        if name in self._tensors:
            return tuple(self._tensors[name].shape)
        return self._base.shape(name)

    def edit(self, name: str, tensor: Tensor) -> Tensor:
        """A former head is replaced, all else stays the very same object."""
        return self._tensors.get(name, tensor)

    def added(self) -> Mapping[str, Tensor]:
        """The head."""
        return self._tensors

    def config_changes(self) -> Mapping[str, Any]:
        """None."""
        return {}


def _heads(model: nn.Module) -> list[str]:
    names = head_names(model)
    if not names:
        raise RecipeError(
            "This model has no head of its own to train; its last layer is its vocabulary.",
            where="strategy: head",
            found=type(model).__name__,
            fix="task: classify, extract or token, or another strategy such as lora",
        )
    return names


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name in _heads(model)
        for key, tensor in model.get_submodule(name).state_dict().items()
    }


def _read(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            "The head's weights are missing or broken.",
            where=folder / WEIGHTS_FILE,
            found=error,
        ) from None
    try:
        named = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["tensors"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError("The head's description cannot be read.",
                           where=folder / CONFIG_FILE, found=error) from None  # fmt: skip
    if sorted(tensors) != named:
        raise AdapterError(
            f"The head's weights are not the tensors that {CONFIG_FILE} names.",
            where=folder / WEIGHTS_FILE,
            found=", ".join(sorted(tensors)),
            fix=f"it must hold {named}",
        )
    return tensors


def _cast_input(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    import torch

    return tuple(
        a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments
    )
