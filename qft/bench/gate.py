"""`qft bench gate`: a candidate may be only so much worse than a baseline; exit 5 where it is more.

A bound is what a figure may change by, with its sign: ``+2%`` above the baseline's median,
``-5%`` below it, or an amount in the figure's own unit (``+64MiB``, ``-0.01``). Of memory it is
the most that is allowed, of throughput the least; of a metric ``+`` is the most, ``-`` the least,
and ``±`` both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qft.bench.compare import cell, different, warnings
from qft.bench.figures import CPU_SPEED, METRIC, PEAK, SPEED, Figure, medians, shown, title
from qft.bench.sides import Side, require_done
from qft.errors import RecipeError, VerificationError
from qft.recipe import UNITS

_AMOUNT = re.compile(
    r"(?P<sign>[+±-]|\+/-|\+-)\s*(?P<number>\d+(?:\.\d+)?|\.\d+)(?:[eE](?P<exponent>[+-]?\d{1,3}))?"
    r"\s*(?P<unit>%|[KMG]i?B)?",
    re.IGNORECASE,
)
_FIX = "+2%, -5%, +64MiB, or of a metric loss=+0.02, accuracy=-1%, f1=±0.5%"


@dataclass(frozen=True)
class Bound:
    """How far a figure may be from the baseline's.

    Attributes:
        name: of the figure.
        text: as it was written.
        amount: with its sign: a share where `share`, else in the figure's unit.
        upper: the figure may not be above.
        lower: the figure may not be below.
    """

    name: str
    text: str
    amount: float
    share: bool
    upper: bool
    lower: bool

    def limits(self, baseline: float) -> tuple[float, float]:
        """The least and the most that is allowed."""
        step = abs(baseline) * self.amount if self.share else self.amount
        if self.upper and self.lower:
            return baseline - abs(step), baseline + abs(step)
        return (-math.inf, baseline + step) if self.upper else (baseline + step, math.inf)


@dataclass(frozen=True)
class Check:
    """One bound and what came of it.

    Attributes:
        least: that is allowed; minus infinity where only the most is bounded.
        most: that is allowed.
        passed: whether the candidate's median lies between them.
    """

    bound: Bound
    baseline: Figure
    candidate: Figure
    least: float
    most: float
    passed: bool


def bounds_of(
    memory: str | None = None,
    throughput: str | None = None,
    cpu_throughput: str | None = None,
    metrics: Sequence[str] = (),
) -> list[Bound]:
    """The bounds that a command line states.

    Raises:
        RecipeError: one cannot be read, or there is none.
    """
    found = []
    for flag, name, text in (("--memory", PEAK, memory), ("--throughput", SPEED, throughput),
                             ("--cpu-throughput", CPU_SPEED, cpu_throughput)):  # fmt: skip
        if text is not None:
            found.append(_bound(flag, name, text, upper=name == PEAK))
    for text in metrics:
        name, equals, amount = text.partition("=")
        if not equals or not name.strip():
            raise RecipeError("A metric's bound is not of the form name=+x.", where="--metric",
                              found=text, fix=_FIX)  # fmt: skip
        found.append(_bound("--metric", METRIC + name.strip(), amount))
    if not found:
        raise RecipeError("The gate has no bounds.", where="--memory, --throughput, --metric",
                          fix="--memory +2% --throughput -5%")  # fmt: skip
    return found


def _bound(flag: str, name: str, text: str, upper: bool | None = None) -> Bound:
    """One bound; `upper` is which side is bounded, None where the sign says it."""
    read = _AMOUNT.fullmatch(text.strip())
    if read is None:
        raise RecipeError("This is no bound.", where=flag, found=text, fix=_FIX)
    unit = (read["unit"] or "").upper()
    if unit not in ("", "%") and name != PEAK:
        raise RecipeError("Only memory is bounded in bytes.", where=flag, found=text, fix=_FIX)
    both = read["sign"] not in ("+", "-")
    if both and upper is not None:
        raise RecipeError("This bound has one side: + or -.", where=flag, found=text, fix=_FIX)
    number = float(f"{read['number']}e{read['exponent'] or 0}")
    amount = (-1 if read["sign"] == "-" else 1) * number
    if not math.isfinite(amount):
        raise RecipeError("This is no bound.", where=flag, found=text, fix=_FIX)
    share = unit == "%"
    amount = amount / 100 if share else amount * UNITS.get(unit, 1)
    if upper is None:
        upper = read["sign"] != "-"
    return Bound(name, text.strip(), amount, share, upper or both, both or not upper)


def gate(
    baseline: Side, candidate: Side, bounds: Sequence[Bound], *, any_device: bool = False
) -> list[Check]:
    """Holds a candidate's medians against a baseline's.

    Args:
        any_device: compare what was measured on different devices.

    Raises:
        RecipeError: the two cannot be compared, or a side lacks a figure.
    """
    for side in (baseline, candidate):
        require_done(side)
    if different(baseline, candidate, "verb"):
        told = next(w for w in warnings(baseline, candidate) if w.startswith("other commands"))
        raise RecipeError("Two commands of different kinds are not compared.",
                          where="BASELINE, CANDIDATE", found=told)  # fmt: skip
    if not any_device and any(different(baseline, candidate, k) for k in ("device", "device_name")):
        raise RecipeError(
            "The two were measured on different devices.",
            where="BASELINE, CANDIDATE",
            found=next(w for w in warnings(baseline, candidate) if w.startswith("other devices")),
            fix="measure both on one device, or --any-device",
        )
    if different(baseline, candidate, "peak_kind") and any(b.name == PEAK for b in bounds):
        raise RecipeError("The two peaks are of different kinds.", where="--memory",
                          found=next(w for w in warnings(baseline, candidate) if "kinds" in w),
                          fix="measure both by one version of qft")  # fmt: skip
    return [_check(baseline, candidate, bound) for bound in bounds]


def _check(baseline: Side, candidate: Side, bound: Bound) -> Check:
    before, after = (_figure(side, bound.name) for side in (baseline, candidate))
    least, most = bound.limits(before.median)
    return Check(bound, before, after, least, most, least <= after.median <= most)


def _figure(side: Side, name: str) -> Figure:
    found = medians(side.records)
    figure = found.get(name)
    if figure is None or figure.count != len(side.records):
        lacking = len(side.records) - (figure.count if figure else 0)
        metrics = [other.removeprefix(METRIC) for other in found if other.startswith(METRIC)]
        raise RecipeError(
            f"A side does not know its {title(name)}.",
            where=side.name,
            found=f"{lacking} of {len(side.records)} records lack it",
            fix=f"its metrics: {', '.join(metrics) or 'none'}" if name.startswith(METRIC) else None,
        )
    return figure


def require_passed(checks: Sequence[Check]) -> None:
    """Ends the command with exit status 5 where a bound is passed.

    Raises:
        VerificationError: names each.
    """
    failed = [check for check in checks if not check.passed]
    if failed:
        raise VerificationError(
            "The candidate is outside the gate.",
            found="; ".join(f"{title(c.bound.name)} {_change(c)}, allowed {c.bound.text}"
                            for c in failed),
        )  # fmt: skip


def _change(check: Check) -> str:
    """How far a figure moved, in the way its bound is written."""
    before, after = check.baseline.median, check.candidate.median
    if check.bound.share and before:
        return f"{(after - before) / abs(before):+.2%}"
    return shown(check.bound.name, after - before, signed=True)


def rows_of(checks: Sequence[Check]) -> list[tuple[str, ...]]:
    """A table's cells, the heads first."""
    rows: list[tuple[str, ...]] = [("", "baseline", "candidate", "change", "allowed", "")]
    for check in checks:
        name = check.bound.name
        rows.append((title(name), cell(name, check.baseline), cell(name, check.candidate),
                     _change(check), check.bound.text,
                     "ok" if check.passed else "NOT ok"))  # fmt: skip
    return rows


def to_dict(checks: Sequence[Check], baseline: Side, candidate: Side) -> dict[str, Any]:
    """Plain values for JSON."""
    return {
        "passed": all(check.passed for check in checks),
        "checks": [asdict(check) for check in checks],
        "warnings": warnings(baseline, candidate),
    }
