"""How long a step will take: its operations over a rate that was measured.

The rate is that of former trainings of this kind, if there were any. Else it is estimated from
plain matrix products on this machine: a training reaches a share of theirs. For a device that is
not here nothing is said, unless a rate of it is known.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qft.lean.meter import Reading
from qft.planning.calibration import Calibration, Kind
from qft.planning.job import PlannedJob

# of the rate of matrix products, what a training reaches, by bytes of a number: medians of LoRA
# steps on one core with AMX (0.22 to 0.29 of 960, 0.45 to 0.71 of 143 GFLOP/s); on a GPU what
# an 8B's tokens a second come to on an H200, about
EFFICIENCY = {"cpu": {2: 0.23, 4: 0.65}, "cuda": {2: 0.4, 4: 0.4}}
SIZES = ((512, 768, 2048), (1024, 1024, 1024))  # rows, inner, columns of the products
SECONDS = 0.6  # of each size, at most about


@dataclass(frozen=True)
class Speed:
    """What a training will take, in time.

    Attributes:
        seconds_a_step: of one optimizer step of ordinary examples.
        tokens_per_second: of all tokens that are not padding.
        supervised_per_second: of those with a label.
        seconds_an_epoch: of one pass over the data.
        basis: what it rests on, for people.
    """

    seconds_a_step: float
    tokens_per_second: float
    supervised_per_second: float
    seconds_an_epoch: float
    basis: str


def seconds_a_step(
    job: PlannedJob, reading: Reading, calibration: Calibration
) -> tuple[float, str] | None:
    """Seconds of an optimizer step of ordinary examples, and what that rests on.

    Args:
        reading: of the micro-batch that `job.longest` gives.

    Returns:
        None where the device is not here and no rate of it is known.
    """
    found = rate_of(job, calibration)
    if found is None:
        return None
    rate, basis = found
    return flops_a_step(job, reading) / rate, basis


def speed_of(job: PlannedJob, reading: Reading, calibration: Calibration) -> Speed | None:
    """Seconds, tokens a second and the time of an epoch; None as for `seconds_a_step`."""
    found = seconds_a_step(job, reading, calibration)
    if found is None:
        return None
    seconds, basis = found
    train = job.inputs.train
    examples = train.examples
    size = min(job.recipe.train.batch_size, len(examples))
    share = size / len(examples)
    tokens = share * sum(len(e.inputs["input_ids"]) for e in examples)
    items = share * sum(_labels(e.inputs.get("labels")) for e in examples)
    return Speed(seconds, tokens / seconds, items / seconds, seconds / share, basis)


def flops_a_step(job: PlannedJob, reading: Reading) -> float:
    """Operations of an optimizer step, drawn from the longest micro-batch by the tokens.

    Attention's grow faster than the tokens, so that this is a little too much for short examples.
    """
    examples = job.inputs.train.examples
    longest = sum(len(e.inputs["input_ids"]) for e in job.longest())
    mean = sum(len(e.inputs["input_ids"]) for e in examples) / len(examples)
    size = min(job.recipe.train.batch_size, len(examples))
    return sum(reading.flops.values()) * size * mean / longest


def rate_of(job: PlannedJob, calibration: Calibration) -> tuple[float, str] | None:
    """Operations a second that a training like this does, and what that rests on."""
    kind = Kind.of(job)
    if known := calibration.rate(kind, "training"):
        rate, count = known
        return rate, f"measured here: {count} training{'s' * (count != 1)}"
    if not is_here(job.device):
        return None
    products = products_rate(kind, job.device, job.dtype, calibration)
    share = EFFICIENCY[job.device][job.dtype.itemsize]
    return share * products, "estimated from matrix products"


def record_speed(kind: Kind, flops: float, seconds: float, calibration: Calibration) -> None:
    """Keeps what a training's steps have reached.

    Args:
        flops: operations of the steps that were timed.
        seconds: wall time of them.
    """
    if seconds > 0:
        calibration.record_rate(kind, "training", flops / seconds)


def products_rate(kind: Kind, device: str, dtype: torch.dtype, calibration: Calibration) -> float:
    """Operations a second of matrix products on this machine; measured once, then remembered."""
    plain = Kind(kind.device, kind.dtype, versions=kind.versions)
    if known := calibration.rate(plain, "products"):
        return known[0]
    rate = measure_products(device, dtype)
    calibration.record_rate(plain, "products", rate)
    return rate


def measure_products(
    device: str, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The best of a few sizes, in operations a second; about a second's work."""
    return max(_one_size(device, dtype, size, clock) for size in SIZES)


def is_here(device: str) -> bool:
    """Whether this machine has such a device."""
    return device == "cpu" or torch.cuda.is_available()


def _one_size(
    device: str, dtype: torch.dtype, size: tuple[int, int, int], clock: Callable[[], float]
) -> float:
    rows, inner, columns = size
    left = torch.ones(rows, inner, dtype=dtype, device=device)
    right = torch.ones(columns, inner, dtype=dtype, device=device)
    rates: list[float] = []
    end = clock() + SECONDS
    torch.nn.functional.linear(left, right)  # the first one makes kernels
    while not rates or (clock() < end and len(rates) < 50):
        _wait(device)
        started = clock()
        torch.nn.functional.linear(left, right)
        _wait(device)
        rates.append(2.0 * rows * inner * columns / max(clock() - started, 1e-9))
    return sorted(rates)[len(rates) // 2]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _labels(labels: object) -> int:
    from qft.data.encoding import UNSUPERVISED

    if isinstance(labels, list):
        return sum(label != UNSUPERVISED for label in labels)
    return 1
