"""A training's phases with all they take, the peak with its error bar, and the time it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from qft.lean.meter import Reading
from qft.planning.amounts import PhaseBytes
from qft.planning.calibration import Calibration, Expected
from qft.planning.depth import step_reading
from qft.planning.job import PlannedJob
from qft.planning.phases import phases_of
from qft.planning.solver import Forecast as PeakOf
from qft.planning.speed import Speed, speed_of
from qft.planning.unseen import expected, with_unseen


@dataclass(frozen=True)
class Forecast:
    """What a training will take.

    Attributes:
        reading: of the optimizer step with the micro-batch that needs most.
        phases: load, train, evaluate, save, with what the meter cannot see.
        peak: of the fullest phase, with its error bar.
        peak_phase: which that is.
    """

    job: PlannedJob
    reading: Reading
    phases: tuple[PhaseBytes, ...]
    peak: Expected
    peak_phase: str

    def as_dict(self) -> dict[str, Any]:
        """For `run.json` and ``--json``; bytes."""
        return {
            "device": self.job.device,
            "dtype": str(self.job.dtype).removeprefix("torch."),
            "quantize": self.job.ready.held,
            "micro_batch": self.job.micro_batch,
            "longest_tokens": max(len(e.inputs["input_ids"]) for e in self.job.longest()),
            "peak_bytes": self.peak.expected,
            "low_bytes": self.peak.low,
            "high_bytes": self.peak.high,
            "peak_phase": self.peak_phase,
            "basis": self.peak.basis,
            "live_bytes": self.reading.peak_bytes,
            "flops": sum(self.reading.flops.values()),
            "phases": [as_dict(phase) for phase in self.phases],
        }


def as_dict(phase: PhaseBytes) -> dict[str, Any]:
    """A phase as plain values."""
    made = asdict(replace(phase, after=None))
    del made["after"]
    return {key: dict(v) if isinstance(v, Mapping) else v for key, v in made.items()}


def forecast(job: PlannedJob, calibration: Calibration) -> Forecast:
    """Meters a job's step on fake tensors and adds what else its phases take."""
    reading = step_reading(job)
    phases, fullest = [], None
    for seen in phases_of(job, reading):
        phase = with_unseen(seen, job, calibration)
        phases.append(phase)
        found = expected(phase, job, calibration)
        if fullest is None or found.expected > fullest[0].expected:
            fullest = found, phase.phase
    assert fullest is not None
    return Forecast(job, reading, tuple(phases), *fullest)


def safe_peak(calibration: Calibration) -> PeakOf:
    """A job's peak at the upper end of its error bar: what fits by it fits."""

    def peak(job: PlannedJob) -> int:
        return forecast(job, calibration).peak.high

    return peak


def speed(made: Forecast, calibration: Calibration) -> Speed | None:
    """How fast it will go; None where the device is not here and no rate of it is known."""
    return speed_of(made.job, made.reading, calibration)


def train_phase(made: Forecast) -> PhaseBytes:
    """The phase of the steps themselves."""
    return next(phase for phase in made.phases if phase.phase == "train")
