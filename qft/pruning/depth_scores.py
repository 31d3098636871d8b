"""Which layers change the hidden states least, from one pass over the calibration rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from qft.errors import RecipeError
from qft.models import ModelSpec
from qft.progress import QUIET, Reporter
from qft.pruning.layer_stream import stream_layers


@dataclass(frozen=True)
class DepthScores:
    """How much each layer, and each run of layers, changes what passes through it.

    Attributes:
        influence: a layer's block influence, 1 − the mean cosine similarity of its input and its
            output over all tokens (Men et al. 2024, ShortGPT, https://arxiv.org/abs/2403.03853).
        distance: ``distance[first][last]``: angular distance, as a share of a half turn, between
            the input of layer ``first`` and the input of layer ``last`` (the output of
            ``last - 1``), at each row's last token, averaged over rows (Gromov et al. 2024,
            https://arxiv.org/abs/2403.17887).
    """

    influence: list[float]
    distance: list[list[float]]


def score_layers(
    folder: Path,
    spec: ModelSpec,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    layers: int,
    reporter: Reporter = QUIET,
) -> DepthScores:
    """Both scores of every layer; one layer's weights are in memory at a time.

    Args:
        batches: calibration rows, collated.
        layers: how many the model has, for the progress bar.
    """
    similarity = [0.0] * layers
    tokens = 0
    ends: list[list[Tensor]] = [[] for _ in range(layers + 1)]  # of each row, by depth

    def observe(given: Tensor, made: Tensor, text: Tensor) -> None:
        nonlocal tokens
        alike = functional.cosine_similarity(given[text].float(), made[text].float(), dim=-1)
        similarity[index] += alike.double().sum().item()
        last = text.shape[1] - 1 - text.flip(1).int().argmax(1)
        rows = torch.arange(len(text), device=text.device)
        ends[index + 1].append(made[rows, last].float().cpu())
        if index == 0:
            tokens += int(text.sum())
            ends[0].append(given[rows, last].float().cpu())

    with reporter.bar("score layers", layers) as bar:
        for layer in stream_layers(folder, spec, batches):
            index = layer.index
            layer.run(observe, propagate=True)
            bar.advance()
    influence = [1.0 - total / max(tokens, 1) for total in similarity]
    return DepthScores(influence, _angles([torch.cat(rows) for rows in ends]))


def _angles(ends: Sequence[Tensor]) -> list[list[float]]:
    """Mean angular distances of every two depths; 0 on the diagonal."""
    found = [[0.0] * len(ends) for _ in ends]
    for first in range(len(ends)):
        for last in range(first + 1, len(ends)):
            alike = functional.cosine_similarity(ends[first], ends[last], dim=-1)
            angle = alike.double().clamp(-1, 1).arccos().mean().item() / math.pi
            found[first][last] = found[last][first] = angle
    return found


def least_influential(
    scores: DepthScores, count: int, *, keep_first: int, keep_last: int
) -> tuple[int, ...]:
    """The ``count`` layers of least block influence, in order; of two alike the later goes.

    Raises:
        RecipeError: so many cannot go.
    """
    total = len(scores.influence)
    free = range(keep_first, total - keep_last)
    _require_enough(count, len(free), total, keep_first, keep_last)
    ranked = sorted(free, key=lambda layer: (scores.influence[layer], -layer))
    return tuple(sorted(ranked[:count]))


def least_turning(
    scores: DepthScores, count: int, *, keep_first: int, keep_last: int
) -> tuple[int, ...]:
    """The ``count`` contiguous layers whose input and output are nearest in angle.

    Raises:
        RecipeError: so many cannot go.
    """
    total = len(scores.influence)
    starts = range(keep_first, total - keep_last - count + 1)
    _require_enough(count, total - keep_first - keep_last, total, keep_first, keep_last)
    if not count:
        return ()
    start = min(starts, key=lambda first: (scores.distance[first][first + count], -first))
    return tuple(range(start, start + count))


def _require_enough(count: int, free: int, total: int, keep_first: int, keep_last: int) -> None:
    if count > max(free, 0):
        raise RecipeError(
            "So many layers cannot go.",
            where="--ratio, --params or --size",
            found=f"{count} of {total}, where the first {keep_first} and the last {keep_last} stay",
            fix="a smaller ratio, a larger target, or --keep-first 0 --keep-last 0",
        )
