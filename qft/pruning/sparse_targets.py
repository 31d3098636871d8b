"""Which matrices of a model get zeros: every linear layer in the stack, and nothing beside it.

Embeddings, norms, biases and the head stay as they are: they are few, and every token passes them.
"""

from __future__ import annotations

from torch import nn

from qft.errors import ModelError
from qft.pruning.anatomy import Anatomy, Piece
from qft.pruning.sparsity import Sparsity


def sparse_targets(anatomy: Anatomy, sparsity: Sparsity) -> dict[str, Piece]:
    """Checkpoint name → tensor, of all that get zeros.

    Raises:
        ModelError: a layer holds matrices of a kind that is not known here, or rows that cannot be
            cut into the pattern's groups.
    """
    found: dict[str, Piece] = {}
    for piece in anatomy.pieces:
        if piece.layer is None:
            continue
        owner, _, kind = piece.module.rpartition(".")
        module = anatomy.skeleton.get_submodule(owner)
        tensor = getattr(module, kind, None)
        if tensor is None or tensor.dim() < 2:
            continue
        if type(module) is not nn.Linear:
            raise ModelError(
                "This family's layers hold weights that are no linear layer's.",
                where=anatomy.folder,
                found=f"{piece.module}: {type(module).__name__}, {list(tensor.shape)}",
                fix="--method depth, which takes whole layers",
            )
        sparsity.require_fits(piece.module, tensor.shape)
        found[piece.stored] = piece
    if not found:
        raise ModelError("The model's layers hold no weights.", where=anatomy.folder)
    return found
