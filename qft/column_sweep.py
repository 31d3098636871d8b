"""A matrix worked off column by column, where the columns behind make up for what each loses.

Among the inputs X of a layer, what is taken from a column changes the output; the inverse of
``H = X Xᵀ`` says how the other columns undo most of it. With ``H⁻¹ = Uᵀ U``, U upper triangular,
going from the left, a column w_j that becomes w'_j moves its row's rest by

    -(w_j - w'_j) / U_jj · U_j,:

Sources: Hassibi & Stork 1993 (optimal brain surgeon); Frantar & Alistarh 2022,
https://arxiv.org/abs/2208.11580; in this order and by blocks: Frantar et al. 2022 (GPTQ),
https://arxiv.org/abs/2210.17323.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qft.input_hessian import Factor, inverse_rows

# (first column of the block, place in it, the block's columns as rows, their U_jj) → the column
Become = Callable[[int, int, Tensor, Tensor], Tensor]


def sweep_(matrix: Tensor, factor: Factor, block: int, become: Become) -> None:
    """Works a matrix off in place.

    Args:
        matrix: ``[out, in]``, float32.
        factor: of the Hessian of its inputs (`qft.input_hessian.factorise_`).
        block: columns after which the rest of the matrix is brought up to date; it changes no
            result but by rounding.
        become: what a column becomes; given the number of the block's first column, the column's
            place in the block, ``[block, out]`` (each column a row, for speed; those before it are
            done, those behind it up to date) and the ``[block]`` of U_jj.
    """
    for begin in range(0, matrix.shape[1], block):
        end = min(begin + block, matrix.shape[1])
        rows = inverse_rows(factor, begin, end)  # U[begin:end, begin:]
        columns = matrix[:, begin:end].t().contiguous()
        lost = _sweep_block_(begin, columns, rows[:, : end - begin], become)
        matrix[:, begin:end] = columns.t()
        matrix[:, end:].addmm_(lost.t(), rows[:, end - begin :], alpha=-1)


def _sweep_block_(begin: int, columns: Tensor, rows: Tensor, become: Become) -> Tensor:
    """Works some columns off in place.

    Args:
        columns: ``[block, out]``.
        rows: ``[block, block]`` of U.

    Returns:
        ``[block, out]``: what each column lost, over ``U_jj``.
    """
    lost = torch.empty_like(columns)
    pivots = rows.diagonal()
    for at, column in enumerate(columns):
        result = become(begin, at, columns, pivots)
        lost[at] = (column - result) / pivots[at]
        columns[at:].addr_(rows[at, at:], lost[at], alpha=-1)
        column.copy_(result)
    return lost
