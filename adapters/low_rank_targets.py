"""Which linear layers get an update: by kind, by layer, by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from qft.errors import RecipeError
from qft.lean.model_parts import head_names, layer_stacks, output_embeddings

if TYPE_CHECKING:
    from torch import nn

Targets = str | Sequence[str]
KINDS = ("all-linear", "attention", "mlp")


def resolve(
    model: nn.Module, targets: Targets, layers: Collection[int] | None = None
) -> str | list[str]:
    """What PEFT's ``target_modules`` must be.

    Args:
        targets: a kind, a regular expression, or names that may hold ``*``.
        layers: only these of each stack, counted from 0, or from the end if negative.

    Raises:
        RecipeError: nothing matches.
    """
    globs = not isinstance(targets, str) and any("*" in target for target in targets)
    if layers is None and not globs and targets not in ("attention", "mlp"):
        return targets if isinstance(targets, str) else list(targets)
    inside = _layer_prefixes(model, layers)
    found = [
        name
        for name in linear_names(model)
        if (not inside or name.startswith(inside)) and _wanted(name, targets)
    ]
    if not found:
        some = ", ".join(linear_names(model)[:4])
        raise RecipeError(
            "No linear layer of this model is among the targets.",
            where="strategy.targets",
            found=f"{targets!r}, layers {list(layers) if layers is not None else 'all'}",
            fix=f"it has {some}, …",
        )
    return found


def linear_names(model: nn.Module) -> list[str]:
    """Every linear layer but the heads and the output embeddings."""
    from torch import nn

    heads = tuple(f"{name}." for name in head_names(model))
    output = output_embeddings(model)
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and module is not output
        and not f"{name}.".startswith(heads or ("\0",))
    ]


def _layer_prefixes(model: nn.Module, layers: Collection[int] | None) -> tuple[str, ...]:
    if layers is None:
        return ()
    prefixes = []
    for name, stack in layer_stacks(model).items():
        for number in layers:
            if not -len(stack) <= number < len(stack):
                raise RecipeError(
                    "The model has fewer layers.",
                    where="strategy.layers",
                    found=f"{number}; the stack {name} has {len(stack)}",
                )
            prefixes.append(f"{name}.{number % len(stack)}.")
    return tuple(prefixes)


def _wanted(name: str, targets: Targets) -> bool:
    if isinstance(targets, str):
        if targets not in KINDS:
            import re

            return re.fullmatch(targets, name) is not None
        attention = any("att" in part.lower() for part in name.split("."))
        return targets == "all-linear" or attention == (targets == "attention")
    return any(
        fnmatchcase(name, target) or name == target or name.endswith(f".{target}")
        for target in targets
    )
