"""The phases of a training, in the order of a run: load, write, train, evaluate, save."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qft.lean.meter import Reading
from qft.planning.amounts import PhaseBytes, StepWork
from qft.planning.caches import cache_bytes
from qft.planning.evaluating import evaluate_phase, fake_evaluation
from qft.planning.generating import writing_phase
from qft.planning.job import PlannedJob
from qft.planning.loading import adapter_bytes, load_phase, teacher_bytes
from qft.planning.saving import room_note, save_phase

AFTER = ("evaluate", "save")  # the last of a training


def phases_of(job: PlannedJob, reading: Reading) -> list[PhaseBytes]:
    """What each phase takes at its fullest moment; an evaluation only where there are rows for it.

    A student that writes its own texts does so in the middle of its training.

    Args:
        job: a recipe with its rows, or with imagined ones.
        reading: of one of its training steps.
    """
    teacher = teacher_bytes(job)
    beside = 0 if teacher is None else teacher.weights
    training = train_phase(job, reading, beside)
    evaluation = evaluate_phase(job, reading, beside)
    saving = save_phase(job, reading, fake_evaluation(job).trained_tensors, training)
    needed = training.disk_peak + saving.disk_peak
    saving = replace(saving, note=room_note(needed, Path(job.recipe.output)))
    writing = writing_phase(job, reading)
    later = [phase for phase in (writing, training, evaluation, saving) if phase is not None]
    step = StepWork.of(reading)
    evaluated = evaluation.after if evaluation is not None else None
    both = step if evaluated is None else replace(step, evaluated=evaluated.evaluated)
    train = job.recipe.train
    amid = train.eval_every is not None or train.epochs > 1  # and steps come after it
    return [
        load_phase(job, reading),
        *(replace(phase, after=both if amid or phase.phase in AFTER else step) for phase in later),
    ]


def train_phase(job: PlannedJob, reading: Reading, teacher: int = 0) -> PhaseBytes:
    """The step as it was metered, with a teacher's weights beside it.

    Args:
        teacher: bytes of a teacher that stays in memory.
    """
    device = {**reading.peak.by_category, "teacher": teacher}
    device["weights"] -= teacher  # the reading counts them together
    device["adapters"] += adapter_bytes(job, reading) - reading.most["adapters"]
    host = dict(reading.host_peak.by_category) if job.device != "cpu" else {}
    note = ""
    if job.recipe.train.optimizer.startswith("paged") and job.device != "cpu":
        note = "Paged optimizer states leave for the host where the device has no room for them."
        host["optimizer"] = host.get("optimizer", 0) + reading.most["optimizer"]
    disk = cache_bytes(job)
    return PhaseBytes("train", _some(device), _some(host), disk, sum(disk.values()), note)


def _some(values: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in values.items() if size}
