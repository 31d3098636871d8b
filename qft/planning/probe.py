"""A short trial of a job: two or three real steps of its longest micro-batch, measured.

It runs in a process of its own, so that what it takes of the memory is the job's alone. Where the
weights are not here, random ones of the same shape take their place, in as few layers as fit; then
the prediction it is compared with is of that smaller model too.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qft import hardware, models
from qft.data.packing import PACKABLE
from qft.data.tasks import Example, pad_id
from qft.errors import QftError, WillNotFitError, printable
from qft.inputs import Inputs
from qft.lean.engine import Savers
from qft.lean.meter import Meter, Reading
from qft.planning.amounts import PhaseBytes
from qft.planning.job import PlannedJob, planned_job
from qft.preparation import prepare, prepared
from qft.progress import human_bytes
from qft.recipe import Recipe
from qft.step import Layout, accumulate_gradients
from qft.task_loss import TaskLoss

STEPS = 3
TIMED = 2  # the last ones


@dataclass(frozen=True)
class Measured:
    """What a few real steps took.

    Attributes:
        live_bytes: the meter's peak on real tensors; on a GPU `max_memory_allocated`.
        resident_bytes: growth of the resident set since the imports, at its peak; on a GPU
            `max_memory_reserved`. None where the system does not say.
        loading_bytes: the same, of loading the model alone.
        seconds: of one optimizer step on the longest micro-batch, the mean of the last ones.
        flops: operations of such a step.
    """

    live_bytes: int
    resident_bytes: int | None
    loading_bytes: int | None
    seconds: float
    flops: int


@dataclass(frozen=True)
class ProbeResult:
    """What was measured, and of which job.

    Attributes:
        probed: the job itself, or one of few layers with random weights, of which the
            config.json is left.
        predicted: what was said of it.
        random_weights: whether it was the latter.
    """

    measured: Measured
    probed: PlannedJob
    predicted: PhaseBytes
    random_weights: bool


def probe(job: PlannedJob, predict: Callable[[PlannedJob], PhaseBytes]) -> ProbeResult:
    """Runs the trial in a fresh process; `qft.planning.unseen.record_step` keeps what it found.

    Args:
        predict: the training's phase of the job that is probed, which may be of few layers.

    Raises:
        QftError: it failed; its last words are told.
        WillNotFitError: without weights: not even a few layers of random ones fit here.
    """
    if job.device == "cuda" and not torch.cuda.is_available():
        raise QftError("There is no CUDA device to probe.", fix="qft plan without --probe")
    if has_weights(job.inputs.base):
        return ProbeResult(_in_a_process(job), job, predict(job), False)
    with shallow_job(job) as shallow:
        return ProbeResult(_in_a_process(shallow), shallow, predict(shallow), True)


_ANSWER = "probe: "


def _in_a_process(job: PlannedJob) -> Measured:
    order = pickle.dumps((job.recipe, job.inputs, job.device))
    paths = [entry or os.getcwd() for entry in sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", "from qft.planning.probe import serve; serve()"]
    done = subprocess.run(command, input=order, capture_output=True, env=environment, check=False)
    answer = done.stdout.decode(errors="replace").rpartition(_ANSWER)[2]
    if done.returncode or not answer:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise QftError(
            "The probe did not finish.",
            found=printable(lines[-1])[:300] if lines else f"it ended with {done.returncode}",
            fix="qft plan without --probe; the plan then rests on what is known already",
        )
    return Measured(**json.loads(answer))


def serve() -> None:
    """The other end: the job comes pickled from this user's own process."""
    recipe, inputs, device = pickle.loads(sys.stdin.buffer.read())
    print(_ANSWER + json.dumps(asdict(run_here(recipe, inputs, device))))


def run_here(recipe: Recipe, inputs: Inputs, device: str) -> Measured:
    """The trial in this process, whose libraries are imported and which did nothing else yet."""
    _import_all(recipe)
    job = planned_job(recipe, inputs, device)
    gauge = Gauge(device)
    model = models.open_model(inputs.base, job.ready.spec, keep=job.ready.needs.full_precision)
    loading = gauge.peak_bytes()
    trial = Trial(model, job)
    seconds = trial.timed_seconds()
    resident = gauge.peak_bytes()
    allocated = torch.cuda.max_memory_allocated() if device == "cuda" else None
    reading = trial.meter()
    return Measured(
        live_bytes=reading.peak_bytes if allocated is None else allocated,
        resident_bytes=resident,
        loading_bytes=loading,
        seconds=seconds,
        flops=sum(reading.flops.values()),
    )


