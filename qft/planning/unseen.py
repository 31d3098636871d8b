"""What no meter of tensors can see is added to a phase; what was measured corrects it.

The categories are "allocator" (rounding, workspaces, room between blocks; on a CPU what freed
memory the C library keeps) and "context" (CUDA's own; on a CPU what a process loads once).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qft import models
from qft.planning.amounts import PhaseBytes, StepWork
from qft.planning.calibration import Calibration, Expected, Figure, Kind
from qft.planning.cuda_allocator import cuda_unseen
from qft.planning.job import PlannedJob
from qft.planning.resident import Work, resident_unseen
from qft.planning.row_shapes import RowShapes, shapes_of_run, shapes_of_step

CATEGORIES = ("allocator", "context")
BEFORE = "load"  # the phase that what is measured of a training says nothing of


def with_unseen(phase: PhaseBytes, job: PlannedJob, calibration: Calibration) -> PhaseBytes:
    """A phase with what the meter cannot see, as far as known or measured.

    Args:
        phase: what the meter counts of it; what was added before is made anew.
        calibration: former measurements of the device shift what is expected of a training.

    Returns:
        The same with the categories ``allocator`` and ``context`` on the device.
    """
    raw = _modelled(phase, job)
    if phase.phase == BEFORE:
        return raw
    wanted = expected(phase, job, calibration).expected
    device = dict(raw.device)
    device["allocator"] += wanted - raw.peak_bytes
    if device["allocator"] < 0:  # less than is always there: seen where the model is too large
        device["context"] = max(0, device["context"] + device["allocator"])
        device["allocator"] = 0
    return replace(raw, device=device)


def expected(phase: PhaseBytes, job: PlannedJob, calibration: Calibration) -> Expected:
    """A phase's peak on the device with its error bar, unseen bytes included.

    On a GPU that is what the allocator reserves and CUDA's context; on a CPU the growth of the
    resident set.
    """
    raw = _modelled(phase, job)
    known = Calibration(persistent=False) if phase.phase == BEFORE else calibration
    outside = raw.device["context"] if job.device == "cuda" else 0  # not the allocator's
    figure: Figure = "reserved" if job.device == "cuda" else "resident"
    found = known.predict(raw.peak_bytes - outside, Kind.of(job), figure)
    return Expected(
        found.expected + outside, found.low + outside, found.high + outside, found.basis
    )


def metered_bytes(phase: PhaseBytes) -> int:
    """Of tensors alone, on the device."""
    return sum(nbytes for name, nbytes in phase.device.items() if name not in CATEGORIES)


def allocated_bytes(phase: PhaseBytes) -> int:
    """What a GPU's allocator will have given out at the most (`max_memory_allocated`)."""
    return metered_bytes(phase) + cuda_unseen(phase.device).allocated


def reserved_bytes(phase: PhaseBytes) -> int:
    """What it will have reserved for that (`max_memory_reserved`); of a phase `with_unseen`."""
    return phase.peak_bytes - phase.device.get("context", 0)


def record_step(
    job: PlannedJob,
    predicted: PhaseBytes,
    measured_live: int | None,
    measured_resident: int | None,
    calibration: Calibration | None = None,
    *,
    longest_only: bool = False,
) -> None:
    """Keeps what the first steps of a training, or a probe, needed beside what was said of them.

    Args:
        predicted: the training's phase, with or without what the meter cannot see.
        measured_live: bytes: the meter's peak on real tensors; on a GPU `max_memory_allocated`.
        measured_resident: bytes: growth of the resident set since the imports; on a GPU
            `max_memory_reserved`.
        calibration: None is this user's store.
        longest_only: nothing but the longest step ran, as in a probe.
    """
    store = Calibration() if calibration is None else calibration
    ran = shapes_of_step(job) if longest_only else None
    kind, raw = Kind.of(job), _modelled(predicted, job, ran)
    cuda = job.device == "cuda"
    if measured_live is not None:
        live = allocated_bytes(raw) if cuda else metered_bytes(raw)
        store.record(kind, "allocated" if cuda else "live", live, measured_live)
    if measured_resident is not None:
        whole = reserved_bytes(raw) if cuda else raw.peak_bytes
        store.record(kind, "reserved" if cuda else "resident", whole, measured_resident)


def work_of(job: PlannedJob, step: StepWork | None, ran: RowShapes | None = None) -> Work:
    """What a process on a CPU did, as far as it decides what it keeps.

    Args:
        step: see `qft.planning.amounts.PhaseBytes.after`.
        ran: the shapes of all its forward passes; None is those of the whole training.
    """
    half = job.dtype.itemsize == 2
    if step is None or not half:
        return Work(half, step, unread_bytes=_unread_bytes(job))
    metered = shapes_of_step(job)
    run = shapes_of_run(job) if ran is None else ran
    kernels = step.linear * run.count / metered.count
    kernels += step.attention * run.tiles / metered.fake_tiles if metered.lengths else 0
    kernels += 0 if ran is not None else step.evaluated
    return Work(half, step, round(kernels), _unread_bytes(job))


def _unread_bytes(job: PlannedJob) -> int:
    """Of an input embedding that is mapped, and of which only some rows are ever read."""
    config = models.read_config(job.inputs.base)
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    converted = stored.removeprefix("torch.") != str(job.dtype).removeprefix("torch.")
    if converted or job.ready.held != "none":
        return 0  # it is read, and the file is closed
    skeleton: Any = job.ready.skeleton
    total = sum(p.numel() for p in skeleton.parameters())
    table = skeleton.get_input_embeddings().weight
    tied = skeleton.get_output_embeddings()
    if job.ready.trained_parameters > total / 2 or (tied is not None and tied.weight is table):
        return 0
    return int(table.nbytes)


def _modelled(phase: PhaseBytes, job: PlannedJob, ran: RowShapes | None = None) -> PhaseBytes:
    """By the built-in models alone."""
    seen = {name: nbytes for name, nbytes in phase.device.items() if name not in CATEGORIES}
    if job.device == "cuda":
        found = cuda_unseen(seen)
        unseen = {"allocator": found.allocated + found.between, "context": found.context}
    else:
        process = resident_unseen(work_of(job, phase.after, ran), sum(seen.values()))
        unseen = {"allocator": process.kept, "context": process.once}
    return replace(phase, device={**seen, **unseen})
