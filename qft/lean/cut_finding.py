"""Where a model can be cut so that nothing below trains, found by watching it run.

A batch of a few samples runs through the model, and it is noted which module is called when and
with what. From that follows what lies below a place; nothing goes by a family's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qft.lean.feature_cache import Cut, Outline
from qft.lean.model_parts import head_names, layer_stacks


class NoCutError(Exception):
    """There is no place to cut this model at.

    Attributes:
        reason: a clause for the user.
        everything: the lowest layer trains, as with most strategies.
        drops: values are dropped at random below the cut.
    """

    def __init__(self, reason: str, *, everything: bool = False, drops: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.everything, self.drops = reason, everything, drops


@dataclass(frozen=True)
class _Call:
    """One call of a module: when it began and ended, what came in first and what came out."""

    began: int
    ended: int
    first: Any
    output: Any


_Calls = dict[nn.Module, list[_Call]]


def find_cut(
    model: nn.Module, run: Callable[[], Any], rows: int, *, highest: int | None = None
) -> Cut:
    """The highest place below which nothing trains.

    Args:
        model: a transformers model with a strategy attached, below PEFT's wrapper.
        run: runs it on a batch, in training mode.
        rows: of that batch; two or more.
        highest: how many layers may lie below it at most.

    Raises:
        NoCutError: something trains from the first layer on, or values are dropped at random.
    """
    name, stack = next(iter(layer_stacks(model).items()), ("", nn.ModuleList()))
    layers = list(stack)
    count = next((i for i, layer in enumerate(layers) if _trains(layer)), len(layers))
    count = count if highest is None else min(count, highest)
    if count == 0:
        raise NoCutError("the lowest layer trains", everything=True)
    calls = _watch(model, run)
    found = _before_head(model, calls, rows) if count == len(layers) else None
    if found is None:
        found = _behind_layer(model, calls, rows, name, layers[:count])
        _require_frozen(model, calls, found)
    border = _border(calls, found)
    if rates := sorted(set(_drop_rates(calls, border, found.trunk))):
        shown = ", ".join(f"{rate:g}" for rate in rates)
        raise NoCutError(f"its layers drop values at random while training ({shown})", drops=True)
    return found


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _watch(model: nn.Module, run: Callable[[], Any]) -> _Calls:
    """Every call of every module while ``run`` runs; tensors are noted without their content."""
    time = 0
    begun: dict[nn.Module, list[tuple[int, Any]]] = {}
    calls: _Calls = {}

    def begin(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal time
        time += 1
        begun.setdefault(module, []).append((time, _outlined(arguments[0] if arguments else None)))

    def end(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        nonlocal time
        time += 1
        began, first = begun[module].pop()
        calls.setdefault(module, []).append(_Call(began, time, first, _outlined(output)))

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(begin, prepend=True))
        handles.append(module.register_forward_hook(end))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _outlined(value: Any) -> Any:
    """Tensors without content; what is neither a tensor nor holds any by name or place: None."""
    if isinstance(value, Tensor):
        return value.detach().to("meta")
    if isinstance(value, Mapping):
        kept = {key: _outlined(inner) for key, inner in value.items()}
        return type(value)(**{key: inner for key, inner in kept.items() if inner is not None})
    if isinstance(value, tuple):
        return tuple(_outlined(inner) for inner in value)
    return None


def _behind_layer(
    model: nn.Module, calls: _Calls, rows: int, name: str, layers: list[nn.Module]
) -> Cut:
    """Behind the last of ``layers``."""
    made = [calls.get(layer, []) for layer in layers]
    if any(len(each) != 1 for each in made):
        raise NoCutError("its layers do not run once each")
    output = made[-1][0].output
    answers = len(output) if isinstance(output, tuple) else 0
    hidden = output[0] if answers else output
    if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[0] != rows:
        raise NoCutError("its layers return something else than hidden states")
    begin, end = made[0][0].began, made[-1][0].ended
    inside = {module for layer in layers for module in layer.modules()}
    others = _silent(model, calls, rows, began=begin, over=end, leave=inside)
    return Cut(
        f"behind {name}.{len(layers) - 1}", tuple(layers), answers, None, others, False,
        hidden.shape[-1], hidden.dtype,
    )  # fmt: skip


def _before_head(model: nn.Module, calls: _Calls, rows: int) -> Cut | None:
    """Before the task's head, where it alone trains; None where it cannot be cut there."""
    heads = [(name, model.get_submodule(name)) for name in head_names(model)]
    called = [(calls[head][0].began, name, head) for name, head in heads if head in calls]
    if not called:
        return None
    begin, name, head = min(called, key=lambda each: each[0])
    first = calls[head][0].first
    if len(calls[head]) != 1 or not isinstance(first, Tensor) or first.shape[0] != rows:
        return None
    if first.dim() not in (2, 3):
        return None
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in _called_before(calls, begin)):
        return None  # it may stand behind the last layer, so that a cut there is possible
    others = _silent(model, calls, rows, began=begin, over=begin, leave=set())
    pooled = first.dim() == 2
    cut = Cut(f"before {name}", (), 0, head, others, pooled, first.shape[-1], first.dtype)
    try:
        _require_frozen(model, calls, cut)
    except NoCutError:  # what stands behind the last layer trains as well
        return None
    return cut


