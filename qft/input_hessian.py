"""The Hessian of a layer's inputs, and its inverse's factor, in one matrix of memory.

``H = Σ x xᵀ`` is gathered with its columns in reverse order. Then ``H = L Lᵀ`` (L lower triangular,
written over H's lower half) says, read backwards, ``H⁻¹ = Uᵀ U`` with U upper triangular: L⁻¹ in
reverse order is U. The upper half of the matrix keeps H, so that a factorisation that fails can
begin again with more damping.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qft.errors import ModelError

_BLOCK = 128
_RAISES = 4  # times that the damping grows tenfold before the matrix is given up


@dataclass(frozen=True)
class Factor:
    """What is left of a Hessian once it is factorised; several matrices may be worked by it.

    Attributes:
        matrix: L in the lower half, columns in reverse order.
        dead: ``[in]``: inputs that were zero throughout, in the ordinary order.
    """

    matrix: Tensor
    dead: Tensor


def new_hessian(inputs: int, device: torch.device | str = "cpu") -> Tensor:
    """Zeros, ``[inputs, inputs]``, float32."""
    return torch.zeros(inputs, inputs, device=device)


def add_inputs_(hessian: Tensor, x: Tensor) -> None:
    """Adds ``Σ x xᵀ``.

    Args:
        x: ``[tokens, in]``.
    """
    reversed_x = x.flip(-1).float()
    hessian.addmm_(reversed_x.t(), reversed_x)


def factorise_(
    hessian: Tensor,
    name: str = "weight",
    damping: float = 0.01,
    instead: str = "--method wanda",
) -> Factor:
    """Writes L over the lower half, with damping on the diagonal; the Hessian is used up.

    Where a column was always zero, its diagonal becomes one first: it hangs together with nothing.

    Args:
        name: of a tensor, for an error.
        damping: share of the mean diagonal that is added to it; raised tenfold where it was not
            enough.
        instead: what a user can do without a Hessian, for an error.

    Raises:
        ModelError: not finite, or singular in spite of all damping.
    """
    diagonal = hessian.diagonal().clone()
    if not bool(torch.isfinite(diagonal).all()):
        raise ModelError(
            "The layer's inputs are not finite on the calibration data, so nothing can be told "
            "about its weights.",
            where=name,
            fix="check the model: it gives NaN or infinity on these rows",
        )
    dead = diagonal == 0
    diagonal.masked_fill_(dead, 1)
    for attempt in range(_RAISES):
        damped = diagonal + damping * 10**attempt * diagonal.mean()
        _restore_(hessian, damped)
        if _cholesky_(hessian):
            return Factor(hessian, dead.flip(0))
    raise ModelError(
        "The Hessian of the layer's inputs cannot be inverted.",
        where=name,
        found=f"singular even with {damping * 10 ** (_RAISES - 1):g} of its mean on the diagonal",
        fix=f"more or other calibration rows, or {instead}",
    )


def _restore_(matrix: Tensor, diagonal: Tensor) -> None:
    """The lower half as the upper one says; the diagonal as given."""
    for begin in range(0, len(matrix), _BLOCK):
        end = begin + _BLOCK
        square = matrix[begin:end, begin:end]
        square.copy_(square.triu() + square.triu(1).t())
        matrix[end:, begin:end].copy_(matrix[begin:end, end:].t())
    matrix.diagonal().copy_(diagonal)


def _cholesky_(matrix: Tensor) -> bool:
    """L over a symmetric matrix's lower half, a block of columns at a time; False: singular."""
    for begin in range(0, len(matrix), _BLOCK):
        end = min(begin + _BLOCK, len(matrix))
        left = matrix[begin:end, :begin]
        columns = matrix[begin:, begin:end]
        # within the diagonal block the upper half is written too; only L is read from there on
        kept = columns[: end - begin].triu(1)
        columns.addmm_(matrix[begin:, :begin], left.t(), alpha=-1)
        factor, failed = torch.linalg.cholesky_ex(columns[: end - begin])
        if bool(failed) or not bool(torch.isfinite(factor).all()):
            columns[: end - begin].tril_().add_(kept)
            return False
        below = columns[end - begin :]
        below.copy_(torch.linalg.solve_triangular(factor.t(), below, upper=True, left=False))
        columns[: end - begin].copy_(factor + kept)
    return True


def inverse_rows(factor: Factor, begin: int, end: int) -> Tensor:
    """``U[begin:end, begin:]``, of which no more is ever needed.

    Returns:
        ``[end - begin, in - begin]``, upper triangular to the left.
    """
    factorised = factor.matrix
    size = len(factorised) - begin  # in reverse order: the last rows of the inverse of L[:size]
    result = factorised.new_zeros(end - begin, size)
    result[:, size - (end - begin) :].fill_diagonal_(1)
    for left in range((size - 1) // _BLOCK * _BLOCK, -1, -_BLOCK):
        right = min(left + _BLOCK, size)
        part = result[:, left:right]
        part.addmm_(result[:, right:], factorised[right:size, left:right], alpha=-1)
        square = factorised[left:right, left:right].tril()
        part.copy_(torch.linalg.solve_triangular(square, part, upper=False, left=False))
    return result.flip(0, 1)
