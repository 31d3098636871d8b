"""A tensor that something is still done to, whenever some of its rows are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qft.strategy import Rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class EditedRows:
    """Edits the rows that are asked for, so that a merge holds no more than these.

    Attributes:
        rows: the tensor before.
        edit: makes of some rows, and of the number of the first, what they shall be.
    """

    rows: Rows
    edit: Callable[[Tensor, int], Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """It keeps its shape."""
        return tuple(self.rows.shape)

    @property
    def dtype(self) -> torch.dtype:
        """What it will be stored as."""
        return self.rows.dtype

    def __getitem__(self, part: slice) -> Tensor:
        return self.edit(self.rows[part], part.start or 0)
