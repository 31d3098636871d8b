"""Counts, bytes, durations and axis ticks as people read them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class ByteUnit:
    """The unit in which a set of byte counts is shown."""

    name: str
    size: int

    @classmethod
    def of(cls, largest: float) -> ByteUnit:
        """The largest unit of which there is at least one."""
        power = 0
        while largest >= 1024 ** (power + 1) and power < len(_UNITS) - 1:
            power += 1
        return cls(_UNITS[power], 1024**power)

    def number(self, count: float) -> str:
        """Three digits that count, or a whole number, without the unit."""
        value = count / self.size
        return f"{value:.2f}" if 0.095 <= abs(value) < 0.995 else short(value)

    def text(self, count: float) -> str:
        """With the unit."""
        return f"{self.number(count)} {self.name}"


def bytes_text(count: float) -> str:
    """1536 → ``1.50 KiB``."""
    return ByteUnit.of(abs(count)).text(count)


def short(value: float) -> str:
    """Three digits that count: 0.0123, 1.20, 12.3, 123, 1,234; 2e-4 where it is tiny; 4 is 4."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e7:
        return f"{value:.3g}"
    if size >= 99.95:
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.2e}".replace(".00e", "e").replace("e-0", "e-")
    if value == round(value):
        return f"{value:.0f}"
    rounded = float(f"{size:.3g}")  # 9.996 has as many decimals as 10
    return f"{value:.{max(0, 2 - math.floor(math.log10(rounded)))}f}"


def compact(count: float) -> str:
    """8,798,208 → ``8.8 M``."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            scaled = count / (1e3 if letter == "k" else size)
            return f"{scaled:.1f} {letter}" if scaled < 99.95 else f"{scaled:.0f} {letter}"
    return f"{count:,.0f}"


def duration_text(seconds: float) -> str:
    """75 → ``1 min 15 s``."""
    if not math.isfinite(seconds) or seconds < 0:
        return "unknown"
    if seconds < 60:
        return f"{short(seconds)} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours / 24:.1f} days"


def nice_ticks(low: float, high: float, most: int = 6, whole: bool = False) -> list[float]:
    """At most ``most`` round numbers from ``low`` to ``high``, evenly apart.

    Args:
        whole: only whole numbers, as for steps.
    """
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low] if math.isfinite(low) else []
    step = _round_up((high - low) / max(1, most - 1))
    if whole:
        step = max(1.0, step if step >= 10 else math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [(first + number) * step for number in range(count)]


def _round_up(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(f for f in (1, 2, 2.5, 5, 10) if f * power >= step * (1 - 1e-9))


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """The ticks with as many decimals as tell them apart, all the same; thousands as k and M."""
    largest = max((abs(t) for t in ticks), default=0.0)
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=largest or 1.0)
    if largest and (largest < 1e-3 or largest >= 1e9):
        return ["0" if t == 0 else _scientific(t) for t in ticks]
    for size, letter in ((1e6, "M"), (1e4, "k")):
        if largest >= size:
            scaled = 1e6 if letter == "M" else 1e3
            return ["0" if t == 0 else f"{t / scaled:.{_decimals(step / scaled)}f}{letter}"
                    for t in ticks]  # fmt: skip
    return [f"{t:,.{_decimals(step)}f}" for t in ticks]


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _decimals(step: float) -> int:
    """How many show a step exactly: 0.25 needs two."""
    for digits in range(9):
        if math.isclose(round(step, digits), step, rel_tol=1e-6):
            return digits
    return 9
