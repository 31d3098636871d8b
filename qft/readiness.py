"""What is known of a training once its data is there and before a weight is loaded.

`qft check` and `train` both come through `make_ready`: what one of them refuses, the other does,
with the same error. Only what the weights themselves decide is left to the training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qft import models
from qft.data.tasks import pad_id
from qft.distillation.supply import settings_in
from qft.distillation.teachers import plan_teacher
from qft.errors import RecipeError
from qft.inputs import Inputs, require_positions, spec_of
from qft.merging.tensors import ModuleTensors
from qft.models import ModelSpec
from qft.preparation import require_trained
from qft.recipe import Recipe
from qft.shards import ShardedCheckpoint
from qft.strategy import Context, Needs

DEFAULT_MICRO_BATCH = 4


@dataclass(frozen=True)
class Ready:
    """A training that nothing speaks against.

    Attributes:
        skeleton: the base on the meta device, nothing attached.
        held: how the base's weights are held: ``none`` is unquantized.
        context: what the strategy attaches with.
        trained_parameters: how many will train.
    """

    spec: ModelSpec
    skeleton: nn.Module
    needs: Needs
    held: str
    context: Context
    trained_parameters: int


def make_ready(recipe: Recipe, inputs: Inputs, like: Ready | None = None) -> Ready:
    """Tries everything that needs no weight, the strategy itself on a skeleton included.

    Args:
        like: what was found for a recipe that differs in `memory` and `train` alone; what
            they do not decide is not tried again.

    Raises:
        QftError: the training is refused.
    """
    settings = settings_in(recipe)
    if settings is not None and models.is_here(settings.teacher):  # else a cache may do
        plan_teacher(recipe, settings, inputs)
    spec = spec_of(recipe, inputs.train)
    if like is not None and like.spec != spec:  # dropout is among `train`
        like = None
    skeleton = like.skeleton if like else models.open_skeleton(inputs.base, spec)
    needs = like.needs if like else recipe.strategy.needs(skeleton)
    require_positions(recipe, inputs.base, needs.extra_positions)
    _require_packable(recipe, needs)
    _require_one_label(recipe, inputs.train.labels_are)
    if like is None:
        models.unquantized_in(inputs.base, spec, needs.full_precision)
    held = models.held_as(models.read_config(inputs.base), recipe.quantize)
    context = _context(recipe, needs, skeleton, inputs, held)
    if like is not None and like.context.total_steps == context.total_steps:
        count = like.trained_parameters
    else:
        count = _tried(recipe, inputs, spec, context)
    return Ready(spec, skeleton, needs, held, context, count)


def _tried(recipe: Recipe, inputs: Inputs, spec: ModelSpec, context: Context) -> int:
    """Attaches the strategy to a skeleton that is thrown away; how many parameters train."""
    with torch.random.fork_rng(devices=[]):  # the trial must not change what training draws
        skeleton = models.open_skeleton(inputs.base, spec)
        attached = recipe.strategy.attach(skeleton, replace(context, original_weight=None))
    require_trained(attached, recipe.strategy)
    return sum(p.numel() for p in attached.parameters() if p.requires_grad)


def _require_packable(recipe: Recipe, needs: Needs) -> None:
    if recipe.train.packing and needs.extends_sequence:
        raise RecipeError(
            f"The strategy {recipe.strategy.name!r} puts tokens before each row, not each example.",
            where="train.packing",
            fix="train.packing: false, or the strategy prefix",
        )


def _require_one_label(recipe: Recipe, labels_are: str) -> None:
    special = recipe.train.label_smoothing > 0 or recipe.train.class_weights != "none"
    if special and labels_are != "one":
        raise RecipeError(
            "Smoothed labels and class weights are for one class a row.",
            where="train.label_smoothing, train.class_weights",
            found=f"labels that are {labels_are}",
            fix="leave them out",
        )


def _context(
    recipe: Recipe, needs: Needs, skeleton: nn.Module, inputs: Inputs, held: str
) -> Context:
    """What the strategy asked for: calibration batches, the way to an unquantized weight."""
    training = inputs.train
    size = min(recipe.train.batch_size, DEFAULT_MICRO_BATCH)
    starts = range(0, needs.calibration_batches * size, size)
    parts = [training.examples[i : i + size] for i in starts]
    steps = -(-len(training.examples) // recipe.train.batch_size)
    total = recipe.train.max_steps or -int(-steps * recipe.train.epochs // 1)
    original = _original_weights(recipe, skeleton, inputs) if needs.original_weights else None
    return Context(
        task=recipe.task,
        total_steps=total,
        seed=recipe.train.seed,
        quantized=held != "none",
        calibration=tuple(
            inputs.task.collate(part, pad_id(inputs.tokenizer)) for part in parts if part
        ),
        original_weight=original,
        tokenize=lambda text: list(inputs.tokenizer(text, add_special_tokens=False)["input_ids"]),
    )


def _original_weights(
    recipe: Recipe, skeleton: nn.Module, inputs: Inputs
) -> Callable[[str], Tensor]:
    if models.held_as(models.read_config(inputs.base), "none") != "none":
        raise RecipeError(
            f"The strategy {recipe.strategy.name!r} needs the unquantized weights.",
            where="model",
            found="a model that is stored quantized",
            fix="name the original model; `quantize` holds it in 4 or 8 bits",
        )
    names = models.module_names(inputs.base, skeleton)
    return ModuleTensors(ShardedCheckpoint(inputs.base), names).read
