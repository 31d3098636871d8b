"""The model's own dropout, set through its config, where every family names its rates differently.

They are found by structure: a number whose name says dropout, in the config or in one inside it.
``layerdrop`` and the like, which leave out whole layers, are something else. A rate that is None
follows another one (BERT's classifier the hidden states').
"""

from __future__ import annotations

from typing import Any

from qft.errors import RecipeError


def set_dropout(config: Any, rate: float) -> list[str]:
    """Sets every dropout rate of a transformers config; returns the fields' names.

    Raises:
        RecipeError: the config has none.
    """
    names = _set(config, rate, prefix="")
    if not names:
        raise RecipeError(
            "This model has no dropout to set.",
            where="train.dropout",
            found=f"no such field in the config of {config.model_type}",
            fix="leave it out; an adapter's own dropout is the strategy's, as strategy.dropout",
        )
    return names


def _set(config: Any, rate: float, prefix: str) -> list[str]:
    from transformers import PretrainedConfig

    names = []
    for name, value in sorted(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            names += _set(value, rate, f"{prefix}{name}.")
        elif _is_rate(name, value):
            setattr(config, name, float(rate))
            names.append(prefix + name)
    return names


def _is_rate(name: str, value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and ("dropout" in name or name.endswith("pdrop"))
