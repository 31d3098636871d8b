"""A step of many layers, put together from one of a few.

What each layer was seen to do is repeated for every layer that is like it, in the order of the
whole model. Nothing is fitted: bytes are added up moment by moment, so that the fullest moment is
found wherever it lies in the whole model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qft.lean.timeline import Event, Stretch


@dataclass(frozen=True)
class Layer:
    """A part of a step, as a label: a layer of a stack, in one of the two passes."""

    stack: str
    forward: bool
    number: int


OUTSIDE = "outside"  # labels what comes after the last layer of a stack


def repeated(
    seen: Sequence[Stretch],
    stands_for: Mapping[str, Sequence[int]],
    missing: Sequence[Event] = (),
) -> list[Stretch]:
    """A step of all layers, made of one of a few.

    What is freed outside of the layers is freed as often as it was made.

    Args:
        seen: labelled with a `Layer` where one begins, or `OUTSIDE`.
        stands_for: by stack: for each layer the number of the one that is like it.
        missing: what layers that do not run hold all the time.
    """
    counts = {name: Counter(numbers) for name, numbers in stands_for.items()}
    parts = _parts(seen)
    times: dict[int, int] = {}  # that a stretch is repeated, by its number
    for layer, numbers in parts:
        for number in numbers:
            times[number] = 1 if layer is None else counts[layer.stack][layer.number]
    outside = {number for layer, numbers in parts if layer is None for number in numbers}
    made = [Stretch("forward", None, missing)]
    for layer, part in _passes(parts):
        if layer is None:
            made += [_scaled(seen[number], times) for number in part[None]]
            continue
        order = stands_for[layer.stack]
        left = Counter(order)
        for which in order if layer.forward else reversed(order):
            left[which] -= 1
            own = (seen[number] for number in part.get(which, ()))
            made += own if left[which] == 0 else (_without(x, outside) for x in own)
    return made


def _without(stretch: Stretch, outside: set[int]) -> Stretch:
    """What was made outside of the layers is freed by the last that had a use for it."""
    if not any(event.nbytes < 0 and event.made_in in outside for event in stretch.events):
        return stretch
    kept = [e for e in stretch.events if e.nbytes >= 0 or e.made_in not in outside]
    return replace(stretch, events=kept)


def _scaled(stretch: Stretch, times: Mapping[int, int]) -> Stretch:
    events = [
        replace(event, nbytes=event.nbytes * times[event.made_in]) if event.nbytes < 0 else event
        for event in stretch.events
    ]
    return replace(stretch, events=events)


def _parts(seen: Sequence[Stretch]) -> list[tuple[Layer | None, list[int]]]:
    """Numbers of neighbouring stretches that belong to one layer, or to none."""
    found: list[tuple[Layer | None, list[int]]] = [(None, [])]
    phase = "forward"
    for number, stretch in enumerate(seen):
        if isinstance(stretch.label, Layer):
            found.append((stretch.label, []))
            phase = stretch.phase
        elif found[-1][0] is not None and (stretch.label == OUTSIDE or stretch.phase != phase):
            found.append((None, []))
        found[-1][1].append(number)
    return found


_Pass = dict[int | None, list[int]]  # numbers of stretches, by the number of their layer


def _passes(
    parts: Sequence[tuple[Layer | None, list[int]]],
) -> list[tuple[Layer | None, _Pass]]:
    """The parts of each pass through a stack together, in order; with one of its layers."""
    found: list[tuple[Layer | None, _Pass]] = []
    for layer, numbers in parts:
        key = None if layer is None else layer.number
        last = found[-1][0] if found else None
        if layer is None or last is None or key in found[-1][1] or (
            (layer.stack, layer.forward) != (last.stack, last.forward)
        ):  # fmt: skip
            found.append((layer, {}))
        found[-1][1][key] = numbers
    return found


def balances(seen: Sequence[Stretch], made: Sequence[Stretch], missing: Sequence[Event]) -> bool:
    """Whether a step ends as it was seen to, but for what is there all the time.

    Where it does not, some layer keeps or frees something on behalf of others.
    """
    began = sum(event.nbytes for event in missing if event.on_device)
    return _change(made) == began + _change(seen)


def _change(stretches: Sequence[Stretch]) -> int:
    return sum(sum(stretch.device.change.values()) for stretch in stretches)
