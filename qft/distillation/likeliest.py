"""A teacher's likeliest tokens out of a chunk of its logits.

What is left out is known by its mass alone. On text the 32 likeliest of 128,000 tokens have most of
the mass, at a thousandth of the room; what they leave out is never silently dropped.
"""

from __future__ import annotations

from torch import Tensor

from qft.lean.label_loss import softmax_in_place


def likeliest(logits: Tensor, count: int, temperature: float = 1.0) -> dict[str, Tensor]:
    """The ``count`` likeliest tokens of each row.

    No second tensor of the chunk's size is made.

    Args:
        logits: ``[rows, vocabulary]``, float32; **overwritten**.
        count: of tokens; all of them where the vocabulary has no more.
        temperature: what the logits are divided by.

    Returns:
        ``tokens`` int64 ``[rows, count]``, the likeliest first; ``log_probabilities`` float32, of
        the same shape; ``rest`` float32 ``[rows]``: the mass of all others, summed up itself, since
        1 less the mass of these would be rounding alone where it is small.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    values, tokens = logits.topk(min(count, logits.shape[1]), dim=1)
    log_normaliser = softmax_in_place(logits)
    rest = logits.scatter_(1, tokens, 0.0).sum(dim=1)
    return {
        "tokens": tokens,
        "log_probabilities": values - log_normaliser[:, None],
        "rest": rest,
    }
