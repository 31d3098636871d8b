"""What a run folder tells: its files, read with distrust, whatever version wrote them.

Nothing of the folder is believed to have the right type or size: what cannot be used is left out,
and the page goes on without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from qft.errors import QftError, RecipeError

_RECIPE, _RUN, _LOG, _SAMPLES = "recipe.yaml", "run.json", "metrics.jsonl", "samples.json"
_LARGEST = 16 * 2**20  # bytes of a file that is read as a whole
_LINES, _LINE_BYTES = 400_000, 65_536  # of the log
_TOO_MUCH = 1e100  # no measurement of anything; NaN and the infinities are none either
Line = Mapping[str, float | None]


@dataclass(frozen=True)
class PhaseAmounts:
    """One phase of the plan, in bytes; see `qft.planning.amounts.PhaseBytes`."""

    phase: str
    device: Mapping[str, int] = field(default_factory=dict)
    host: Mapping[str, int] = field(default_factory=dict)
    disk: Mapping[str, int] = field(default_factory=dict)
    disk_peak: int = 0
    note: str = ""


@dataclass(frozen=True)
class Story:
    """A run, as far as its folder tells.

    Attributes:
        name: the folder's own name.
        recipe_text: recipe.yaml as it is; `recipe` holds its values.
        run: run.json; empty where the run has not finished.
        lines: metrics.jsonl, numbers only; None is a number that is not finite.
        samples: samples.json.
    """

    name: str
    recipe_text: str
    recipe: Mapping[str, Any]
    run: Mapping[str, Any]
    lines: Sequence[Line]
    samples: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the training came to its end."""
        return bool(self.run)

    @property
    def training(self) -> Mapping[str, Any]:
        """Of run.json: steps, seconds, tokens, peaks."""
        return mapping(self.run.get("training"))

    @cached_property
    def phases(self) -> list[PhaseAmounts]:
        """The plan's, if the run has one."""
        told = sequence(self.plan.get("phases"))[:12]
        return [_phase(p) for p in told if isinstance(p, Mapping)]

    @property
    def plan(self) -> Mapping[str, Any]:
        """Of run.json."""
        return mapping(self.run.get("plan"))

    @property
    def steps(self) -> int:
        """How far it came."""
        last = max((line["step"] or 0 for line in self.lines), default=0)
        return int(number(self.training.get("steps")) or last)

    def series(self, key: str) -> list[tuple[float, float | None]]:
        """A logged value over the steps."""
        return [(line["step"] or 0, line[key]) for line in self.lines if key in line]

    def last(self, key: str) -> float | None:
        """The latest finite value of it."""
        return next((y for _, y in reversed(self.series(key)) if y is not None), None)

    @cached_property
    def held_out(self) -> dict[str, list[tuple[float, float | None]]]:
        """Each held-out metric over the steps."""
        keys = dict.fromkeys(k for line in self.lines for k in line if k.startswith("eval_"))
        return {text(key[5:], 60): self.series(key) for key in list(keys)[:40]}

    @cached_property
    def shortages(self) -> list[tuple[float, str]]:
        """Where memory ran out: the step, and what was done."""
        told = sequence(self.training.get("out_of_memory"))[:200]
        found = [(number(mapping(one).get("step")), mapping(one).get("what")) for one in told]
        if found:
            return [(step, text(what, 300)) for step, what in found if step is not None]
        counted = [(0.0, 0.0), *((x, y) for x, y in self.series("replays") if y is not None)]
        return [(step, "memory ran out") for (_, a), (step, b) in pairwise(counted) if b > a]

    @cached_property
    def measured(self) -> Mapping[str, Mapping[str, float]]:
        """What each phase was seen to hold, in bytes: allocated, reserved, resident, live."""
        told = mapping(self.run.get("measured")).items()
        return {
            text(phase, 40): {k: n for k, v in mapping(found).items() if (n := number(v)) and n > 0}
            for phase, found in list(told)[:12]
        }


def read_story(folder: Path) -> Story:
    """Reads a run folder, finished or not.

    Raises:
        RecipeError: it is none.
    """
    text = _text(folder / _RECIPE)
    if text is None:
        raise RecipeError(
            "This is no run folder.",
            where=folder,
            found="no recipe.yaml in it" if folder.is_dir() else "no such folder",
            fix="the folder that a recipe's `output` named, after `qft train`",
        )
    return Story(
        name=folder.resolve().name,
        recipe_text=text,
        recipe=_recipe(text),
        run=_json(folder / _RUN),
        lines=list(_log(folder / _LOG)),
        samples=_json(folder / _SAMPLES),
    )


def _text(path: Path) -> str | None:
    """A file's text; a link may point anywhere, and is none."""
    if path.is_symlink() or not path.is_file():
        return None
    if path.stat().st_size > _LARGEST:
        raise QftError("A file of the run is too large to be one.", where=path,
                       found=f"{path.stat().st_size:,} bytes")  # fmt: skip
    return path.read_text(encoding="utf-8", errors="replace")


def _recipe(text: str) -> Mapping[str, Any]:
    import yaml

    class Plain(yaml.SafeLoader):
        """Without aliases: a few lines of them can make a value without end."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias")
            return super().compose_node(parent, index)

    try:
        return mapping(yaml.load(text, Loader=Plain))
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}


def _json(path: Path) -> Mapping[str, Any]:
    text = _text(path)
    try:
        return mapping(json.loads(text)) if text is not None else {}
    except (ValueError, RecursionError) as error:
        raise QftError(
            "A file of the run cannot be read.", where=path, found=str(error)[:200],
            fix="take it away: the page is made of what is left",
        ) from None  # fmt: skip


def _log(path: Path) -> Iterator[Line]:
    if path.is_symlink() or not path.is_file():
        return
    with path.open("rb") as stream:
        for _ in range(_LINES):
            raw = stream.readline(_LINE_BYTES)
            if not raw:
                return
            line = _line(raw)
            if line is not None:
                yield line


def _line(raw: bytes) -> Line | None:
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):
        return None  # half a line: the run was killed, or is writing it now
    if not isinstance(values, dict) or number(values.get("step")) is None:
        return None
    return {
        key: number(value)
        for key, value in values.items()
        if value is None or number(value) is not None or isinstance(value, float)
    }


def _phase(values: Mapping[str, Any]) -> PhaseAmounts:
    return PhaseAmounts(
        text(values.get("phase"), 40),
        _amounts(values.get("device")),
        _amounts(values.get("host")),
        _amounts(values.get("disk")),
        int(number(values.get("disk_peak")) or 0),
        text(values.get("note"), 500),
    )


def _amounts(values: object) -> dict[str, int]:
    found = {text(name, 40): number(count) for name, count in list(mapping(values).items())[:40]}
    return {name: int(count) for name, count in found.items() if count and 0 < count < 2**60}


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if abs(found) < _TOO_MUCH else None


def text(value: object, length: int = 200) -> str:
    """A short text; nothing where there is none."""
    if value is None:
        return ""
    found = str(value)
    return found if len(found) <= length else found[: length - 1] + "…"


def mapping(value: object) -> Mapping[str, Any]:
    """A mapping with names for keys, or an empty one."""
    return value if isinstance(value, Mapping) and all(isinstance(k, str) for k in value) else {}


def sequence(value: object) -> Sequence[Any]:
    """A list, or an empty one."""
    return value if isinstance(value, list) else []
