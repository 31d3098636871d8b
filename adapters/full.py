"""Full fine-tuning: every parameter trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from adapters.freed_tensors import FreedTensors, own_parameters
from qft.strategy import Needs

if TYPE_CHECKING:
    from torch import nn


class Full(FreedTensors):
    """Trains everything: the most memory, and the most that data can change."""

    name: ClassVar[str] = "full"

    def needs(self, skeleton: nn.Module) -> Needs:
        """Nothing may be quantized: every weight needs a gradient."""
        return Needs(full_precision=tuple(name for name, _ in skeleton.named_modules() if name))

    def trained(self, model: nn.Module) -> list[str]:
        """Every parameter; tied ones once."""
        return list(own_parameters(model))
