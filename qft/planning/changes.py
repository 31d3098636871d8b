"""What a recipe could give up for memory: each change with what it costs, in the order of that.

A change is nothing but settings of the recipe; its words can follow ``qft train RECIPE``. What is
offered follows from what the job holds and trains, never from who trains it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from qft.lean.checkpointing import checkpointed_layers
from qft.planning.job import PlannedJob
from qft.recipe import Recipe, build_recipe

MICRO_BATCH, LENGTH = "micro-batch", "length"
Value = str | int | bool
_CUT_UP = ("text", "extract")  # tasks that make more rows of a long one, and cut nothing off
_ENDING = ("instruct", "chat", "seq2seq", "token")  # tasks whose labels a cut row loses


@dataclass(frozen=True)
class Change:
    """Settings of a recipe that take less memory.

    Attributes:
        settings: pairs of a dotted key and its value.
        cost: what they cost in quality and speed, a sentence.
        contrary: what the user wrote in so many words and this overrules; else nothing.
    """

    settings: tuple[tuple[str, Value], ...]
    cost: str
    contrary: str = ""

    @property
    def words(self) -> str:
        """As the command line takes them: ``memory.micro_batch=1``."""
        return " ".join(f"{key}={_as_yaml(value)}" for key, value in self.settings)


@dataclass(frozen=True)
class Rung:
    """Changes of one kind, from the mildest to the strongest; one of them at most is made."""

    name: str
    changes: tuple[Change, ...]


def changed_recipe(recipe: Recipe, changes: Sequence[Change]) -> Recipe:
    """The recipe with these changes; what its author wrote and what is a default stay apart.

    Raises:
        RecipeError: a value is not allowed.
    """
    tree: dict[str, Any] = {}
    for key, value in (pair for change in changes for pair in change.settings):
        *groups, last = key.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[last] = value
    return build_recipe(_overlaid(recipe, tree), where="a suggested change")


def ladder(job: PlannedJob) -> list[Rung]:
    """What could be changed in a job, in the order of what costs least quality and speed.

    Not all of it helps, and some may be refused when it is tried.
    """
    recipe = job.recipe
    gpu = job.device != "cpu"
    rungs = [
        Rung(MICRO_BATCH, _smaller_micro_batches(job)),
        Rung("checkpointing", _more_recomputed(job)),
        Rung("savers", _savers_back(recipe)),
        Rung("tiled MLP", _switched_on(
            recipe, "tiled_mlp", "the same numbers; MLPs run over a few tokens at a time, once "
            "more in the backward pass")),
        Rung("offload", _offloaded(recipe) if gpu else ()),
        Rung("8-bit optimizer", _smaller_states(recipe) if gpu else ()),
        Rung("host embeddings", _switched_on(
            recipe, "host_embeddings", "the same numbers; token embeddings are looked up on the "
            "host") if gpu else ()),
        # on a CPU the plain layer stays where it is, beside the rounded one
        Rung("8-bit head", _switched_on(
            recipe, "int8_head", "the frozen output layer in 8 bits, which rounds the logits")
            if gpu else ()),
        Rung("quantization", _quantized(job)),
        Rung(LENGTH, _shorter(job)),
    ]  # fmt: skip
    return [rung for rung in rungs if rung.changes]


def written(recipe: Recipe, key: str) -> Value | None:
    """What the recipe's author wrote for a dotted key; None where the default stands.

    A group of which every key is written (a run folder's recipe.yaml) was written by qft: there,
    what differs from the default counts.
    """
    *groups, last = key.split(".")
    place: BaseModel = recipe
    for group in groups:
        if group not in place.model_fields_set:
            return None
        place = getattr(place, group)
    if last not in place.model_fields_set:
        return None
    value: Value | None = getattr(place, last)
    fields = type(place).model_fields
    if place.model_fields_set == set(fields) and value == fields[last].get_default():
        return None
    return value


def _overlaid(group: BaseModel, tree: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: getattr(group, name) for name in group.model_fields_set}
    for name, value in tree.items():
        inner = isinstance(value, Mapping)
        values[name] = _overlaid(getattr(group, name), value) if inner else value
    return values


def _as_yaml(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _change(recipe: Recipe, cost: str, *settings: tuple[str, Value]) -> Change:
    said = [(key, written(recipe, key)) for key, _ in settings]
    overruled = [f"{key}: {_as_yaml(value)}" for key, value in said if value is not None]
    return Change(settings, cost, ", ".join(overruled))


def _switched_on(recipe: Recipe, saver: str, cost: str) -> tuple[Change, ...]:
    if getattr(recipe.memory.savers, saver):
        return ()
    return (_change(recipe, cost, (f"memory.savers.{saver}", True)),)


def _savers_back(recipe: Recipe) -> tuple[Change, ...]:
    """What of the engine is on by default and was switched off."""
    savers = recipe.memory.savers
    fields = type(savers).model_fields
    off = [n for n, field in fields.items() if field.get_default() and not getattr(savers, n)]
    if not off:
        return ()
    cost = "the same numbers; parts of the engine that were switched off"
    return (_change(recipe, cost, *((f"memory.savers.{name}", True) for name in off)),)


def _smaller_micro_batches(job: PlannedJob) -> tuple[Change, ...]:
    """Halved as a run that is out of memory halves it."""
    size = min(job.micro_batch, job.recipe.train.batch_size, len(job.inputs.train.examples))
    changes = []
    while size > 1:
        size = (size + 1) // 2
        passes = -(-job.recipe.train.batch_size // size)
        cost = f"the same update from {passes} smaller passes"
        changes.append(_change(job.recipe, cost, ("memory.micro_batch", size)))
    return tuple(changes)


def _more_recomputed(job: PlannedJob) -> tuple[Change, ...]:
    """One layer more at a time; `auto` recomputes them all already where it must."""
    chosen = job.recipe.memory.checkpointing
    if chosen in ("auto", "full"):
        return ()
    layers = len(checkpointed_layers(job.ready.skeleton))
    counts: list[int | str] = list(range((0 if chosen == "none" else int(chosen)) + 1, layers))
    if layers and isinstance(chosen, int) and chosen >= layers:
        return ()
    return tuple(
        _change(
            job.recipe,
            f"the same numbers; {'all' if count == 'full' else count} of the layers run forward "
            "twice",
            ("memory.checkpointing", count),
        )
        for count in [*counts, "full"]
    )


def _offloaded(recipe: Recipe) -> tuple[Change, ...]:
    if recipe.memory.offload != "none":
        return ()
    cost = "the same numbers; inputs of recomputed layers go to the host's memory and back"
    return (_change(recipe, cost, ("memory.offload", "host")),)


def _smaller_states(recipe: Recipe) -> tuple[Change, ...]:
    name = recipe.train.optimizer
    if name not in ("adamw", "paged-adamw") or not importlib.util.find_spec("bitsandbytes"):
        return ()
    cost = "the optimizer's states in 8 bits, which rounds them"
    return (_change(recipe, cost, ("train.optimizer", f"{name}-8bit")),)


def _quantized(job: PlannedJob) -> tuple[Change, ...]:
    """Of a base that is not stored quantized already, and of which something is frozen."""
    ready = job.ready
    stored = ready.held != job.recipe.quantize
    frozen = ready.trained_parameters < sum(p.numel() for p in ready.skeleton.parameters())
    if stored or ready.held in ("nf4", "fp4") or not frozen:
        return ()
    cost = "the frozen weights in 4 bits, which rounds the base model; each pass unpacks them"
    return (_change(job.recipe, cost, ("quantize", "nf4")),)


def _shorter(job: PlannedJob) -> tuple[Change, ...]:
    """Down to an eighth, but no further than the data check lets rows be cut."""
    recipe, rows = job.recipe, job.inputs.train
    lengths = sorted(len(example.inputs["input_ids"]) for example in rows.examples)
    longest = recipe.train.max_length if recipe.train.packing else max(lengths, default=0)
    step = next((s for s in (64, 16, 4) if longest > 8 * s), 1)
    imagined = not rows.fingerprint
    changes = []
    for length in range((longest - 1) // step * step, max(1, longest // 8) - 1, -step):
        if length < 2:
            break
        cut = sum(size > length for size in lengths) / max(1, len(lengths))
        loses = recipe.task in _ENDING and recipe.data.too_long != "drop" and not imagined
        if loses and cut > recipe.data.max_cut_share:
            break
        settings: list[tuple[str, Value]] = [("train.max_length", length)]
        if cut and recipe.task not in _CUT_UP and recipe.data.too_long == "error":
            settings.append(("data.too_long", "truncate"))
        cost = f"rows of more than {length} tokens are cut"
        if not imagined:
            cost = _cut_off(recipe, lengths, length)
        changes.append(_change(recipe, cost, *settings))
    return tuple(changes)


def _cut_off(recipe: Recipe, lengths: Sequence[int], length: int) -> str:
    """What a row's limit costs, in rows and tokens."""
    if recipe.task in _CUT_UP:
        return f"what is learned reaches over {length} tokens at most"
    long = [size for size in lengths if size > length]
    if not long:
        return "no row is cut"
    if recipe.data.too_long == "drop":
        return f"{len(long)} of {len(lengths)} rows are dropped"
    share = sum(size - length for size in long) / sum(lengths)
    return f"{len(long)} of {len(lengths)} rows are cut, {share:.1%} of all tokens"
