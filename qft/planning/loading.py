"""What opening a model takes, with its strategy attached and its teacher beside it.

transformers maps the files and reads tensor by tensor (`from_pretrained`, read in its source and
measured, `benchmarks/plan_phases.py`):

* nothing to convert: on a CPU a weight *is* its place in the file. Pages come in as they are first
  used, so that loading itself takes next to nothing, and the weights are there after one pass.
* another type: the converted tensors are there with all of the file; then the file leaves.
* quantized while loading: the same, tensor by tensor: a layer's unquantized copies on top.
* to a GPU: what is quantized goes straight there; the rest is made on the host first and moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from qft import models
from qft.adapter_folder import AdapterFolder
from qft.distillation.objective import DistillSettings
from qft.distillation.supply import settings_in
from qft.distillation.teachers import teacher_folder
from qft.lean.meter import Reading
from qft.lean.model_parts import layer_stacks
from qft.lean.standins import QuantizedLinear
from qft.planning.amounts import PhaseBytes
from qft.planning.job import PlannedJob
from qft.planning.skeletons import open_held_skeleton
from qft.planning.stored_weights import held_bytes, stored_tensors

# bytes a weight that bitsandbytes holds beside a layer while it quantizes it on a CPU: the layer in
# float32, and as much again for the rounding (measured); on a GPU its kernel takes the layer as is
_QUANTIZING_BYTES = 8


@dataclass(frozen=True)
class Opened:
    """A model as it is after loading, and the fullest moment on the way.

    Attributes:
        weights: bytes of its tensors.
        device: beside them, at the fullest moment.
        host: the same of the host, where the device is another.
        mapped: whether the weights are the file's own pages, which come in when they are used.
    """

    weights: int
    device: int
    host: int
    mapped: bool


def load_phase(job: PlannedJob, reading: Reading) -> PhaseBytes:
    """The fullest moment of loading: while the file is read, or with all that is attached.

    Args:
        reading: of the training's step; it knows weights and adapters.
    """
    own = opened(job)
    adapters, teacher, beside = adapter_bytes(job, reading), teacher_bytes(job), 0
    weights = own_weights(reading, teacher)
    if teacher is not None:  # it comes when the student is there
        beside = max(own.device - adapters - teacher.weights, teacher.device)
    loading = {"weights": weights, "buffers": own.device}
    after = {"weights": weights, "adapters": adapters, "temporary": attach_bytes(job)}
    if teacher is not None:
        after |= {"teacher": teacher.weights, "buffers": beside}
    device = max((loading, after), key=lambda moment: sum(moment.values()))
    host = {}
    if job.device != "cpu":
        on_host = max(own.host, teacher.host if teacher else 0)
        host = {"buffers": on_host, "weights": reading.host_peak.by_category["weights"]}
    note = "The weights are the file's own pages, which come in as they are used." * own.mapped
    return PhaseBytes("load", _some(device), _some(host), note=note)


def own_weights(reading: Reading, teacher: Opened | None) -> int:
    """Of the model alone: a step's reading counts a teacher beside it as well."""
    return reading.most["weights"] - (0 if teacher is None else teacher.weights)


def adapter_bytes(job: PlannedJob, reading: Reading) -> int:
    """Of what trains, and of its first values where the strategy keeps them."""
    trained = reading.most["adapters"]
    return 2 * trained if job.ready.needs.keeps_start else trained


def attach_bytes(job: PlannedJob) -> int:
    """While a strategy takes a weight's singular values: of the largest, in float32.

    The weight, LAPACK's copy and its room for ``gesdd``, the two factors; of a quantized weight
    also the original and the difference.
    """
    if not job.ready.needs.decomposes:
        return 0
    sizes = [
        (module.out_features, module.in_features)
        for stack in layer_stacks(job.ready.skeleton).values()
        for module in stack.modules()
        if isinstance(module, nn.Linear)
    ]
    copies = 4 if job.ready.needs.original_weights else 2
    return max(4 * (copies * m * n + (m + n) * min(m, n) + 4 * min(m, n) ** 2) for m, n in sizes)


def opened(job: PlannedJob) -> Opened:
    """The job's base, without its strategy."""
    spec = replace(job.ready.spec, dtype=job.dtype)
    return _opened(spec, job.inputs.base, job.device, job.ready.needs.full_precision)


def teacher_bytes(job: PlannedJob) -> Opened | None:
    """A teacher that stays in memory while its student trains; None without one.

    Where it is not here, nothing is known of it.
    """
    settings = settings_in(job.recipe)
    if settings is None or not settings.has_lessons or settings.caches:
        return None
    return described_teacher(job, settings)


def described_teacher(job: PlannedJob, settings: DistillSettings) -> Opened | None:
    """A teacher as it is opened, be it for the whole training or only to fill a cache."""
    if not models.is_here(settings.teacher):
        return None
    found = teacher_folder(settings.teacher)
    adapter = found if isinstance(found, AdapterFolder) else None
    if adapter is not None:
        spec = adapter.spec(device=job.device)
    else:
        spec = replace(
            job.ready.spec, source=settings.teacher, quantize=settings.teacher_quantize, labels=None
        )
    base = found.base if isinstance(found, AdapterFolder) else found
    return _opened(replace(spec, dtype=spec.dtype or job.dtype), base, job.device)


def _opened(spec: models.ModelSpec, folder: Path, device: str, keep: Sequence[str] = ()) -> Opened:
    skeleton = open_held_skeleton(folder, spec, keep)
    stored = stored_tensors(folder, models.open_skeleton(folder, spec))
    weights = held_bytes(skeleton)
    assert spec.dtype is not None
    config = models.read_config(folder)
    held = models.held_as(config, spec.quantize)
    quantizing = held != "none" and not config.get("quantization_config")
    mapped = held == "none" and stored.need_no_conversion(spec.dtype)
    largest = max((_linear_numbers(skeleton) if quantizing else ()), default=0)
    if device == "cpu":
        spike = 0 if mapped else stored.bytes + largest * _QUANTIZING_BYTES
        return Opened(weights, spike, 0, mapped)
    if held != "none":
        return Opened(weights, largest * spec.dtype.itemsize, stored.bytes, False)
    host = stored.bytes + (0 if mapped else weights)
    return Opened(weights, 0, host, False)


def _linear_numbers(skeleton: nn.Module) -> Iterator[int]:
    return (
        module.in_features * module.out_features
        for module in skeleton.modules()
        if isinstance(module, QuantizedLinear)
    )


def _some(values: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in values.items() if value}
