"""Who takes part: each toolkit with its documented defaults, and with its best settings.

What is best was measured among the settings that each toolkit's documentation offers for a CPU;
`benchmarks/peers/TRIED.md` has the list.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.peers.driver import Side


class UnavailableError(Exception):
    """This side cannot run here; the text says why."""


_ONE_ROW = {"micro_batch": 1}  # no padding at all, and on a CPU nothing lost by it

SIDES = {
    side.name: side
    for side in (
        Side("plain", "plain"),
        Side(
            "plain-best",
            "plain",
            {
                **_ONE_ROW,
                "attention": "eager",
                "adapter_dtype": "bfloat16",
                "kbit_preparation": False,
            },
        ),
        Side("trl", "trl"),
        Side(
            "trl-best",
            "trl",
            {**_ONE_ROW, "attention": "eager", "arguments": {"gradient_checkpointing": False}},
        ),
        Side("unsloth", "unsloth"),
        Side(
            "unsloth-best",
            "unsloth",
            {**_ONE_ROW, "attention": "eager", "checkpointing": False},
            {"UNSLOTH_CPU_COMPILE": "1"},
        ),
        Side("qft", "qft"),
    )
}

# what another case does best with, by side and case
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
