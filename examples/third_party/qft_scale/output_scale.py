"""Output scale: one learned factor for each output of each targeted linear layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from qft.errors import AdapterError, RecipeError
from qft.strategy import BaseTensors, Context, Merge, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG_FILE = "output_scale.json"
WEIGHTS_FILE = "output_scale.safetensors"
PARAMETER = "output_delta"  # the factor is 1 + delta, so weight decay pulls towards the base model


class OutputScale(Strategy):
    """``(1 + d) * (W x + b)`` with only the vector ``d`` trained."""

    name: ClassVar[str] = "output-scale"
    paper: ClassVar[str] = "a relative of IA3: Liu et al. 2022, https://arxiv.org/abs/2205.05638"

    targets: str | tuple[str, ...] = Field(
        "all-linear", description="all-linear, or the last part of module names"
    )

    @property
    def mergeable(self) -> bool:
        """Always: a factor on an output is a factor on a row of the weight."""
        return True

    @property
    def tasks(self) -> frozenset[str]:
        """Language modelling only; a new classification head would have to train as well."""
        return frozenset({"text", "instruct", "chat"})

    def attach(self, model: nn.Module, context: Context) -> nn.Module:
        """Freezes the model and hangs a vector of zeros on each targeted layer.

        Raises:
            RecipeError: no linear layer of the model has one of the targeted names.
        """
        import torch
        from torch import nn

        layers = self._targeted(model)
        if not layers:
            raise RecipeError(
                f"The strategy {self.name!r} finds none of its targets in this model.",
                where="strategy.targets",
                found=self.targets,
                fix="targets: all-linear",
            )
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for layer in layers.values():
            delta = torch.zeros(layer.out_features, device=layer.weight.device)
            layer.register_parameter(PARAMETER, nn.Parameter(delta))
            layer.register_forward_hook(_scale_output)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes output_scale.safetensors and output_scale.json."""
        from safetensors.torch import save_file

        tensors = {
            name: delta.detach().cpu().contiguous() for name, delta in _deltas(model).items()
        }
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps({"format": 1, **self.model_dump(mode="json")}, indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    def load(self, model: nn.Module, folder: Path) -> None:
        """Loads the vectors, exactly.

        Raises:
            AdapterError: they belong to another model.
        """
        import torch

        found, expected = _read(folder), _deltas(model)
        if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in expected.items()}:
            raise _other_base(folder, sorted(set(found) ^ set(expected)))
        with torch.no_grad():
            for name, delta in expected.items():
                delta.copy_(found[name])

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """Rebuilds the settings from a folder that `save` wrote."""
        path = folder / CONFIG_FILE
        if not path.is_file():
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        targets = values["targets"]
        return cls(targets=targets if isinstance(targets, str) else tuple(targets))

    def open_merge(self, folder: Path, base: BaseTensors) -> Merge:
        """Opens the vectors for the streamed merge."""
        return OutputScaleMerge(_read(folder), base, folder)

    def _targeted(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The linear layers below the model's head; quantized ones are subclasses of nn.Linear."""
        from torch import nn

        find_head: Any = getattr(model, "get_output_embeddings", None)
        head = find_head() if find_head else None
        wanted = None if self.targets == "all-linear" else self.targets
        names = {wanted} if isinstance(wanted, str) else wanted
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and module is not head
            and (names is None or name.rpartition(".")[2] in names)
        }


class OutputScaleMerge:
    """Multiplies the rows of a weight, and the bias, with the learned factors."""

    def __init__(self, deltas: Mapping[str, Tensor], base: BaseTensors, folder: Path) -> None:
        self._base = base
        self._factors = {name: 1 + delta.float() for name, delta in deltas.items()}
        held = set(base.names())
        wrong = [
            name
            for name, factor in self._factors.items()
            if f"{name}.weight" not in held or base.shape(f"{name}.weight")[0] != len(factor)
        ]
        if wrong:
            raise _other_base(folder, wrong)

    def shape(self, name: str) -> tuple[int, ...]:
        """Every tensor keeps its shape."""
        return self._base.shape(name)

    def edit(self, name: str, rows: Tensor, start: int = 0) -> Tensor:
        """The scaled rows in float32, or the very same object."""
        module, _, kind = name.rpartition(".")
        factor = self._factors.get(module)
        if factor is None:
            return rows
        factor = factor[start : start + len(rows)]
        return rows.float() * (factor[:, None] if kind == "weight" else factor)

    def added(self) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}

    def config_changes(self) -> Mapping[str, Any]:
        """None."""
        return {}


def _scale_output(module: Any, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    # the product in float32: near one, bfloat16 has steps of a hundredth
    delta: Tensor = getattr(module, PARAMETER)
    return (output * (1 + delta)).to(output.dtype)


def _deltas(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removesuffix(f".{PARAMETER}"): parameter
        for name, parameter in model.named_parameters()
        if name.endswith(f".{PARAMETER}")
    }


def _read(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_FILE
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            "The adapter's weights are missing or broken.", where=path, found=error
        ) from None


def _other_base(folder: Path, names: list[str]) -> AdapterError:
    return AdapterError(
        "The adapter was made for another base model.",
        where=folder,
        found=f"{len(names)} layer(s) do not match, first {names[0]}" if names else "other shapes",
        fix="name the base model it was trained on",
    )
