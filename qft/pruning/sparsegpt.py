"""SparseGPT: weights become zero one column at a time, and the rest make up for each.

Among the inputs X of a layer, what a column's loss does to the output can be undone in part by the
columns behind it; the inverse of the Hessian ``H = X Xᵀ`` says how. With ``H⁻¹ = Uᵀ U``, U upper
triangular, the columns are worked off from the left:

    score of w_ij = (w_ij / U_jj)²        the row's rest moves by -(w_ij / U_jj) U_j,:

Source: Frantar & Alistarh 2023, https://arxiv.org/abs/2301.00774. There U comes of two
factorisations with an inversion in between, three matrices of H's size. Here H is kept with its
columns in reverse order (`qft.pruning.hessian`): the factor of that, inverted, is U in reverse
order, so one factorisation is enough, and it happens within H. Of U there is one strip of rows at a
time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qft.errors import ModelError
from qft.pruning.hessian import Factor, inverse_rows
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
        factor: of the Hessian of its inputs (`qft.pruning.hessian.factorise_`).
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
    for begin in range(0, work.shape[1], step):
        end = min(begin + step, work.shape[1])
        rows = inverse_rows(factor, begin, end)  # U[begin:end, begin:]
        columns = work[:, begin:end].t().contiguous()
        errors = _prune_block_(columns, rows[:, : end - begin], sparsity, compared)
        work[:, begin:end] = columns.t()
        work[:, end:].addmm_(errors.t(), rows[:, end - begin :], alpha=-1)
    if work is not weight:
        weight.copy_(work)
    if not all(bool(torch.isfinite(rows).all()) for rows in weight.split(BLOCK)):
        raise ModelError(
            "The weights that make up for the pruned ones are not finite.",
            where=name,
            fix="other calibration rows, or --method wanda",
        )


def _prune_block_(columns: Tensor, rows: Tensor, sparsity: Sparsity, compared: int) -> Tensor:
    """Prunes some columns in place.

    Args:
        columns: ``[block, out]``: each of the weight's columns is a row here, for speed.
        rows: ``[block, block]`` of U.

    Returns:
        ``[block, out]``: what each pruned weight was, over ``U_jj``; zero where nothing went.
    """
    errors = torch.zeros_like(columns)
    pivots = rows.diagonal()
    goes = torch.zeros(0)
    for at, column in enumerate(columns):
        if at % compared == 0:
            goes = _choose(columns[at : at + compared], pivots[at : at + compared], sparsity)
        gone = goes[at % compared]
        errors[at] = torch.where(gone, column / pivots[at], 0)
        columns[at:].addr_(rows[at, at:], errors[at], alpha=-1)
        column.masked_fill_(gone, 0)
    return errors


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
