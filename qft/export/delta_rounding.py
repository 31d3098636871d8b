"""What a quantized format leaves of an adapter's change.

With W the base's weights, Δ the adapter's change, S what is stored (dequantized) and Q(W) what the
base alone would be stored as, over all quantized tensors that the adapter changes:

- ``rounding`` is ‖S − (W + Δ)‖ / ‖Δ‖: how large the error is beside the change. The base's own
  rounding is in it, so that it is far above 1 for a gentle adapter that is none the worse for it.
- ``kept`` is ⟨S − Q(W), Δ⟩ / ‖Δ‖²: the part of the change that survives, along itself; 1 is all of
  it, 0 is that every weight fell back to where the base's was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DeltaRounding:
    """The two figures; see the module's text."""

    rounding: float
    kept: float

    def text(self) -> str:
        """One line."""
        return (
            f"rounding is {self.rounding:.3g} times the adapter's change, "
            f"of which {self.kept:.1%} is kept"
        )


class DeltaTally:
    """Sums over blocks of rows, in double precision."""

    def __init__(self) -> None:
        self._error = self._change = self._along = 0.0

    def add(self, stored: Tensor, plain: Tensor, base: Tensor, merged: Tensor) -> None:
        """One block.

        Args:
            stored: S, dequantized.
            plain: Q(W), dequantized.
            base: W.
            merged: W + Δ, not rounded.
        """
        change = merged.float() - base.float()
        self._change += _product(change, change)
        self._along += _product(stored.float() - plain.float(), change)
        error = stored.float() - merged.float()
        self._error += _product(error, error)

    def result(self) -> DeltaRounding | None:
        """The figures; None where nothing was changed."""
        if not self._change:
            return None
        return DeltaRounding(math.sqrt(self._error / self._change), self._along / self._change)


def _product(one: Tensor, other: Tensor) -> float:
    return sum(float(a.double() @ b.double()) for a, b in zip(one, other, strict=True))
