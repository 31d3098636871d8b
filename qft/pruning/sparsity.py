"""How many weights of a matrix become zero, and where: a share of it, or n of every m."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from qft.errors import ModelError, RecipeError

_PATTERN = re.compile(r"(\d{1,4}):(\d{1,4})")


@dataclass(frozen=True)
class Sparsity:
    """What is wanted of each matrix.

    Attributes:
        share: of its weights that become zero, between 0 and 1.
        kept: of n:m, the n: so many of each group stay.
        group: of n:m, the m: weights that stand beside one another in a row; None is no pattern.
    """

    share: float
    kept: int | None = None
    group: int | None = None

    def __str__(self) -> str:
        return f"{self.share:g}" if self.group is None else f"{self.kept}:{self.group}"

    def zeros_of(self, size: int) -> int:
        """How many of ``size`` weights that are compared with one another become zero."""
        return math.floor(self.share * size + 0.5)

    def compared(self, columns: int) -> int:
        """How many weights of a row of ``columns`` are compared with one another."""
        return columns if self.group is None else self.group

    def require_fits(self, name: str, shape: Sequence[int]) -> None:
        """Refuses a matrix whose rows cannot be cut into groups.

        Args:
            name: of the tensor.
            shape: ``[out, in]``.

        Raises:
            ModelError: the rows are no multiple of the pattern's m.
        """
        if self.group is not None and shape[1] % self.group:
            raise ModelError(
                "The rows of a weight cannot be cut into the pattern's groups.",
                where=name,
                found=f"{shape[1]} inputs, pattern {self}",
                fix=f"a pattern whose m divides {shape[1]}, or --ratio {self.share:g}",
            )


def parse_sparsity(ratio: float | None, pattern: str | None) -> Sparsity:
    """What the user asked for.

    Args:
        ratio: share of the weights that become zero.
        pattern: ``n:m``: of every m weights of a row, n stay.

    Raises:
        RecipeError: neither or both are given, or what is given makes no sense.
    """
    if (ratio is None) == (pattern is None):
        raise RecipeError(
            "Weights become zero by a share or by a pattern: one of the two.",
            where="--ratio, --pattern",
            found="neither" if ratio is None else f"--ratio {ratio:g} --pattern {pattern}",
            fix="--ratio 0.5, or --pattern 2:4, which fixes the share itself",
        )
    if pattern is None:
        assert ratio is not None
        if not 0 < ratio < 1:
            raise RecipeError(
                "The share of weights that become zero must lie between 0 and 1.",
                where="--ratio",
                found=ratio,
                fix="--ratio 0.5",
            )
        return Sparsity(ratio)
    match = _PATTERN.fullmatch(pattern.strip())
    kept, group = (int(number) for number in match.groups()) if match else (0, 0)
    if not 0 < kept < group:
        raise RecipeError(
            "A pattern n:m keeps n of every m weights, and n must be less than m.",
            where="--pattern",
            found=pattern,
            fix="--pattern 2:4, which makes half of the weights zero",
        )
    return Sparsity(1 - kept / group, kept, group)
