"""`memory.budget`: as many layers keep their activations as fit; the others recompute them.

The longest micro-batch of the data is run forward and backward under the meter, with more or fewer
layers keeping, until the most that fit is known: bytes grow with each layer that keeps, so a few
trials are enough. Weights, gradients and random state are left as they were.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from qft.errors import WillNotFitError
from qft.lean.checkpointing import checkpointed_layers
from qft.lean.meter import Meter
from qft.lean.model_parts import device_of
from qft.preparation import inner_model, prepared, recompute_lowest
from qft.progress import human_bytes

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

    def needed(kept: int) -> int:
        recompute_lowest(inner, layers - kept, offload)
        return _needed(model, step, optimizer)

    fits, too_many, taken = 0, layers + 1, needed(0)
    _require_within(taken, budget_bytes, "with every layer recomputed")
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        bytes_needed = needed(middle)
        if bytes_needed <= budget_bytes:
            fits, taken = middle, bytes_needed
        else:
            too_many = middle
    recompute_lowest(inner, layers - fits, offload)
    return fits, taken


def require_within(
    model: nn.Module, step: Callable[[], object], budget_bytes: int, optimizer: str
) -> int:
    """The bytes a model takes as it is; see `keep_what_fits`.

    Raises:
        WillNotFitError: it is more than the budget.
    """
    taken = _needed(model, step, optimizer)
    _require_within(taken, budget_bytes, "with memory.checkpointing as it is")
    return taken


def _require_within(taken: int, budget_bytes: int, how: str) -> None:
    if taken > budget_bytes:
        raise WillNotFitError(
            "The longest micro-batch does not fit into memory.budget.",
            where="memory.budget",
            found=f"{human_bytes(taken)} needed {how}, {human_bytes(budget_bytes)} allowed",
            fix="a smaller memory.micro_batch or train.max_length, checkpointing: auto, "
            "memory.offload, quantize: nf4",
        )


def _needed(model: nn.Module, step: Callable[[], object], optimizer: str) -> int:
    """The most bytes alive in one call of ``step``, which leaves no trace, and the states'."""
    cuda = device_of(model).type == "cuda"
    with torch.random.fork_rng(devices=None if cuda else []), Meter(model) as counting:
        step()
    model.zero_grad(set_to_none=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return int(STATE_BYTES[optimizer] * trained) + counting.reading().peak_bytes
