"""Root-mean-square normalisation that keeps its input and one number a row for the backward pass.

Written with ordinary operations it keeps float32 copies of its input, twice its size each. The
output here is the plain module's to the last bit; the gradient is computed in float32 throughout.

Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qft.lean.alike import tiles

PIECE = 2**22  # elements computed in float32 at once


@dataclass(frozen=True)
class Kind:
    """How a family applies its weight.

    Attributes:
        offset: what is added to the weight (Gemma stores it around 0).
        early: the normalised row is rounded before the weight is applied (Llama), not after.
    """

    offset: float
    early: bool


KINDS = (Kind(0.0, True), Kind(1.0, False), Kind(0.0, False))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, kind: Kind) -> Tensor:
    """The normalised rows of ``x``, ``[…, width]``, times the weight, which does not train."""
    result: Tensor = _RMSNorm.apply(x, weight, epsilon, kind)  # type: ignore[no-untyped-call]
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, epsilon: float, kind: Kind
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        result = torch.empty_like(rows)
        roots = torch.empty(rows.shape[0], 1, dtype=_precise(x), device=x.device)
        scale = _scale(weight, kind, x)
        for part in tiles(rows, max(1, PIECE // rows.shape[1])):
            wide = rows[part].to(roots.dtype)
            roots[part] = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
            normal = wide * roots[part]
            if kind.early:
                torch.mul(weight, normal.to(x.dtype), out=result[part])
            else:
                result[part] = normal.mul_(scale)
        ctx.save_for_backward(x, roots, weight)
        ctx.kind = kind
        return result.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, roots, weight = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        arriving = gradient.reshape(rows.shape)
        result = torch.empty_like(rows)
        scale = _scale(weight, ctx.kind, x)
        for part in tiles(rows, max(1, PIECE // rows.shape[1])):
            normal = rows[part].to(roots.dtype) * roots[part]
            weighed = arriving[part].to(roots.dtype) * scale
            along = (weighed * normal).mean(-1, keepdim=True)
            result[part] = weighed.addcmul_(normal, along, value=-1).mul_(roots[part])
        return result.view(x.shape), None, None, None


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _scale(weight: Tensor, kind: Kind, x: Tensor) -> Tensor:
    scale = weight.to(_precise(x))
    return scale + kind.offset if kind.offset else scale


@dataclass(frozen=True)
class LeanNorm:
    """The ``forward`` of a normalisation module."""

    module: Any
    epsilon: float
    kind: Kind
    plain: Callable[..., Tensor]

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[…, width]`` to the same shape."""
        weight = self.module.weight
        by_hand = (
            self.module.training
            and torch.is_grad_enabled()
            and hidden_states.requires_grad
            and not weight.requires_grad
            and weight.dtype == hidden_states.dtype
            and not (args or kwargs)
        )
        if not by_hand:
            return self.plain(hidden_states, *args, **kwargs)
        return rms_norm(hidden_states, weight, self.epsilon, self.kind)


def norm_of(module: nn.Module) -> tuple[float, Kind] | None:
    """A module's epsilon and kind if it is a root-mean-square normalisation, else None.

    A small copy of it is asked and must give the very same numbers.
    """
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters())
    if not isinstance(epsilon, float) or list(parameters) != ["weight"]:
        return None
    if parameters["weight"].dim() != 1:
        return None
    small: Any = nn.Module.__new__(type(module))
    small.__dict__ = dict(module.__dict__)
    small.__dict__.pop("forward", None)
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.no_grad():
        width = 2 * 8
        weight = torch.randn(width, generator=generator).bfloat16()
        small._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
        x = (3 * torch.randn(64, width, generator=generator)).bfloat16()
        try:
            wanted = type(module).forward(small, x)
        except (TypeError, AttributeError, RuntimeError):
            return None
        for kind in KINDS:
            found = rms_norm(x, weight, epsilon, kind)
            if isinstance(wanted, Tensor) and torch.equal(found, wanted):
                return epsilon, kind
    return None
