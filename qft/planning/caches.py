"""What a training keeps on the disk beside its run: features, lessons, layers' inputs."""

from __future__ import annotations

from torch import nn

from qft import models
from qft.distillation.kept import kept_of
from qft.distillation.supply import settings_in, teacher_layers
from qft.distillation.teachers import teacher_shape
from qft.features import AUTO_BYTES
from qft.lean.model_parts import hidden_width, layer_stacks
from qft.lean.offload import PIECE_BYTES
from qft.planning.job import PlannedJob


def cache_bytes(job: PlannedJob) -> dict[str, int]:
    """By what it is; of what the weights themselves decide, the most there can be."""
    found = {
        "feature cache": feature_bytes(job),
        "teacher cache": lesson_bytes(job),
        "offloaded inputs": offloaded_bytes(job),
    }
    return {name: size for name, size in found.items() if size}


def feature_bytes(job: PlannedJob) -> int:
    """Of `qft.features`' cache, should this model be one that can be cut where nothing trains."""
    bound, needs, train = job.recipe.memory.feature_cache, job.ready.needs, job.recipe.train
    if bound == "off" or needs.lowest_trainable_layer == 0 or needs.extends_sequence:
        return 0
    if job.recipe.strategy.objective.whole_model or train.embedding_noise or passes(job) <= 1:
        return 0
    sets = [job.inputs.train, *([job.inputs.held_out] if job.inputs.held_out else [])]
    examples = [example for part in sets for example in part.examples]
    skeleton = job.ready.skeleton
    layers = sum(len(stack) for stack in layer_stacks(skeleton).values())
    pooled = needs.lowest_trainable_layer >= layers and job.inputs.task.predicts == "class"
    rows = len(examples) if pooled else sum(len(e.inputs["input_ids"]) for e in examples)
    size = rows * hidden_width(skeleton) * job.dtype.itemsize
    return size if size <= (AUTO_BYTES if bound == "auto" else int(bound)) else 0


def passes(job: PlannedJob) -> float:
    """Over the training rows."""
    train = job.recipe.train
    steps = -(-len(job.inputs.train.examples) // train.batch_size)
    return train.max_steps / steps if train.max_steps else train.epochs


def lesson_bytes(job: PlannedJob) -> int:
    """Of a teacher's cache, before it is compressed by what the teacher says."""
    settings = settings_in(job.recipe)
    if settings is None or not settings.has_lessons or not settings.caches:
        return 0
    pairs, width = {}, 0
    if settings.hidden is not None and models.is_here(settings.teacher):
        pairs = teacher_layers(job.recipe, settings, job.inputs)
        width = teacher_shape(settings.teacher, job.recipe.task).width
    kept = kept_of(job.recipe, settings, job.inputs.task, pairs)
    classes = len(job.inputs.train.labels or "1")
    return sum(kept.sizes(job.inputs.train.examples, classes, width))


def offloaded_bytes(job: PlannedJob) -> int:
    """Of the recomputed layers' inputs in a file, of the longest micro-batch."""
    memory = job.recipe.memory
    if memory.offload != "disk" or memory.checkpointing in ("none", 0):
        return 0
    layers = _layers(job.ready.skeleton)
    count = layers if isinstance(memory.checkpointing, str) else min(layers, memory.checkpointing)
    longest = [len(example.inputs["input_ids"]) for example in job.longest_micro_batch()]
    tokens = sum(longest) if job.flat else len(longest) * max(longest)
    one = tokens * hidden_width(job.ready.skeleton) * job.dtype.itemsize
    return count * -(-one // PIECE_BYTES) * PIECE_BYTES


def _layers(skeleton: nn.Module) -> int:
    return sum(len(stack) for stack in layer_stacks(skeleton).values())
