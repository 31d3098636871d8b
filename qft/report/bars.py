"""The plan as a picture: a stacked bar a phase, in bytes, against the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qft.report.drawing import (
    WIDTH,
    clipped,
    colours_of,
    drawing,
    element,
    legend,
    rule,
    swatch,
    text_width,
    words,
)  # fmt: skip
from qft.report.escaping import escaped
from qft.report.numbers import ByteUnit, bytes_text, nice_ticks, tick_texts

_THICK, _THIN, _APART = 24.0, 9.0, 14.0
_FAR = 4  # a budget so many times the fullest phase is told, not drawn: bars would be slivers
_ON_HOST = " on the host"


class Phase(Protocol):
    """What is drawn of `qft.planning.amounts.PhaseBytes`."""

    @property
    def phase(self) -> str:
        """Its name."""

    @property
    def device(self) -> Mapping[str, int]:
        """Bytes by category."""

    @property
    def host(self) -> Mapping[str, int]:
        """The same of the host, where the device is another."""


@dataclass(frozen=True)
class _Told:
    """A phase that was read from JSON."""

    phase: str
    device: Mapping[str, int]
    host: Mapping[str, int]


def plan_bars(phases: Sequence[Phase | Mapping[str, Any]], budget_bytes: int | None) -> str:
    """An SVG file of a plan: bars by category, the budget as a line, a legend.

    Args:
        phases: in their order, or what JSON says of them; those without a byte are left out.
        budget_bytes: of the device; None is no limit.
    """
    shown = [
        _Told(p["phase"], p.get("device", {}), p.get("host", {})) if isinstance(p, Mapping) else p
        for p in phases
    ]
    return draw_bars(shown, budget_bytes, {}, alone=True)


def draw_bars(
    phases: Sequence[Phase],
    budget_bytes: int | None,
    measured: Mapping[str, int],
    *,
    alone: bool = False,
) -> str:
    """As `plan_bars`, for a page that has the rules already.

    Args:
        measured: bytes found in a run, by phase: marked beside what was planned.
        alone: a file of its own.
    """
    shown = [p for p in phases if any(p.device.values()) or any(p.host.values())]
    most = max(
        [1, *measured.values()] + [sum(part.values()) for p in shown for part in (p.device, p.host)]
    )
    if budget_bytes is not None and budget_bytes < _FAR * most:
        most = max(most, budget_bytes)
    frame = _Frame(shown, most)
    parts = [words(0, 14, f"Memory by phase, {frame.unit.name}", "q-head"), _grid(frame)]
    parts += [_row(frame, number, p, budget_bytes, measured) for number, p in enumerate(shown)]
    if budget_bytes is not None:
        parts.append(_budget(frame, budget_bytes))
    below, end = legend(_keys(frame, bool(measured)), frame.bottom + 24)
    return drawing("".join([*parts, below]), end, _told(frame, budget_bytes, measured), alone=alone)


class _Frame:
    """Where things are."""

    def __init__(self, phases: Sequence[Phase], most: int) -> None:
        self.phases, self.unit = phases, ByteUnit.of(most)
        self.most = most
        found = {n for p in phases for part in (p.device, p.host) for n in part if part[n]}
        self.colours = colours_of(sorted(found))
        self.names = [name for name in self.colours if name in found]
        self.left = 16 + min(120.0, max([text_width(p.phase) for p in phases], default=0.0))
        self.right = WIDTH - 70.0  # the totals stand there
        self.top = 50.0
        self.hosted = any(any(p.host.values()) for p in phases)
        self.step = _THICK + (_THIN + 3 if self.hosted else 0) + _APART
        self.bottom = self.top + self.step * len(phases) - _APART / 2

    def x(self, count: float) -> float:
        """Where so many bytes end."""
        return self.left + (self.right - self.left) * count / self.most

    def y(self, number: int) -> float:
        """Where a phase's bar begins."""
        return self.top + self.step * number


