"""The arithmetic of a low-rank update on one weight, block by block: LoRA's, DoRA's, AdaLoRA's.

A merge must not depend on where its blocks end, and shall give PEFT's bits. A matrix product of a
few rows adds up in another order than one of many: of few, neighbours are computed too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qft.strategy import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from qft.shards import StoredTensor

_MANY_ROWS = 64


@dataclass(frozen=True)
class ChangedStart:
    """A start that took its first update out of the weight, which the folder does not hold.

    Attributes:
        kind: PEFT's ``init_lora_weights``: ``pissa`` or ``olora``; both follow from the weight.
    """

    kind: str
    rank: int
    alpha: float
    rank_stabilised: bool

    def residual(self, weight: Tensor, transposed: bool) -> Tensor:
        """What PEFT leaves of a weight when a training begins, by PEFT's own code.

        It needs the whole weight, and its decomposition several times as much.
        """
        import torch
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        height, width = weight.shape
        with torch.device("meta"):
            layer = Conv1D(width, height) if transposed else nn.Linear(width, height, bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, use_rslora=self.rank_stabilised,  # type: ignore[arg-type]
                            init_lora_weights=self.kind, fan_in_fan_out=transposed)  # type: ignore[arg-type]  # fmt: skip
        Linear(layer, "default", config, r=self.rank, lora_alpha=self.alpha,  # type: ignore[arg-type]
               is_target_conv_1d_layer=transposed)  # fmt: skip
        return layer.weight.data


@dataclass(frozen=True)
class Update:
    """What is added to one weight: ``scale · up @ down``, read when its turn has come.

    Attributes:
        up: ``[out, rank]``.
        down: ``[rank, in]``.
        magnitude: DoRA's, ``[out]``: the length every row of the sum gets.
        gain: AdaLoRA's, ``[rank, 1]``: what each row of ``down`` is multiplied with.
        first: what LoftQ began with, an up and a down, whose product is taken off again.
        ranks: AdaLoRA's: what the product is divided by, after it was scaled.
        start: set where the weight itself was changed before the training began.
        lookup: of an embedding, whose weight is stored ``[in, out]``.
    """

    up: StoredTensor
    down: StoredTensor
    scale: float
    magnitude: StoredTensor | None = None
    gain: StoredTensor | None = None
    first: tuple[StoredTensor, StoredTensor] | None = None
    ranks: float | None = None
    start: ChangedStart | None = None
    lookup: bool = False

    def read_down(self) -> Tensor:
        """All of the right factor, float32, ``[rank, in]``."""
        import torch

        down = self.down.read().float()
        if self.gain is not None:
            down = (self.down.read() * self.gain.read()).float()
        return down if self.first is None else torch.cat([down, self.first[1].read().float()])

    def scaled(self, product: Tensor) -> Tensor:
        """The product of both factors times the scale, in place."""
        product.mul_(self.scale)
        return product if self.ranks is None else product.div_(product.new_tensor(self.ranks))

    def read_up(self, rows: slice) -> Tensor:
        """Some rows of the left factor, float32, ``[rows, rank]``."""
        import torch

        up = self.up[rows].float()
        return up if self.first is None else torch.cat([up, -self.first[0][rows].float()], dim=1)

    def apart(self, transposed: bool) -> LowRank:
        """The update itself, for whoever adds it; only its two factors and the scale count."""
        rank = self.up.shape[1] + (self.first[0].shape[1] if self.first is not None else 0)
        scale = self.scale if self.ranks is None else self.scale / self.ranks
        shape = (self.up.shape[0], self.down.shape[1])
        return LowRank(shape, rank, scale, transposed, self.read_up, self.read_down)


@dataclass(frozen=True)
class Weight:
    """The weight below an update.

    Attributes:
        shape: as it is stored.
        read: all of it.
        columns: some neighbouring columns.
        transposed: stored ``[in, out]``, as GPT-2's Conv1D and embeddings are.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    columns: Callable[[range], Tensor]
    transposed: bool


class Fold:
    """One update on its weight: holds what all blocks need, which is small beside the weight.

    Only a start that changed the base is not: the rest of the weight comes from a decomposition
    of all of it, and is held as a whole.
    """

    def __init__(self, name: str, update: Update, weight: Weight, *, keep_zeros: bool) -> None:
        self.name = name
        self._update, self._weight, self._keep_zeros = update, weight, keep_zeros
        self._residual: Tensor | None = None
        if update.start is not None:
            self._residual = update.start.residual(weight.read(), weight.transposed)
        self._down: Tensor | None = None
        if not update.lookup or update.magnitude is not None:
            self._down = update.read_down()
        self._stretch = self._measured() if weight.transposed and update.magnitude else None

    def edit(self, rows: Tensor, start: int) -> Tensor:
        """Merged rows, float32; the first of them is number ``start``."""
        end = start + len(rows)
        if self._residual is not None:
            rows = self._residual[start:end]
        delta = self._delta(start, end)
        if self._keep_zeros:
            delta.masked_fill_(rows == 0, 0)
        merged = delta.add_(rows)  # in float32
        if self._update.magnitude is None:
            return merged
        if self._stretch is not None:
            return merged.mul_(self._stretch)
        length = merged.norm(dim=1, keepdim=True)
        magnitude = self._update.magnitude[start:end].float()
        return merged.mul_(magnitude.reshape(length.shape) / length)

    def _delta(self, start: int, end: int) -> Tensor:
        """``scale · up @ down`` for some rows of the stored weight, ``[end - start, …]``."""
        low, high = _widened(start, end, self._weight.shape[0])
        if not self._weight.transposed:
            assert self._down is not None
            delta = self._update.read_up(slice(low, high)) @ self._down
        else:
            delta = (self._update.read_up(slice(None)) @ self._inputs(low, high)).T
        return self._update.scaled(delta[start - low : end - low])

    def _inputs(self, low: int, high: int) -> Tensor:
        """Some columns of the right factor; those of an embedding are as many as its words."""
        if self._down is None:
            return self._update.down.columns(range(low, high)).float()
        return self._down[:, low:high]

    def _measured(self) -> Tensor:
        """What DoRA multiplies each output of a transposed weight with, ``[1, out]``.

        An output's weights are a column there, so that their length needs every row: read by
        columns before the first block of rows is merged.
        """
        import torch

        from qft.shards import row_blocks

        magnitude = self._update.magnitude
        assert magnitude is not None
        assert self._down is not None
        height, width = self._weight.shape
        stretch = torch.empty(width)
        for block in row_blocks((width, height)):
            low, high = _widened(block.start, block.stop, width)
            merged = self._columns(low, high)
            product = self._update.read_up(slice(low, high)) @ self._down
            merged += self._update.scaled(product).T
            length = merged.norm(dim=0)[block.start - low : block.stop - low]
            stretch[block] = magnitude[block].float() / length
        return stretch[None]

    def _columns(self, low: int, high: int) -> Tensor:
        if self._residual is not None:
            return self._residual[:, low:high].float().clone()
        return self._weight.columns(range(low, high)).float()


def _widened(start: int, end: int, count: int) -> tuple[int, int]:
    """A range of at least so many rows that a product of them adds up as the whole one does."""
    low = max(0, min(start, count - _MANY_ROWS))
    return low, max(end, min(low + _MANY_ROWS, count))
