"""Pruning by zeros: the model keeps its shape, and a share of its layers' weights becomes zero."""

from __future__ import annotations

from dataclasses import asdict

from qft.errors import RecipeError
from qft.files import require_disk
from qft.pruning.plan import Job, Plan, Settings
from qft.pruning.smallest import prune_by_magnitude_
from qft.pruning.sparse_layers import PruneLayer, by_sparsegpt, by_wanda, prune_layers
from qft.pruning.sparse_targets import sparse_targets
from qft.pruning.sparse_tensors import SparseTensors
from qft.pruning.sparsity import Sparsity, parse_sparsity


def check_zeros(settings: Settings) -> None:
    """Refuses what says nothing to these methods.

    Raises:
        RecipeError: no share or pattern, or a wish for fewer parameters.
    """
    for name in ("params", "size", "layers", "width"):
        if getattr(settings, name) is not None:
            raise RecipeError(
                f"The method {settings.method!r} sets weights to zero; the model keeps its shape "
                "and its size.",
                where=f"--{name}",
                found=getattr(settings, name),
                fix="--ratio 0.5 or --pattern 2:4; depth and width make the model smaller",
            )
    parse_sparsity(settings.ratio, settings.pattern)


def plan_magnitude(job: Job) -> Plan:
    """The smallest weights of each matrix go; tensor by tensor, no rows needed."""
    sparsity = _sparsity(job)
    targets = sparse_targets(job.anatomy, sparsity)
    if job.dry:
        return _dry(job)
    source = SparseTensors(
        job.anatomy, targets, lambda weight: prune_by_magnitude_(weight, sparsity)
    )
    return _plan(job, sparsity, source)


def plan_wanda(job: Job) -> Plan:
    """Of each row the weights go that are smallest times the length of their input."""
    return _plan_layers(job, by_wanda)


def plan_sparsegpt(job: Job) -> Plan:
    """Weights go column by column, and those that stay make up for them."""
    return _plan_layers(job, by_sparsegpt)


def _plan_layers(job: Job, prune_layer: PruneLayer) -> Plan:
    sparsity = _sparsity(job)
    targets = sparse_targets(job.anatomy, sparsity)
    if job.dry:
        return _dry(job)
    rows = job.require_rows()
    folder = job.store.place(f"{job.settings.method}-{sparsity}".replace(":", "of"))
    # the layers lie there until the model is written
    require_disk(folder, 2 * job.scale.whole().bytes)
    places = prune_layers(
        job.anatomy, targets, rows.batches(), prune_layer, sparsity, folder, job.reporter
    )
    return _plan(job, sparsity, SparseTensors(job.anatomy, targets, places=places))


def _sparsity(job: Job) -> Sparsity:
    return parse_sparsity(job.settings.ratio, job.settings.pattern)


def _plan(job: Job, sparsity: Sparsity, source: SparseTensors) -> Plan:
    # what is counted while the model is written is in the facts once it is
    return Plan(source, {"sparsity": str(sparsity), "layers": source.counted}, [],
                job.scale.whole())  # fmt: skip


def _dry(job: Job) -> Plan:
    cost = job.scale.whole()
    return Plan(None, {}, [{**asdict(cost), "share": 1.0}], cost)
