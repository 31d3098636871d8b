"""The micro-batch that needs most is run before the first step, with all that a step holds.

What will not fit fails in the first minute. Optimizer states and, where a step has several
micro-batches, gradients are there meanwhile, as they are from the second step on; then everything
is as before, bit for bit: weights, gradients, optimizer, buffers, random state, the strategy's
state. It costs one forward and one backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qft.random_state import RandomState
from qft.strategy import Strategy


@contextlib.contextmanager
def left_as_it_was(model: nn.Module, optimizer: Optimizer, strategy: Strategy) -> Iterator[None]:
    """Within it forward and backward passes may run; afterwards they never did.

    Args:
        optimizer: states that are not there yet are dropped afterwards.
    """
    random, fresh = RandomState.now(), not optimizer.state
    modules = [(m, dict(m._buffers), _plain_values(m)) for m in model.modules()]
    there = [b for _, held, _ in modules for b in held.values() if b is not None]
    buffers = {id(b): b.clone() for b in there if not b.is_meta}
    tensors, values = strategy.state(model)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        if fresh:
            optimizer.state.clear()
        for module, held, plain in modules:
            _restore(module, held, plain, buffers)
        if not _same_state(strategy.state(model), (tensors, values)):
            strategy.load_state(model, tensors, values)
        random.restore()


def allocate_states(optimizer: Optimizer) -> None:
    """Lets an optimizer make its states, by a step that changes no weight: of zero, by zero.

    Gradients of zero are left behind. Where there are states already nothing happens.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if optimizer.state:
        return
    former = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0
            if "weight_decay" in group:
                group["weight_decay"] = 0.0
        # past the schedule's own wrapper on the instance, which counts steps
        type(optimizer).step(optimizer)
    finally:
        for group, values in zip(optimizer.param_groups, former, strict=True):
            group.update(values)


def _plain_values(module: nn.Module) -> dict[str, Any]:
    """Numbers that a module keeps beside its tensors, such as the longest row it has seen."""
    plain = (bool, int, float, str, type(None))
    return {name: value for name, value in vars(module).items() if isinstance(value, plain)}


def _restore(
    module: nn.Module,
    held: dict[str, Tensor | None],
    plain: dict[str, Any],
    values: dict[int, Tensor],
) -> None:
    for name, buffer in held.items():
        before = values.get(id(buffer))
        if buffer is not None and before is not None and not torch.equal(buffer, before):
            with torch.no_grad():
                buffer.copy_(before)
        module._buffers[name] = buffer
    module.__dict__.update(plain)


def _same_state(now: tuple[Any, Any], before: tuple[Any, Any]) -> bool:
    tensors, values = now
    return (
        values == before[1]
        and tensors.keys() == before[0].keys()
        and all(torch.equal(tensor, before[0][name]) for name, tensor in tensors.items())
    )