def _silent(
    model: nn.Module, calls: _Calls, rows: int, *, began: int, over: int, leave: set[nn.Module]
) -> tuple[tuple[nn.Module, Outline], ...]:
    """The outermost modules with weights that run before ``began`` only, and what they return.

    Their answer must be of the batch's rows: what is not (rotary angles) is needed above.
    """
    found: list[tuple[nn.Module, Outline]] = []
    taken: set[nn.Module] = set(leave)
    for module in model.modules():
        made = calls.get(module, [])
        if module in taken or len(made) != 1 or made[0].ended > began:
            continue
        within = list(module.modules())
        later = any(call.ended > over for child in within for call in calls.get(child, []))
        output = made[0].output
        values = output.values() if isinstance(output, Mapping) else output
        tensors = [values] if isinstance(values, Tensor) else [*(values or ())]
        of_rows = any(isinstance(t, Tensor) and t.dim() > 1 for t in tensors)
        if later or not of_rows or not any(True for _ in module.parameters()):
            continue
        found.append((module, Outline(output, rows)))
        taken.update(within)
    return tuple(found)


def _border(calls: _Calls, cut: Cut) -> int:
    """The time of the cut in the run that was watched."""
    return calls[cut.head][0].began if cut.head is not None else calls[cut.layers[-1]][0].ended


def _called_before(calls: _Calls, border: int) -> list[nn.Module]:
    return [module for module, made in calls.items() if any(call.ended < border for call in made)]


def _require_frozen(model: nn.Module, calls: _Calls, cut: Cut) -> None:
    """All that trains must be called above the cut."""
    border = _border(calls, cut)
    below = {module for module in cut.trunk for module in module.modules()}
    for name, owner in model.named_modules():
        if not any(p is not None and p.requires_grad for p in owner._parameters.values()):
            continue
        path = name.split(".")
        around = [model.get_submodule(".".join(path[:n])) for n in range(len(path), -1, -1)]
        # the engine computes with some modules without calling them: then the one around them
        nearest = next((calls[module] for module in around if module in calls), [])
        above = bool(nearest) and all(call.began >= border for call in nearest)
        if owner in below or not above:
            raise NoCutError(f"{name or 'the model itself'} trains, and is used below the layers")


def _drop_rates(calls: _Calls, border: int, trunk: list[nn.Module]) -> list[float]:
    """Above zero: of dropout layers, and of what modules drop by a number of their own."""
    inside = [module for part in trunk for module in part.modules()]
    # the module that runs the layers may drop values between them
    stacks = [m for m in calls if any(c in inside for c in _grandchildren(m)) and m not in inside]
    rates = [m.p for m in [*inside, *_called_before(calls, border)] if isinstance(m, nn.Dropout)]
    for module in [*inside, *stacks]:
        named = vars(module).items()
        rates += [value for key, value in named if "drop" in key and isinstance(value, float)]
    return [rate for rate in rates if rate > 0]


def _grandchildren(module: nn.Module) -> Iterator[nn.Module]:
    """A module's children, and the layers in its lists of layers."""
    for child in module.children():
        yield child
        if isinstance(child, nn.ModuleList):
            yield from child
