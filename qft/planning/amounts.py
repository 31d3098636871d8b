"""What a phase of a job takes of the device, the host and the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qft.lean.timeline import RESIDENT, Reading

PHASES = ("load", "write", "train", "evaluate", "save", "merge", "export")


@dataclass(frozen=True)
class StepWork:
    """What a training step does, as far as it decides what a process on a CPU keeps of it.

    Attributes:
        kept_bytes: of activations, at the most.
        made_bytes: of all that it makes, alive together or not.
        apart_bytes: of all that stays, of gradients and of activations, each at its most.
        linear: shapes of linear layers' 16-bit products.
        attention: of attention's.
        evaluated: of all products of an evaluation, each width of a batch by itself.
    """

    kept_bytes: int = 0
    made_bytes: int = 0
    apart_bytes: int = 0
    linear: int = 0
    attention: int = 0
    evaluated: int = 0

    @classmethod
    def of(cls, reading: Reading) -> StepWork:
        """As it was metered."""
        batched = sum(product.batched for product in reading.products)
        return cls(
            reading.most["activations"],
            reading.made_bytes,
            sum(reading.most[category] for category in (*RESIDENT, "activations")),
            len(reading.products) - batched,
            batched,
        )


@dataclass(frozen=True)
class PhaseBytes:
    """The fullest moment of one phase, in bytes.

    Attributes:
        phase: one of `PHASES`.
        device: by category; on a CPU the device is the host itself.
        host: by category, where the device is another.
        disk: what the phase leaves on the disk, by what it is.
        disk_peak: the most it holds there at one time, temporary files included.
        note: one sentence for people, or nothing.
        after: the training step that the process ran by then; None where it ran none.
    """

    phase: str
    device: Mapping[str, int] = field(default_factory=dict)
    host: Mapping[str, int] = field(default_factory=dict)
    disk: Mapping[str, int] = field(default_factory=dict)
    disk_peak: int = 0
    note: str = ""
    after: StepWork | None = None

    @property
    def peak_bytes(self) -> int:
        """On the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """On the host, where the device is another."""
        return sum(self.host.values())
