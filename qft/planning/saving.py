"""What checkpoints and the adapter take on the disk, and what is copied to write them.

A checkpoint holds what `strategy.save` writes, the optimizer's states and the random generators'
(`qft.checkpoints`). The new one is whole before the oldest goes. safetensors writes tensors from
where they are; those of a GPU come to the host first, all of a file at once.
"""

from __future__ import annotations

import math

from qft.files import free_disk_bytes
from qft.lean.meter import Reading
from qft.planning.amounts import PhaseBytes
from qft.planning.job import PlannedJob
from qft.planning.loading import adapter_bytes
from qft.progress import human_bytes

_RANDOM_BYTES = 5056 + 4 * 624  # torch's and numpy's generators; a GPU's adds 16
_TEXT_BYTES = 12 * 2**10  # state, card, config, manifest, a short history
_TENSOR_TEXT_BYTES = 140  # a tensor's line in a safetensors header
_STATE_TEXT_BYTES = 300  # the lines of its states, and its number in state.json


def save_phase(job: PlannedJob, reading: Reading, tensors: int, lasting: PhaseBytes) -> PhaseBytes:
    """The fullest moment of saving, and what is on the disk when the training is over.

    Args:
        reading: of the training's step.
        tensors: how many train.
        lasting: the training's phase: weights, adapters and states stay.
    """
    adapter, states = adapter_bytes(job, reading), reading.most["optimizer"]
    kept = ("weights", "adapters", "optimizer", "teacher")
    device = {name: size for name, size in lasting.device.items() if name in kept}
    host: dict[str, int] = {}
    if job.device != "cpu":
        own = {name: size for name, size in lasting.host.items() if name in kept}
        host = {**own, "buffers": max(adapter, states)}
    one = checkpoint_bytes(adapter, states, tensors)
    count = checkpoints_kept(job)
    disk = {"checkpoints": one * count, "adapter": folder_of_adapter(adapter, tensors)}
    rotating = one if checkpoints_made(job) > count else 0
    return PhaseBytes(
        "save", device, host, {k: v for k, v in disk.items() if v}, sum(disk.values()) + rotating
    )


def folder_of_adapter(trained: int, tensors: int) -> int:
    """Of an adapter folder.

    Args:
        trained: bytes of the trained tensors.
        tensors: how many there are.
    """
    return trained + tensors * _TENSOR_TEXT_BYTES + _TEXT_BYTES // 4


def checkpoint_bytes(trained: int, states: int, tensors: int) -> int:
    """Of one checkpoint folder.

    Args:
        trained: bytes of the trained tensors.
        states: bytes of the optimizer's states.
        tensors: how many train.
    """
    text = _TEXT_BYTES + tensors * _STATE_TEXT_BYTES
    return folder_of_adapter(trained, tensors) + states + _RANDOM_BYTES + text


def checkpoints_made(job: PlannedJob) -> int:
    """How often a training saves."""
    train = job.recipe.train
    keeps_best = train.early_stopping and job.recipe.data.has_held_out
    every = train.eval_every if keeps_best else train.save_every
    steps_an_epoch = math.ceil(len(job.inputs.train.examples) / train.batch_size)
    steps = train.max_steps or math.ceil(steps_an_epoch * train.epochs)
    if every is None:
        return max(1, math.ceil(steps / steps_an_epoch))
    return max(1, math.ceil(steps / every))


def checkpoints_kept(job: PlannedJob) -> int:
    """How many are there in the end; the best one stays beside them."""
    train = job.recipe.train
    best = 1 if train.early_stopping and job.recipe.data.has_held_out else 0
    return min(train.keep_checkpoints + best, checkpoints_made(job))


def room_note(needed: int, place: object) -> str:
    """A sentence for people where the disk is too small for it; nothing where it is not."""
    from pathlib import Path

    free = free_disk_bytes(Path(str(place)))
    if needed <= free:
        return ""
    return f"The disk has {human_bytes(free)} free, and {human_bytes(needed)} are needed."
