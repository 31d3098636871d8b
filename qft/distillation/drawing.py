"""Tokens drawn from a teacher's distribution: few numbers whose mean is the whole of it.

The likeliest tokens alone are a biased teacher: a student of them is too sure of itself. Drawn
tokens are unbiased (Anshumann et al. 2025, Sparse Logit Sampling): a token's weight, its share of
the draws, is its probability in the mean, and since the gradient of the cross-entropy is linear in
the weights, its mean is the full distribution's gradient.

The draws are stratified: the d-th of m falls into the d-th m-th of the cumulative distribution.
That is unbiased as independent draws are, and of no quantity the variance is larger.

What is drawn is a function of (seed, example, position, draw): neither batches nor an interruption
change it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from qft.lean.label_loss import softmax_in_place

_ROWS = 16  # at once, in float64: 16 of 128,256 tokens are 16 MB, a few times over


def drawn(
    logits: Tensor,
    count: int,
    keys: Sequence[tuple[int, int]],
    *,
    seed: int = 0,
    temperature: float = 1.0,
    power: float = 1.0,
) -> dict[str, Tensor]:
    """``count`` draws with replacement for each row; equal ones are merged.

    Args:
        logits: ``[rows, vocabulary]``, float32; **overwritten**.
        count: draws a row.
        keys: each row's example and position: what the draws depend on beside ``seed``.
        temperature: what the logits are divided by.
        power: draws are made from the distribution to this power, and each is weighed by the ratio
            of the two. Every power is unbiased. Only with 1 the weights of a row sum up to 1;
            dividing them by their sum would bias them, by the order of 1 / ``count``.

    Returns:
        ``samples`` int64 ``[rows, count]``, in rising order, each token once; what is left of a row
        repeats its last token with weight 0. ``weights`` float32 of the same shape; ``entropy``
        float32 ``[rows]`` in nats, of the whole distribution: cross-entropy less it is the KL.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    softmax_in_place(logits)
    uniforms = torch.from_numpy(_uniforms(seed, keys, count)).to(logits.device)
    parts = [
        _drawn(logits[start : start + _ROWS], uniforms[start : start + _ROWS], power)
        for start in range(0, logits.shape[0], _ROWS)
    ]
    samples, weights, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return {"samples": samples, "weights": weights, "entropy": entropy}


def _drawn(chances: Tensor, uniforms: Tensor, power: float) -> tuple[Tensor, Tensor, Tensor]:
    """``[rows, vocabulary]`` probabilities and ``[rows, draws]`` numbers from [0, 1)."""
    exact = chances.double()
    entropy = torch.special.entr(exact).sum(dim=1).float()
    proposal = exact if power == 1.0 else exact.pow(power)
    sums = proposal.cumsum(dim=1)
    draws = uniforms.shape[1]
    strata = torch.arange(draws, device=uniforms.device)
    wanted = (strata + uniforms) / draws * sums[:, -1:]
    # a token that has no mass is never found: the sums before and after it are the same
    found = torch.searchsorted(sums, wanted, right=True).clamp_(max=sums.shape[1] - 1)
    tokens, times = _merged(found)
    weights = times / draws
    if power != 1.0:
        ratio = exact.gather(1, tokens) / (proposal.gather(1, tokens) / sums[:, -1:])
        weights = torch.where(times > 0, weights * ratio, 0.0)
    return tokens, weights.float(), entropy


def _merged(found: Tensor) -> tuple[Tensor, Tensor]:
    """Rising numbers, ``[rows, draws]``: each once, and how often; see `drawn` for what is left."""
    new = torch.zeros_like(found)
    new[:, 1:] = found[:, 1:] != found[:, :-1]
    slot = new.cumsum(dim=1)
    times = torch.zeros_like(found).scatter_add_(1, slot, torch.ones_like(found))
    tokens = found[:, -1:].repeat(1, found.shape[1]).scatter_(1, slot, found)
    return tokens, times


def _uniforms(seed: int, keys: Sequence[tuple[int, int]], count: int) -> NDArray[numpy.float64]:
    """Float64 ``[rows, count]`` from [0, 1), each a function of seed, key and place."""
    pairs = numpy.asarray(keys, dtype=numpy.uint64).reshape(-1, 2)
    state = _mixed(numpy.asarray([seed], dtype=numpy.uint64))
    for column in (pairs[:, 0], pairs[:, 1]):
        state = _mixed(state ^ _mixed(column))
    places = numpy.arange(1, count + 1, dtype=numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
    mixed = _mixed(state[:, None] + places)
    uniforms: NDArray[numpy.float64] = (mixed >> numpy.uint64(11)).astype(numpy.float64)
    return uniforms * 2.0**-53


def _mixed(state: NDArray[numpy.uint64]) -> NDArray[numpy.uint64]:
    """SplitMix64's finalizer (Steele et al. 2014), after its step."""
    state = state + numpy.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    mixed: NDArray[numpy.uint64] = state ^ (state >> numpy.uint64(31))
    return mixed