def _import_all(recipe: Recipe) -> None:
    """What a training has imported before it loads a model."""
    import peft  # noqa: F401

    import qft.training  # noqa: F401

    if recipe.quantize != "none":
        import bitsandbytes  # type: ignore[import-untyped] # noqa: F401


class Gauge:
    """What a process takes from now on.

    Args:
        device: ``cpu``: the resident set; ``cuda``: what the allocator reserves.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        gc.collect()
        self._before = 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self._resets = _reset_peak()
            self._before = hardware.resident_bytes()

    def peak_bytes(self) -> int | None:
        """The most since the beginning; None where the process had more before, unresettably."""
        if self._device == "cuda":
            return torch.cuda.max_memory_reserved()
        peak = _peak_of_status() if self._resets else hardware.peak_resident_bytes()
        if peak is None:
            return None
        return max(peak, hardware.resident_bytes()) - self._before


def _reset_peak() -> bool:
    """Linux counts the resident set's peak anew from here, where it lets a process ask for it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _peak_of_status() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


class Trial:
    """A loaded model and its optimizer, ready for steps of the longest micro-batch."""

    def __init__(self, model: nn.Module, job: PlannedJob) -> None:
        self._job = job
        recipe = job.recipe
        self.model = prepare(
            model,
            recipe.strategy,
            checkpointing=recipe.memory.checkpointing,
            offload=recipe.memory.offload,
            savers=Savers(**recipe.memory.savers.model_dump()),
            context=job.ready.context,
        )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        # as training has it; a rate of nothing, so that steps can be taken again and again
        fused = job.device == "cpu"
        self._optimizer = torch.optim.AdamW(trained, lr=0.0, fused=fused)
        self._examples: list[Example] = job.longest()

    def timed_seconds(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """Runs the steps; the mean of the last ones, which have their memory and kernels."""
        for _ in range(STEPS - TIMED):
            self._step()
        started = clock()
        for _ in range(TIMED):
            self._step()
        return (clock() - started) / TIMED

    def meter(self) -> Reading:
        """One more step, under the meter."""
        with Meter(self.model, self._optimizer, self._job.device) as counting:
            self._step()
        return counting.reading()

    def _step(self) -> None:
        job, train = self._job, self._job.recipe.train
        state = prepared(self.model)
        shares = job.recipe.task in PACKABLE and not job.ready.needs.extends_sequence
        flat = shares and state is not None and state.engine.flat
        accumulate_gradients(
            self.model,
            self._examples,
            job.inputs.task,
            step=1,
            micro_batch=job.micro_batch,
            pad_token_id=pad_id(job.inputs.tokenizer),
            strategy=job.recipe.strategy,
            loss=TaskLoss(train.label_smoothing),
            layout=Layout(train.max_length if train.packing else None, train.group_by_length, flat),
        )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if job.device == "cuda":
            torch.cuda.synchronize()


# --- a model without its weights

FEW_LAYERS = 4


def has_weights(folder: Path) -> bool:
    """Whether there is more than a config.json."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


@contextlib.contextmanager
def shallow_job(job: PlannedJob) -> Iterator[PlannedJob]:
    """The job on random weights of the same shape, in few layers, while the context lasts.

    Raises:
        QftError: not even these fit into half of the free memory.
    """
    config = models.open_config(job.inputs.base, job.ready.spec)
    cut_depth(config, FEW_LAYERS)
    kind: Any = type(job.ready.skeleton)
    with torch.device("meta"):
        skeleton = kind(config)
    nbytes = sum(p.numel() for p in skeleton.parameters()) * job.dtype.itemsize
    free = hardware.free_memory_bytes("cpu")
    if free is not None and nbytes > free / 4:  # they are made, and then loaded
        raise WillNotFitError(
            "The probe's few layers do not fit into a quarter of the free memory.",
            found=f"{human_bytes(nbytes)} of weights, {human_bytes(free)} free",
            fix="qft plan without --probe",
        )
    folder = Path(tempfile.mkdtemp(prefix="qft-probe-"))
    # the config is read again when the result is kept; the weights go at once
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        with torch.random.fork_rng(devices=[]):
            made = kind(config).to(job.dtype)
        made.save_pretrained(folder)
        del made
        yield planned_job(job.recipe, replace(job.inputs, base=folder), job.device)
    finally:
        for file in folder.glob("*.safetensors"):
            file.unlink()


def cut_depth(config: Any, layers: int) -> None:
    """At most so many layers; an encoder-decoder has so many on each side."""
    for name in ("num_hidden_layers", "num_decoder_layers", "decoder_layers", "encoder_layers"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(layers, getattr(config, name)))
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list):
        config.layer_types = kinds[:layers]
