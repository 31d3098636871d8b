"""What several updates of the same tensor make together: sums, TIES, DARE, magnitude pruning.

Sources: task arithmetic, Ilharco et al. 2022, https://arxiv.org/abs/2212.04089; TIES, Yadav et al.
2023, https://arxiv.org/abs/2306.01708; DARE, Yu et al. 2023, https://arxiv.org/abs/2311.03099. The
conventions are those of PEFT's ``add_weighted_adapter``: signs are elected before the weights are
applied, and what agrees with the elected sign is averaged over those that agree.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qft.errors import RecipeError

_SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = ("linear", "cat", "svd", *_SPARSE, *(f"{kind}_svd" for kind in _SPARSE))
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Combination:
    """How several adapters become one.

    Attributes:
        weights: one an adapter; a negative one takes away what its adapter does.
        method: a key of ``METHODS``.
        density: share of each update's values that ties, DARE and magnitude pruning keep.
        majority_sign: elected by the sum of the values (``total``) or by their number
            (``frequency``).
        svd_rank: of the result of the kinds that end in svd; None is the adapters' largest.
        svd_clamp: quantile beyond which the values of both factors are cut off.
        seed: of DARE's draws.

    Raises:
        RecipeError: a setting makes no sense.
    """

    weights: tuple[float, ...]
    method: str = "linear"
    density: float | None = None
    majority_sign: str = "total"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.method in METHODS, "method", self.method, ", ".join(METHODS))
        _require(bool(self.weights) and all(map(math.isfinite, self.weights)),
                 "weights", self.weights, "one finite number an adapter")  # fmt: skip
        density = self.density
        _require(density is None or 0 < density <= 1, "density", density, "above 0, at most 1")
        _require(density is not None or not self.sparse, "density", f"none, and {self.method}",
                 "the share of values to keep: --density 0.5")  # fmt: skip
        _require(density is None or self.sparse, "density", f"{density}, and {self.method}",
                 f"leave it out; it belongs to {', '.join(_SPARSE)}")  # fmt: skip
        _require(
            self.majority_sign in SIGNS, "majority_sign", self.majority_sign, " or ".join(SIGNS)
        )
        rank, clamp = self.svd_rank, self.svd_clamp
        _require(rank is None or rank >= 1, "svd_rank", rank, "at least 1")
        _require(clamp is None or 0 <= clamp <= 1, "svd_clamp", clamp, "between 0 and 1")
        _require(self.svd or (rank is None and clamp is None), "method", self.method,
                 "svd_rank and svd_clamp belong to the kinds that end in svd")  # fmt: skip

    @property
    def svd(self) -> bool:
        """Whether a singular value decomposition ends it."""
        return self.method.endswith("svd")

    @property
    def plain(self) -> str:
        """The method without the decomposition that may end it."""
        return "linear" if self.method in ("svd", "cat") else self.method.removesuffix("_svd")

    @property
    def sparse(self) -> bool:
        """Whether values are dropped."""
        return self.plain in _SPARSE

    @property
    def by_magnitude(self) -> bool:
        """Whether the largest values are kept."""
        return self.plain in ("ties", "magnitude_prune") and (self.density or 1) < 1

    @property
    def at_random(self) -> bool:
        """Whether the kept values are drawn."""
        return self.plain.startswith("dare") and (self.density or 1) < 1

    def key(self, number: int, name: str) -> str:
        """What the draws of adapter ``number`` on the tensor ``name`` depend on."""
        return f"{self.seed} {number} {name}"


def _require(right: bool, knob: str, found: Any, fix: str) -> None:
    if not right:
        raise RecipeError(
            "Adapters cannot be combined like this.", where=knob, found=found, fix=fix
        )


def add_up(parts: Sequence[Tensor], weights: Sequence[float], how: Combination) -> Tensor:
    """The weighted sum, or the mean of those that agree with the elected sign (TIES).

    Args:
        parts: float32, of one shape, their values already dropped.
        weights: one a part; may be what stands beside ``how``'s own (a factor's share of them).
    """
    weighted = [part * weight for part, weight in zip(parts, weights, strict=True)]
    if not how.plain.endswith("ties"):
        return _sum(weighted)
    votes = _sum(parts if how.majority_sign == "total" else [part.sign() for part in parts])
    elected = votes.ge_(0).mul_(2).sub_(1)
    agree = [part.sign() == elected for part in parts]
    total = _sum([torch.where(here, part, 0) for here, part in zip(agree, weighted, strict=True)])
    return total.div_(_sum([here.to(total.dtype) for here in agree]).clamp_(min=1))


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)  # in the order in which PEFT's sum adds


def kept_largest(tensor: Tensor, density: float) -> Tensor:
    """The tensor with only its ``density · size`` largest magnitudes, the others zero."""
    flat = tensor.abs().reshape(-1)
    places = torch.topk(flat, int(density * flat.numel())).indices
    mask = torch.zeros_like(flat)
    mask[places] = 1
    return tensor * mask.reshape(tensor.shape)


def kept_at_random(tensor: Tensor, density: float, key: str, start: int = 0) -> Tensor:
    """DARE: each value is kept with probability ``density`` and divided by it, or zero.

    Every row draws from a seed of its own, so that no split into blocks changes a mask.

    Args:
        tensor: rows ``start …`` of a tensor.
        key: what else the draws depend on: seed, adapter, the tensor's name.
    """
    rows = tensor.reshape(len(tensor), -1)
    mask = torch.empty_like(rows)
    generator = torch.Generator()
    for number, row in enumerate(mask, start):
        digest = hashlib.blake2b(f"{key} {number}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        row.uniform_(generator=generator)
    return tensor * (mask < density).to(tensor.dtype).reshape(tensor.shape) / density


def combined_rows(
    parts: Mapping[int, Tensor],
    how: Combination,
    name: str,
    *,
    start: int = 0,
    thresholds: Sequence[float] = (),
) -> Tensor:
    """The combined rows ``start …`` of the update of one tensor.

    Args:
        parts: by the adapter's number its update of these rows, float32; at least one.
        name: the tensor's, for the draws.
        thresholds: by the adapter's number, where the largest are kept; from
            :func:`qft.lean.magnitudes.smallest_kept`.
    """
    kept = []
    for number, part in parts.items():
        if how.by_magnitude:
            part = part * (part.abs() >= thresholds[number])
        elif how.at_random:
            part = kept_at_random(part, how.density or 1, how.key(number, name), start)
        kept.append(part)
    return add_up(kept, [how.weights[number] for number in parts], how)
