"""The last third of a gated MLP, ``down(act(gate) * up)``, by hand-written autograd.

Autograd keeps gate, up, act(gate) and the product, each as wide as the MLP. Gate and up are enough:
the other two are made again in the backward pass, which costs no matrix product.

Source of the layer: Shazeer 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qft.lean.alike import tiles
from qft.lean.lora_linear import (
    Frozen,
    Update,
    add_update,
    gradient_of_down,
    input_gradient,
    is_cast,
    is_lora_layer,
    lean_update,
    update_backward,
)
from qft.lean.tiled_mlp import tile_rows, tiled

Activation = Callable[[Tensor], Tensor]
Slope = Callable[[Tensor, Tensor], None]  # turns an arriving gradient, in place, at these inputs
PIECE = 2**22  # elements


def gated_down(
    gate: Tensor,
    up: Tensor,
    activation: Activation,
    frozen: Frozen,
    update: Update | None,
    slope: Slope | None = None,
) -> Tensor:
    """``down(activation(gate) * up)``, keeping gate and up for the backward pass.

    Args:
        gate: ``[…, intermediate]``, like ``up``.
        activation: elementwise.
        frozen: the down projection.
        update: its adapter, drawn for a tensor like ``up``, or None.
        slope: of the activation; see `slope_of`.
    """
    a, b = (None, None) if update is None else (update.down, update.up)
    result: Tensor = _GatedDown.apply(gate, up, a, b, activation, frozen, update, slope)  # type: ignore[no-untyped-call]
    return result


class _GatedDown(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, gate: Tensor, up: Tensor, a: Tensor | None, b: Tensor | None,
        activation: Activation, frozen: Frozen, update: Update | None, slope: Slope | None,
    ) -> Tensor:  # fmt: skip
        hidden = activation(gate).mul_(up)
        result = frozen.product(hidden)
        inner = None
        if update is not None and a is not None and b is not None:
            inner = add_update(result, hidden, a, b, update)
        ctx.save_for_backward(gate, up, inner, a, b)
        ctx.parts = (activation, frozen, update, slope)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up, inner, a, b = ctx.saved_tensors
        activation, frozen, update, slope = ctx.parts
        rows = gradient.reshape(-1, gradient.shape[-1])
        activated = activation(gate)
        to_a = to_b = None
        if update is None:
            to_hidden = frozen.transposed(rows).view(up.shape)
        else:
            back, to_b = update_backward(rows, inner, b, update)
            to_a = gradient_of_down(back, activated * up, a, update)
            to_hidden = input_gradient(rows, back, a, up.shape, frozen, update)
        to_up = activated.mul_(to_hidden)
        to_gate = to_hidden.mul_(up)
        turn_gradient_(activation, slope, gate, to_gate)
        return to_gate, to_up, to_a, to_b, None, None, None, None


def turn_gradient_(
    activation: Activation, slope: Slope | None, inputs: Tensor, gradient: Tensor
) -> None:
    """Turns an elementwise function's gradient into that of its inputs, in place.

    Where torch has it as one operation, by that; else a piece at a time by autograd: what it needs
    in between is never there for all of it.
    """
    if slope is not None:
        slope(gradient, inputs)
        return
    rows, arriving = (t.view(-1, t.shape[-1]) for t in (inputs, gradient))
    for part in tiles(rows, max(1, PIECE // rows.shape[1])):
        with torch.enable_grad():
            again = rows[part].detach().requires_grad_()
            (turned,) = torch.autograd.grad(activation(again), again, arriving[part])
        arriving[part] = turned


def _silu_(gradient: Tensor, inputs: Tensor) -> None:
    torch.ops.aten.silu_backward.grad_input(gradient, inputs, grad_input=gradient)


def _gelu_(gradient: Tensor, inputs: Tensor, approximate: str = "none") -> None:
    torch.ops.aten.gelu_backward.grad_input(
        gradient, inputs, approximate=approximate, grad_input=gradient
    )


SLOPES: tuple[tuple[Activation, Slope], ...] = (
    (functional.silu, _silu_),
    (functional.gelu, _gelu_),
    (
        functools.partial(functional.gelu, approximate="tanh"),
        functools.partial(_gelu_, approximate="tanh"),
    ),
)


def slope_of(activation: Activation) -> Slope | None:
    """torch's own backward operation of an activation, or None; it is asked, not known by name."""
    with torch.no_grad(), torch.device("cpu"):
        x = torch.linspace(-9, 9, 61).bfloat16()
        for known, slope in SLOPES:
            if torch.equal(activation(x), known(x)):
                return slope
    return None


@dataclass(frozen=True)
class LeanGatedMLP:
    """The ``forward`` of a module with gate_proj, up_proj, down_proj and act_fn.

    Attributes:
        frozen: the down projection without its adapter.
        slope: of the activation; see `slope_of`.
        by_tiles: run over a few tokens at a time (`qft.lean.tiled_mlp`).
    """

    mlp: Any
    frozen: Frozen
    by_tiles: bool
    slope: Slope | None
    plain: Callable[..., Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """``[…, width]`` to the same shape."""
        if not self.mlp.training or is_cast(x):
            return self.plain(x)
        rows = tile_rows(x.shape[-1])
        small = x.numel() // x.shape[-1] <= rows
        if not self.by_tiles or small or not x.requires_grad or self._drops():
            return self._run(x)
        return tiled(self._run, x, [p for p in self.mlp.parameters() if p.requires_grad], rows)

    def _run(self, x: Tensor) -> Tensor:
        mlp: Any = self.mlp
        gate, up, down = mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj
        adapted = is_lora_layer(down)
        update = lean_update(down, up) if adapted else None
        foreign = not adapted and (
            hasattr(down, "base_layer")  # by another of PEFT's methods
            or any(p.requires_grad for p in down.parameters())
        )
        hooked = down._forward_hooks or down._forward_pre_hooks
        if not gate.requires_grad or foreign or hooked or (adapted and update is None):
            return down(mlp.act_fn(gate) * up)  # type: ignore[no-any-return]
        return gated_down(gate, up, mlp.act_fn, self.frozen, update, self.slope)

    def _drops(self) -> bool:
        """Dropout knows samples by their rows, and a tile has none."""
        return any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.mlp.modules())


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module computes ``down_proj(act_fn(gate_proj(x)) * up_proj(x))`` and nothing else.

    A small copy of it is asked, with layers of its own: a family may do more than its names say.
    """
    parts = ("gate_proj", "up_proj", "down_proj")
    named = all(isinstance(getattr(module, name, None), nn.Module) for name in parts)
    if not named or not callable(getattr(module, "act_fn", None)):
        return False
    small: Any = nn.Module.__new__(type(module))
    small.__dict__ = dict(module.__dict__)
    small.__dict__.pop("forward", None)
    generator = torch.Generator().manual_seed(0)
    # making layers draws from the generator that the caller's own layers are made from
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        layers = {name: nn.Linear(8, 8, bias=False) for name in parts}
        for layer in layers.values():
            nn.init.normal_(layer.weight, generator=generator)
        small._modules = {**module._modules, **layers}
        x = torch.randn(3, 8, generator=generator)
        with torch.no_grad():
            if module.act_fn(x) is x:  # type: ignore[operator]
                return False  # what is multiplied in place would be the gate itself
            inside = module.act_fn(layers["gate_proj"](x)) * layers["up_proj"](x)  # type: ignore[operator]
            wanted = layers["down_proj"](inside)
            try:
                found = type(module).forward(small, x)
            except (TypeError, AttributeError, RuntimeError):
                return False
    return isinstance(found, Tensor) and torch.equal(found, wanted)
