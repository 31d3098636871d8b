"""SparseGPT: weights become zero one column at a time, and the rest make up for each.

Among the inputs X of a layer, what a column's loss does to the output can be undone in part by the
columns behind it; the inverse of the Hessian ``H = X Xᵀ`` says how. With ``H⁻¹ = Uᵀ U``, U upper
triangular, the columns are worked off from the left:

    score of w_ij = (w_ij / U_jj)²        the row's rest moves by -(w_ij / U_jj) U_j,:

Source: Frantar & Alistarh 2023, https://arxiv.org/abs/2301.00774. There U comes of two
factorisations with an inversion in between, three matrices of H's size. Here H is kept with its
columns in reverse order (`qft.input_hessian`): the factor of that, inverted, is U in reverse
order, so one factorisation is enough, and it happens within H. Of U there is one strip of rows at a
time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qft.column_sweep import sweep_
from qft.errors import ModelError
from qft.input_hessian import Factor
from qft.pruning.smallest import smallest
from qft.pruning.sparsity import Sparsity

BLOCK = 128  # columns between two looks at which weights go, as in the paper


def prune_by_sparsegpt_(
    weight: Tensor,
    factor: Factor,
    sparsity: Sparsity,
    *,
    name: str = "weight",
    mask_block: int = BLOCK,
    block: int = BLOCK,
) -> None:
    """Prunes a matrix in place.

    Args:
        weight: ``[out, in]``; computed in float32 whatever it is stored as.
        factor: of the Hessian of its inputs (`qft.input_hessian.factorise_`).
        sparsity: a share is taken of each ``mask_block`` columns together.
        name: of the tensor, for an error.
        mask_block: columns that are compared with one another where there is no pattern.
        block: columns after which the rest of the matrix is brought up to date, rounded up to what
            is compared; it changes no result.

    Raises:
        ModelError: the result is not finite in the weight's dtype.
    """
    compared = sparsity.group or min(mask_block, weight.shape[1])
    step = -(-block // compared) * compared
    work = weight.float()  # the very same tensor where it is float32
    work.masked_fill_(factor.dead, 0)  # on an input that is always zero any weight will do
    sweep_(work, factor, step, _Pruned(sparsity, compared))
    if work is not weight:
        weight.copy_(work)
    if not all(bool(torch.isfinite(rows).all()) for rows in weight.split(BLOCK)):
        raise ModelError(
            "The weights that make up for the pruned ones are not finite.",
            where=name,
            fix="other calibration rows, or --method wanda",
        )


class _Pruned:
    """What stays of a column, as :func:`qft.column_sweep.sweep_` asks for it."""

    def __init__(self, sparsity: Sparsity, compared: int) -> None:
        self._sparsity, self._compared = sparsity, compared
        self._goes = torch.zeros(0)

    def __call__(self, begin: int, at: int, columns: Tensor, pivots: Tensor) -> Tensor:
        place = at % self._compared
        if place == 0:
            part = slice(at, at + self._compared)
            self._goes = _choose(columns[part], pivots[part], self._sparsity)
        return columns[at].masked_fill(self._goes[place], 0)


def _choose(columns: Tensor, pivots: Tensor, sparsity: Sparsity) -> Tensor:
    """Which weights of these columns go: the smallest of all of them, or of each row's group.

    Args:
        columns: ``[compared, out]``; so is what it returns.
    """
    scores = (columns / pivots[:, None]).square_().t()
    if sparsity.group is None:
        scores = scores.reshape(1, -1)
    chosen = smallest(scores, sparsity.zeros_of(scores.shape[1]))
    return chosen.view(-1, len(columns)).t().contiguous()
