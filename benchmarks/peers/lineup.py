"""Who takes part: each toolkit with its documented defaults, and with its best settings.

What is best was measured, per case, among the settings that the toolkit's documentation offers
for a CPU; `benchmarks/peers/TRIED.md` has the list.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.peers.driver import Side


class UnavailableError(Exception):
    """This side cannot run here; the text says why."""


SIDES = {
    "plain": Side("plain", "plain"),
    "plain-best": Side("plain-best", "plain"),
    "trl": Side("trl", "trl"),
    "trl-best": Side("trl-best", "trl"),
    "unsloth": Side("unsloth", "unsloth"),
    "unsloth-best": Side(
        "unsloth-best", "unsloth", {"checkpointing": False}, {"UNSLOTH_CPU_COMPILE": "1"}
    ),
    "qft": Side("qft", "qft"),
    "qft-best": Side("qft-best", "qft", {"recipe": {"memory": {"checkpointing": "none"}}}),
}

# by case, or by a part of its name
BEST: dict[str, dict[str, dict[str, Any]]] = {}


def lineup(wanted: str, case: str, scratch: Path) -> Side:
    """A side by its name, or a trial ``name=side:{options}``.

    Raises:
        UnavailableError: its environment is not there and cannot be made.
    """
    name, _, rest = wanted.partition("=")
    known, _, options = rest.partition(":")
    side = SIDES[known or name]
    best = BEST.get(side.name, {}).get(case, {})
    side = replace(side, name=name, options={**side.options, **best})
    if options:
        values = json.loads(options)
        environment = values.pop("environment", {})
        side = replace(side, options={**side.options, **values},
                       environment={**side.environment, **environment})  # fmt: skip
    if side.script == "unsloth":
        from benchmarks.peers.unsloth_environment import interpreter

        return replace(side, python=str(interpreter(scratch)))
    return side
