"""What a metered step held, moment by moment, and what of it is worth knowing afterwards.

A step is cut into stretches, at the marks that whoever meters it has set. Each knows what changes
from its own beginning, so that stretches can be put together anew: a model of eighty layers repeats
what a model of three has shown (`qft.planning.depth`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qft.lean.products import Product

CATEGORIES = ("weights", "adapters", "gradients", "optimizer", "activations", "temporary")
PHASES = ("forward", "backward", "optimizer")
RESIDENT = ("weights", "adapters", "gradients", "optimizer")
PASSING = ("gradients", "activations", "temporary")  # what each step makes anew
ByCategory = dict[str, int]


@dataclass(frozen=True)
class Snapshot:
    """What is alive at one moment, in bytes.

    Attributes:
        phase: forward, backward or optimizer.
        by_category: weights (frozen), adapters (trained parameters), gradients, optimizer,
            activations (made in the forward pass and kept for the backward one), temporary.
    """

    phase: str
    by_category: dict[str, int]

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(self.by_category.values())


@dataclass(frozen=True)
class Reading:
    """What a metered step held.

    Attributes:
        peak: the moment at which the device held most.
        host_peak: the same of the host; equal to nothing where the step runs on the host itself.
        phases: the fullest moment of each phase, on the device.
        most: of each category the most bytes it ever had on the device.
        activation_bytes: kept on the device from the forward pass when the backward pass began.
        flops: floating-point operations of matrix products and attention, by phase.
        end_bytes: on the device when the step was over.
        made_bytes: of all that was made on the device, alive together or not, but for what stays.
        products: shapes of 16-bit matrix products that it met.
    """

    peak: Snapshot
    host_peak: Snapshot
    phases: dict[str, Snapshot]
    most: dict[str, int]
    activation_bytes: int
    flops: dict[str, int]
    end_bytes: int
    made_bytes: int = 0
    products: frozenset[Product] = frozenset()

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive on the device."""
        return self.peak.total

    @property
    def resident_bytes(self) -> int:
        """Weights, adapters, gradients and optimizer states on the device."""
        return sum(self.most[category] for category in RESIDENT)

    @property
    def static_bytes(self) -> int:
        """Weights and adapters on the device."""
        return self.most["weights"] + self.most["adapters"]


def nothing() -> ByCategory:
    """Zero bytes of each category."""
    return dict.fromkeys(CATEGORIES, 0)


@dataclass(frozen=True)
class Event:
    """A storage came, went or changed its size.

    Attributes:
        nbytes: more, or less.
        on_device: whether on the device, else on the host.
        category: one of `CATEGORIES`.
        made_in: number of the stretch in which the storage came.
    """

    nbytes: int
    on_device: bool
    category: str
    made_in: int


@dataclass(frozen=True)
class Place:
    """What changes on the device, or on the host, from the beginning of a stretch.

    Attributes:
        change: from its beginning to its end.
        fullest: from its beginning to the moment at which most was alive.
        most: of each category the highest it stood above its beginning.
    """

    change: ByCategory
    fullest: ByCategory
    most: ByCategory

    @classmethod
    def of(cls, events: Iterable[Event], on_device: bool) -> Place:
        """What these events do in one of the two."""
        change, fullest, most = nothing(), nothing(), nothing()
        total = peak = 0
        for event in events:
            if event.on_device is on_device:
                category = event.category
                change[category] += event.nbytes
                total += event.nbytes
                most[category] = max(most[category], change[category])
                if total > peak:
                    peak, fullest = total, dict(change)
        return cls(change, fullest, most)


@dataclass(frozen=True)
class Stretch:
    """What happens between two marks.

    Attributes:
        phase: forward, backward or optimizer; it changes at marks only.
        label: of the mark that the stretch begins with; None where a phase began.
        events: in order.
        flops: floating-point operations.
        products: shapes of matrix products, see `qft.lean.products`.
        standing_for: bytes on the device that its events leave out, see `qft.lean.alike`.
    """

    phase: str
    label: Any
    events: Sequence[Event]
    flops: int = 0
    products: frozenset[Product] = frozenset()
    standing_for: int = 0

    @cached_property
    def made_bytes(self) -> int:
        """Of what came to the device and will go again."""
        return self.standing_for + sum(
            event.nbytes
            for event in self.events
            if event.nbytes > 0 and event.on_device and event.category in PASSING
        )

    @cached_property
    def device(self) -> Place:
        """What changes there."""
        return Place.of(self.events, True)

    @cached_property
    def host(self) -> Place:
        """What changes there; nothing where the device is the host."""
        return Place.of(self.events, False)


class _Standing:
    """What is alive on the device or the host, and the fullest moments so far."""

    def __init__(self) -> None:
        self.alive = nothing()
        self.peak = Snapshot("forward", nothing())
        self.phases = {phase: Snapshot(phase, nothing()) for phase in PHASES}
        self.most = nothing()

    def pass_by(self, place: Place, phase: str) -> None:
        fullest = Snapshot(phase, _sum(self.alive, place.fullest))
        if fullest.total > self.peak.total:
            self.peak = fullest
        if fullest.total > self.phases[phase].total:
            self.phases[phase] = fullest
        for category, bytes_then in _sum(self.alive, place.most).items():
            self.most[category] = max(self.most[category], bytes_then)
        self.alive = _sum(self.alive, place.change)


def _sum(first: ByCategory, second: ByCategory) -> ByCategory:
    return {category: first[category] + second[category] for category in CATEGORIES}


def reading_of(stretches: Sequence[Stretch]) -> Reading:
    """What a step made of these stretches held."""
    device, host = _Standing(), _Standing()
    flops = dict.fromkeys(PHASES, 0)
    phase, kept = "forward", 0
    for stretch in stretches:
        if phase == "forward" != stretch.phase:
            kept = max(kept, device.alive["activations"])
        phase = stretch.phase
        flops[phase] += stretch.flops
        device.pass_by(stretch.device, phase)
        host.pass_by(stretch.host, phase)
    return Reading(
        peak=device.peak,
        host_peak=host.peak,
        phases=device.phases,
        most=device.most,
        activation_bytes=kept,
        flops=flops,
        end_bytes=sum(device.alive.values()),
        made_bytes=sum(stretch.made_bytes for stretch in stretches),
        products=frozenset().union(*(stretch.products for stretch in stretches)),
    )
