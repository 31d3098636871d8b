"""BitFit: biases and normalisations train, the matrices stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from adapters.freed_tensors import FreedTensors, head_parameters, own_parameters
from qft.errors import RecipeError
from qft.lean.model_parts import head_names
from qft.strategy import Needs

if TYPE_CHECKING:
    from torch import nn


class BitFit(FreedTensors):
    """Trains the biases and the normalisations' scales: about a thousandth of a model."""

    name: ClassVar[str] = "bitfit"
    paper: ClassVar[str] = "Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199"

    biases: bool = Field(True, description="train every bias")
    norms: bool = Field(True, description="train the normalisations (all there is in a Llama)")

    def needs(self, skeleton: nn.Module) -> Needs:
        """A new head trains beside them."""
        return Needs(full_precision=tuple(head_names(skeleton)))

    def trained(self, model: nn.Module) -> list[str]:
        """Biases, normalisations and the head's parameters."""
        norms = {
            f"{name}.{parameter}"
            for name, module in model.named_modules()
            if "norm" in type(module).__name__.lower()
            for parameter, _ in module.named_parameters(recurse=False)
        }
        names = [
            name
            for name in own_parameters(model)
            if (self.norms and name in norms)
            or (self.biases and name.endswith("bias") and name not in norms)
        ]
        if not names:
            raise RecipeError(
                "The model has nothing that this strategy trains.",
                where="strategy: bitfit",
                found=f"biases: {self.biases}, norms: {self.norms}",
                fix="norms: true, or another strategy such as lora",
            )
        heads = head_parameters(model)
        return [*(name for name in names if name not in heads), *heads]
