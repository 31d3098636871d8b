"""Several low-rank updates of one layer, as factors: side by side, or the best of a given rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qft.lean.combining import Combination, combined_rows
from qft.lean.magnitudes import smallest_kept
from qft.shards import row_blocks

if TYPE_CHECKING:
    from torch import Tensor

    from qft.shards import StoredTensor


@dataclass(frozen=True)
class Factors:
    """One adapter's update of one layer, ``scale · up @ down``, still in its file.

    Attributes:
        number: the adapter's.
        down: ``[rank, in]``.
        up: ``[out, rank]``.
    """

    number: int
    down: StoredTensor
    up: StoredTensor
    scale: float

    def read(self) -> tuple[Tensor, Tensor]:
        """Down and up, float32."""
        return self.down.read().float(), self.up.read().float()


def concatenated(updates: Sequence[Factors], how: Combination) -> tuple[Tensor, Tensor]:
    """Factors whose product is the weighted sum of the updates, exactly."""
    import torch

    downs, ups = zip(*(update.read() for update in updates), strict=True)
    scaled = [down * how.weights[update.number] * update.scale
              for down, update in zip(downs, updates, strict=True)]  # fmt: skip
    return torch.cat(scaled, dim=0), torch.cat(ups, dim=1)


def decomposed(
    name: str, updates: Sequence[Factors], how: Combination, rank: int
) -> tuple[Tensor, Tensor]:
    """Down ``[≤ rank, in]`` and up ``[out, ≤ rank]`` of the combined update, float32.

    A weighted sum alone is decomposed by its factors, with no more memory than they take. What
    drops values, or clamps, forms the layer's update, ``[out, in]`` in float32, and decomposes it:
    about seven times its bytes.
    """
    if how.sparse or how.svd_clamp is not None:
        return _of_dense(_dense(name, updates, how), how, rank)
    return _of_factors(updates, how, rank)


def _of_factors(updates: Sequence[Factors], how: Combination, rank: int) -> tuple[Tensor, Tensor]:
    """``U D`` is ``Qu (Ru Rdᵀ) Qdᵀ``: the middle is as small as the ranks' sum."""
    import torch

    down, up = concatenated(updates, how)
    left, up_core = torch.linalg.qr(up.double())
    right, down_core = torch.linalg.qr(down.T.double())
    u, size, v = torch.linalg.svd(up_core @ down_core.T, full_matrices=False)
    up = left @ (u[:, :rank] * size[:rank])
    return (v[:rank] @ right.T).float(), up.float()


def _of_dense(delta: Tensor, how: Combination, rank: int) -> tuple[Tensor, Tensor]:
    import torch

    u, size, v = torch.linalg.svd(delta, full_matrices=False)
    up, down = u[:, :rank] * size[:rank], v[:rank]
    if how.svd_clamp is not None:
        highest = torch.quantile(torch.cat([up.flatten(), down.flatten()]), how.svd_clamp)
        up, down = up.clamp(-highest, highest), down.clamp(-highest, highest)
    return down, up


def _dense(name: str, updates: Sequence[Factors], how: Combination) -> Tensor:
    """The combined update, ``[out, in]``, made in blocks of rows."""
    import torch

    shape = (updates[0].up.shape[0], updates[0].down.shape[1])
    downs = {update.number: update.down.read().float() for update in updates}

    def parts(rows: slice) -> Mapping[int, Tensor]:
        return {u.number: (u.up[rows].float() @ downs[u.number]) * u.scale for u in updates}

    def blocks() -> Iterator[Mapping[int, Tensor]]:
        return (parts(rows) for rows in row_blocks(shape))

    thresholds: Sequence[float] = ()
    if how.by_magnitude:
        kept = int((how.density or 1.0) * shape[0] * shape[1])
        thresholds = smallest_kept(blocks, len(how.weights), kept)
    delta = torch.empty(shape)
    for rows in row_blocks(shape):
        delta[rows] = combined_rows(parts(rows), how, name, start=rows.start, thresholds=thresholds)
    return delta
