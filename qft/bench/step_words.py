"""`qft bench step`: words of the command line to a step's settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qft.bench.step import PLAIN, StepSettings, as_row, meter_step
from qft.errors import RecipeError
from qft.lean.engine import Savers
from qft.registry import build_strategy

CHOICES = {
    "quantize": ("none", "nf4", "fp4", "int8"),
    "offload": ("none", "host"),
    "optimizer": ("adamw", "adamw-8bit", "sgd"),
}
OPTIONS = ("tiled_mlp", "host_embeddings", "int8_head")


def meter_and_describe(
    *,
    rank: int = 16,
    options: Sequence[str] = (),
    plain: bool = False,
    checkpointing: str = "full",
    **settings: Any,
) -> dict[str, Any]:
    """Meters one step and returns its record.

    Raises:
        RecipeError: a word is none of those there are.
    """
    for name, choices in CHOICES.items():
        if settings.get(name, choices[0]) not in choices:
            raise RecipeError("No such choice.", where=f"--{name}", found=settings[name],
                              fix=", ".join(choices))  # fmt: skip
    if unknown := [option for option in options if option not in OPTIONS]:
        raise RecipeError("No such option.", where="--with", found=unknown[0],
                          fix=", ".join(OPTIONS))  # fmt: skip
    if plain and options:
        raise RecipeError("PEFT's way has none of the engine's options.", where="--plain, --with",
                          found=", ".join(options), fix="leave out one of the two")  # fmt: skip
    if checkpointing in ("none", "0") and settings.get("offload", "none") != "none":
        raise RecipeError("Only the inputs of recomputed layers are offloaded.", where="--offload",
                          found=f"--checkpointing {checkpointing}",
                          fix="--checkpointing full, or a number of layers")  # fmt: skip
    layers: Any = int(checkpointing) if checkpointing.isdigit() else checkpointing
    savers = PLAIN if plain else replace(Savers(), **dict.fromkeys(options, True))
    chosen = StepSettings(**settings, checkpointing=layers, savers=savers)
    strategy = build_strategy({"name": "lora", "rank": rank})
    return as_row(chosen, strategy, meter_step(chosen, strategy)) | {"rank": rank}
