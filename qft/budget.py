"""What layers do with their activations: `memory.budget`, and `checkpointing: auto` without one.

With a budget, as many layers keep their activations as fit, and the others recompute them.

The longest micro-batch of the data is run forward and backward under the meter, with more or fewer
layers keeping, until the most that fit is known: bytes grow with each layer that keeps, so a few
trials are enough; one that passes the budget ends there. Without a budget, all keep theirs if that
surely fits into half of what is free, told by a single ordinary example; else all recompute.
Weights, gradients and random state are left as they were.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from qft.errors import WillNotFitError
from qft.lean.checkpointing import checkpointed_layers
from qft.lean.meter import Meter
from qft.out_of_memory import Shortage, tried
from qft.preparation import inner_model, prepared, recompute_lowest
from qft.progress import human_bytes
from qft.random_state import RandomState

# bytes of optimizer states for each trained number
STATE_BYTES = {"adamw": 8, "sgd": 4, "adafactor": 0.1, "adamw-8bit": 2.1, "paged-adamw": 0,
               "paged-adamw-8bit": 0}  # fmt: skip


def keep_what_fits(
    model: nn.Module, step: Callable[[], object], budget_bytes: int, optimizer: str
) -> tuple[int, int]:
    """Chooses what each layer does.

    Args:
        model: prepared, with all of its layers recomputing.
        step: a forward and a backward pass of the micro-batch that needs most.
        budget_bytes: what weights, gradients, optimizer states and activations may take together.
        optimizer: its name in the recipe.

    Returns:
        How many layers keep their activations, and the bytes this takes.

    Raises:
        WillNotFitError: it does not fit with all of them recomputing.
    """
    inner = inner_model(model)
    layers = len(checkpointed_layers(inner))
    state = prepared(model)
    assert state is not None
    offload = state.offload

    def needed(kept: int) -> int | Shortage:
        recompute_lowest(inner, layers - kept, offload)
        return _needed(model, step, optimizer, budget_bytes)

    fits, too_many = 0, layers + 1
    taken = _within(needed(0), budget_bytes, "with every layer recomputed")
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        bytes_needed = needed(middle)
        if isinstance(bytes_needed, int):
            fits, taken = middle, bytes_needed
        else:
            too_many = middle
    recompute_lowest(inner, layers - fits, offload)
    return fits, taken


ROOM = 0.5  # share of the free memory that kept activations may take


def keep_if_roomy(
    model: nn.Module,
    step: Callable[[], object],
    scale: float,
    free_bytes: int | None,
    optimizer: str,
) -> int | None:
    """Lets all layers keep their activations if there is room for them.

    Args:
        model: prepared, with all of its layers recomputing.
        step: a forward and a backward pass of one ordinary example.
        scale: how many times its tokens the largest micro-batch has; activations grow with them.
        free_bytes: what is free with the model in memory, or None where nobody knows.
        optimizer: its name in the recipe.

    Returns:
        The bytes that activations, gradients and optimizer states will take at most; None if the
        layers go on recomputing.
    """
    inner = inner_model(model)
    layers = len(checkpointed_layers(inner))
    if free_bytes is None:
        return None
    recompute_lowest(inner, 0, "none")
    trained = [p for p in model.parameters() if p.requires_grad]
    states = int(STATE_BYTES[optimizer] * sum(p.numel() for p in trained))
    gradients = sum(p.nbytes for p in trained)
    with Meter(model) as held:
        pass
    needed = _needed(model, step, optimizer, held.reading().static_bytes + free_bytes)
    if isinstance(needed, int):
        activations = needed - states - gradients - held.reading().static_bytes
        taken = int(max(1.0, scale) * max(0, activations)) + states + gradients
        if taken <= ROOM * free_bytes:
            return taken
    recompute_lowest(inner, layers, "none")
    return None


def require_within(
    model: nn.Module, step: Callable[[], object], budget_bytes: int, optimizer: str
) -> int:
    """The bytes a model takes as it is; see `keep_what_fits`.

    Raises:
        WillNotFitError: it is more than the budget.
    """
    needed = _needed(model, step, optimizer, budget_bytes)
    return _within(needed, budget_bytes, "with memory.checkpointing as it is")


def _within(needed: int | Shortage, budget_bytes: int, how: str) -> int:
    if isinstance(needed, int):
        return needed
    numbers = f" ({needed.numbers})" if needed.numbers else ""
    raise WillNotFitError(
        "The longest micro-batch does not fit into memory.budget.",
        where="memory.budget",
        found=f"more is needed {how}{numbers}; {human_bytes(budget_bytes)} are allowed",
        fix="a smaller memory.micro_batch or train.max_length, checkpointing: auto, "
        "memory.offload, quantize: nf4",
    )


def _needed(
    model: nn.Module, step: Callable[[], object], optimizer: str, allowed: int
) -> int | Shortage:
    """The most bytes alive in one call of ``step``, which leaves no trace, and the states'.

    Where that is more than is allowed, what was held when it passed that.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = int(STATE_BYTES[optimizer] * trained)
    random, counting = RandomState.now(), Meter(model, ceiling=allowed - states)

    def metered() -> int | Shortage:
        try:
            with counting:
                step()
        except WillNotFitError as error:  # of a training step, which knows no smaller one
            return Shortage(str(error.found))
        return states + counting.reading().peak_bytes

    made = tried(metered)
    random.restore()
    model.zero_grad(set_to_none=True)
    if isinstance(made, int):
        return made
    held = counting.reading().peak.by_category
    return Shortage(made.message, held={**held, "optimizer": held["optimizer"] + states})
