"""What a phase of a job takes of the device, the host and the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PHASES = ("load", "train", "evaluate", "save", "merge", "export")


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
    """

    phase: str
    device: Mapping[str, int] = field(default_factory=dict)
    host: Mapping[str, int] = field(default_factory=dict)
    disk: Mapping[str, int] = field(default_factory=dict)
    disk_peak: int = 0
    note: str = ""

    @property
    def peak_bytes(self) -> int:
        """On the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """On the host, where the device is another."""
        return sum(self.host.values())
