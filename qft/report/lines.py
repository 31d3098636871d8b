"""What changes over the steps of a run: a line chart with limits, events and values to hover at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qft.report.drawing import (
    WIDTH,
    drawing,
    element,
    legend,
    rule,
    text_width,
    words,
)  # fmt: skip
from qft.report.escaping import escaped
from qft.report.numbers import nice_ticks, short, tick_texts

Point = tuple[float, float | None]  # step and value; None is not a finite number
_HEIGHT, _TOP, _RIGHT = 236.0, 34.0, WIDTH - 62.0
_BUCKETS = 150  # of a line's points, which keep their lowest and highest
_HOVERED = 40  # points of a line that tell their value
_FAR = 4  # a limit so many times the highest value is told, not drawn


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        points: by rising step.
        colour: a CSS colour.
        look: ``line``, ``dots`` (each point marked), ``faint`` (behind its own smoothed line,
            and not in the legend) or ``dashed``.
    """

    name: str
    points: Sequence[Point]
    colour: str = "var(--q-one)"
    look: str = "line"

    @property
    def finite(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        return [(x, y) for x, y in self.points if y is not None and math.isfinite(y)]


@dataclass(frozen=True)
class Limit:
    """A level to compare with.

    Attributes:
        low, high: where it may be, if it is not certain.
    """

    name: str
    value: float
    colour: str = "var(--q-bad)"
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class LineChart:
    """A chart over steps.

    Attributes:
        unit: beside the title.
        scale: the unit's size in the values' own.
        marks: steps at which something happened, and what.
        text: a value with its unit, for people.
        from_zero: whether the vertical axis begins there.
    """

    title: str
    series: Sequence[Series]
    unit: str = ""
    scale: float = 1.0
    limits: Sequence[Limit] = ()
    marks: Sequence[tuple[float, str]] = ()
    text: Callable[[float], str] = short
    from_zero: bool = False

    def draw(self) -> str:
        """An SVG for a page that has the rules of `qft.report.drawing.STYLE`."""
        frame = _Frame(self)
        title = f"{self.title}, {self.unit}" if self.unit else self.title
        parts = [words(0, 14, title, "q-head"), frame.axes()]
        parts += [_mark(frame, x, told) for x, told in self.marks]
        parts += [_limit(frame, limit, self.text) for limit in frame.limits]
        parts += [_line(frame, series) for series in self.series]
        parts.append(_ends(frame, self))
        parts += [_hover(frame, series, self.text) for series in self.series]
        below, end = legend(_keys(self, frame), _HEIGHT + 22)
        return drawing("".join([*parts, below]), end, _told(self))


class _Frame:
    """Where values stand."""

    def __init__(self, chart: LineChart) -> None:
        points = [p for s in chart.series for p in s.finite]
        values = [y for _, y in points]
        top = max(values, default=1.0)
        self.limits = [n for n in chart.limits if n.value <= _FAR * max(top, 0)]
        self.far = [n for n in chart.limits if n not in self.limits]
        reached = values + [v for n in self.limits for v in (n.value, n.high) if v is not None]
        self.low, self.high = _range(reached, chart.from_zero)
        steps = [x for s in chart.series for x, _ in s.points]
        self.first, self.last = min(steps, default=0.0), max(steps, default=1.0)
        if self.first == self.last:
            self.first, self.last = self.first - 1, self.last + 1
        ticks = nice_ticks(self.low / chart.scale, self.high / chart.scale, 6)
        self.ticks = [(t * chart.scale, n) for t, n in zip(ticks, tick_texts(ticks), strict=True)]
        self.left = 10 + max((text_width(name) for _, name in self.ticks), default=0.0)

    def x(self, step: float) -> float:
        return self.left + (_RIGHT - self.left) * (step - self.first) / (self.last - self.first)

    def y(self, value: float) -> float:
        return _HEIGHT - (_HEIGHT - _TOP) * (value - self.low) / (self.high - self.low)

    def axes(self) -> str:
        drawn = []
        for value, name in self.ticks:
            y = self.y(value)
            drawn.append(rule(self.left, y, _RIGHT, y, "q-grid"))
            drawn.append(words(self.left - 7, y + 4, name, anchor="end"))
        steps = nice_ticks(self.first, self.last, 6, whole=True)
        for step, name in zip(steps, tick_texts(steps), strict=True):
            x = self.x(step)
            drawn.append(rule(x, _HEIGHT, x, _HEIGHT + 4, "q-axis"))
            drawn.append(words(x, _HEIGHT + 17, name, anchor="middle"))
        drawn.append(rule(self.left, _HEIGHT, _RIGHT, _HEIGHT, "q-axis"))
        drawn.append(words(_RIGHT + 22, _HEIGHT + 17, "step"))
        return "".join(drawn)


def _range(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if from_zero:
        low = min(0.0, low)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low if from_zero else low - room, high + room


def _line(frame: _Frame, series: Series) -> str:
    drawn, stretch = [], []
    for x, y in [*thinned(series.points), (0.0, None)]:
        if y is not None and math.isfinite(y):
            stretch.append(f"{frame.x(x):.1f} {frame.y(y):.1f}")
            continue
        drawn.append(_stretch(stretch, series))
        stretch = []
    if series.look == "dots":
        drawn += [_dot(frame, x, y, series.colour, 3.2) for x, y in thinned(series.finite)]
    elif len(series.finite) == 1:
        drawn += [_dot(frame, x, y, series.colour, 3.2) for x, y in series.finite]
    lost = [x for x, y in series.points if y is None or not math.isfinite(y)][:_HOVERED]
    drawn += [_cross(frame, x, series.name) for x in lost]
    return "".join(drawn)


def _stretch(places: Sequence[str], series: Series) -> str:
    if len(places) < 2:
        return ""
    return element(
        "path", d="M" + "L".join(places), fill="none", stroke=series.colour,
        stroke_width=1.0 if series.look == "faint" else 2.0, stroke_linejoin="round",
        stroke_dasharray="5 4" if series.look == "dashed" else None,
        opacity=0.45 if series.look == "faint" else None,
    )  # fmt: skip


def _dot(frame: _Frame, x: float, y: float | None, colour: str, radius: float) -> str:
    assert y is not None
    return element("circle", cx=frame.x(x), cy=frame.y(y), r=radius, fill=colour,
                   stroke="var(--q-back)", stroke_width=1.2)  # fmt: skip


def _cross(frame: _Frame, step: float, name: str) -> str:
    told = element("title", escaped(f"step {short(step)}: {name} is not a finite number"))
    shape = element("path", told, d="M-4 -4 L4 4 M-4 4 L4 -4", stroke="var(--q-bad)",
                    stroke_width=2.0)  # fmt: skip
    return element("g", shape, transform=f"translate({frame.x(step):.1f} {_TOP + 8:.1f})")


def _hover(frame: _Frame, series: Series, text: Callable[[float], str]) -> str:
    if series.look == "faint":
        return ""
    points = series.finite
    every = max(1, math.ceil(len(points) / _HOVERED))
    chosen = points[::every] + ([points[-1]] if (len(points) - 1) % every else [])
    drawn = []
    for x, y in chosen:
        told = element("title", escaped(f"step {short(x)}, {series.name}: {text(y)}"))
        drawn.append(element("circle", told, cx=frame.x(x), cy=frame.y(y), r=7, fill="transparent"))
    return "".join(drawn)


def _mark(frame: _Frame, step: float, told: str) -> str:
    x = frame.x(step)
    line = rule(x, _TOP, x, _HEIGHT, "q-mark", stroke="var(--q-bad)", stroke_width=1.2,
                stroke_dasharray="2 3")  # fmt: skip
    flag = element("path", element("title", escaped(told)), fill="var(--q-bad)",
                   d=f"M{x - 5:.1f} {_TOP - 6:.1f} h10 l-5 8 Z")  # fmt: skip
    return line + flag


def _limit(frame: _Frame, limit: Limit, text: Callable[[float], str]) -> str:
    y, band = frame.y(limit.value), ""
    if limit.low is not None and limit.high is not None and limit.high > limit.low:
        top, bottom = frame.y(limit.high), frame.y(max(limit.low, frame.low))
        band = element("rect", x=frame.left, y=top, width=_RIGHT - frame.left,
                       height=max(0.5, bottom - top), fill=limit.colour, opacity=0.12)  # fmt: skip
    line = rule(frame.left, y, _RIGHT, y, "q-level", stroke=limit.colour, stroke_width=1.5,
                stroke_dasharray="6 4")  # fmt: skip
    told = element("title", escaped(f"{limit.name}: {text(limit.value)}"))
    aim = element("rect", told, x=frame.left, y=y - 5, width=_RIGHT - frame.left, height=10,
                  fill="transparent")  # fmt: skip
    return band + line + aim


def _ends(frame: _Frame, chart: LineChart) -> str:
    """The last value of each line and each limit's, at the right, none over another."""
    ends = [
        (frame.y(s.finite[-1][1]), chart.text(s.finite[-1][1]), s.colour)
        for s in chart.series
        if s.finite and s.look != "faint"
    ]
    ends += [(frame.y(n.value), chart.text(n.value), n.colour) for n in frame.limits]
    drawn, above = [], -math.inf
    for y, text, colour in sorted(ends):
        at = min(max(y, above + 14), _HEIGHT + 2)
        above = at
        drawn.append(element("text", escaped(text), x=_RIGHT + 6, y=at + 4,
                             style=f"fill:{colour};font-weight:600"))  # fmt: skip
    return "".join(drawn)


def _keys(chart: LineChart, frame: _Frame) -> list[tuple[str, str]]:
    def stroke(colour: str, dashes: str | None) -> str:
        return element("line", x1=0, y1=0, x2=16, y2=0, stroke=colour, stroke_width=2.4,
                       stroke_dasharray=dashes)  # fmt: skip

    keys = [
        (stroke(s.colour, "5 3" if s.look == "dashed" else None), s.name)
        for s in chart.series
        if s.look != "faint"
    ]
    keys += [(stroke(limit.colour, "4 3"), limit.name) for limit in frame.limits]
    keys += [(stroke(n.colour, "4 3"), f"{n.name} {chart.text(n.value)}, above") for n in frame.far]
    if chart.marks:
        flag = element("path", d="M3 -4 h10 l-5 8 Z", fill="var(--q-bad)")
        keys.append((flag, "memory ran out, samples replayed"))
    return keys if len(keys) > 1 else []


def _told(chart: LineChart) -> str:
    parts = []
    for series in chart.series:
        if not series.finite or series.look == "faint":
            continue
        (start, first), (end, last) = series.finite[0], series.finite[-1]
        parts.append(f"{series.name} from {chart.text(first)} at step {short(start)} "
                     f"to {chart.text(last)} at step {short(end)}")  # fmt: skip
    parts += [f"{limit.name} {chart.text(limit.value)}" for limit in chart.limits]
    parts += [what for _, what in chart.marks[:10]]
    return f"{chart.title}: {'; '.join(parts)}."


def thinned(points: Sequence[Point]) -> list[Point]:
    """No more points than can be told apart; the lowest and highest of each stretch stay."""
    if len(points) <= 2 * _BUCKETS:
        return list(points)
    kept: list[Point] = []
    size = len(points) / _BUCKETS
    for number in range(_BUCKETS):
        bucket = points[round(number * size) : round((number + 1) * size)]
        finite = [p for p in bucket if p[1] is not None]
        chosen = {min(finite, key=_value), max(finite, key=_value)} if finite else {bucket[0]}
        kept += sorted(chosen, key=lambda p: p[0])
    return kept


def _value(point: Point) -> float:
    return point[1] if point[1] is not None else math.nan


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """The mean of about ``window`` points around each; of fewer where the line begins or ends."""
    found: list[Point] = []
    for place, (x, y) in enumerate(points):
        before, after = min(window // 2, place), min(window // 2, place, len(points) - 1 - place)
        around = [v for _, v in points[place - before : place + after + 1] if v is not None]
        found.append((x, sum(around) / len(around) if y is not None else None))
    return found