def _grid(frame: _Frame) -> str:
    ticks = nice_ticks(0, frame.most / frame.unit.size)
    drawn = []
    for tick, text in zip(ticks, tick_texts(ticks), strict=True):
        x = frame.x(tick * frame.unit.size)
        drawn.append(rule(x, frame.top - 6, x, frame.bottom, "q-grid"))
        drawn.append(words(x, frame.bottom + 15, text, anchor="middle"))
    return "".join(drawn)


def _row(
    frame: _Frame,
    number: int,
    phase: Phase,
    budget: int | None,
    measured: Mapping[str, int],
) -> str:
    y, total = frame.y(number), sum(phase.device.values())
    over = budget is not None and total > budget
    name = clipped(phase.phase, frame.left - 12)
    drawn = [
        words(frame.left - 8, y + 16, name, "q-strong", "end"),
        _stack(frame, phase.device, y, _THICK),
    ]
    if total:
        kind = "q-over" if over else "q-strong"
        drawn.append(words(frame.right + 8, y + 16, frame.unit.text(total), kind))
    if any(phase.host.values()):
        below = y + _THICK + 3
        drawn.append(_stack(frame, phase.host, below, _THIN, where=_ON_HOST))
        at = frame.x(sum(phase.host.values())) + 6
        text = f"host {bytes_text(sum(phase.host.values()))}"
        drawn.append(words(min(at, frame.right - text_width(text)), below + 9, text))
    if (found := measured.get(phase.phase)) is not None:
        drawn.append(_diamond(frame.x(found), y + _THICK / 2, f"measured {frame.unit.text(found)}"))
    return "".join(drawn)


def _stack(
    frame: _Frame, amounts: Mapping[str, int], y: float, height: float, where: str = ""
) -> str:
    drawn, before = [], 0
    for name in [n for n in frame.names if amounts.get(n)]:
        start, end = frame.x(before), frame.x(before + amounts[name])
        before += amounts[name]
        gap = 1.0 if end - start > 3 else 0.0
        told = element("title", escaped(f"{name}{where}: {frame.unit.text(amounts[name])}"))
        drawn.append(element(
            "rect", told, x=start, y=y, width=max(0.4, end - start - gap), height=height,
            fill=frame.colours[name], opacity=0.75 if where else None,
        ))  # fmt: skip
    return "".join(drawn)


def _diamond(x: float, y: float, told: str) -> str:
    shape = element("path", element("title", escaped(told)), d="M0 -7 L6 0 L0 7 L-6 0 Z",
                    fill="var(--q-ink)", stroke="var(--q-back)", stroke_width=1.5)  # fmt: skip
    return element("g", shape, transform=f"translate({x:.1f} {y:.1f})")


def _budget(frame: _Frame, budget: int) -> str:
    x, text = frame.x(budget), f"budget {ByteUnit.of(budget).text(budget)}"
    if budget > frame.most:
        return words(WIDTH, frame.top - 13, f"{text} →", "q-limit", "end")
    half = text_width(text) / 2
    at = min(max(x, frame.left + half), WIDTH - half)
    line = rule(x, frame.top - 8, x, frame.bottom, "q-budget", stroke="var(--q-bad)",
                stroke_width=1.6, stroke_dasharray="5 3")  # fmt: skip
    return line + words(at, frame.top - 13, text, "q-limit", "middle")


def _keys(frame: _Frame, measured: bool) -> list[tuple[str, str]]:
    keys = [(swatch(frame.colours[name]), name) for name in frame.names]
    if measured:
        mark = element("path", d="M8 -6 L13 0 L8 6 L3 0 Z", fill="var(--q-ink)")
        keys.append((mark, "measured peak"))
    return keys


def _told(frame: _Frame, budget: int | None, measured: Mapping[str, int]) -> str:
    text = frame.unit.text
    parts = [f"{p.phase} {text(sum(p.device.values()))}" for p in frame.phases]
    parts += [f"measured in {phase} {text(count)}" for phase, count in measured.items()]
    limit = "no budget" if budget is None else f"budget {text(budget)}"
    return f"Memory by phase: {', '.join(parts)}; {limit}."
