"""Where a rising amount passes a limit, in few trials: bytes rise in nearly straight lines."""

from __future__ import annotations

import math
from collections.abc import Callable


def crossing(amount: Callable[[int], float], inside: int, outside: int, limit: float) -> int:
    """The whole number within the limit that is next to one beyond it.

    A straight line between the two nearest that are known says where to look; every third trial
    halves the interval instead, so that a bent line costs a few trials more and never many.

    Args:
        amount: at a number; infinite where there is none.
        inside: a number whose amount is within the limit.
        outside: one, above or below it, whose amount is not.
    """
    low, high, trials = amount(inside), amount(outside), 0
    while abs(outside - inside) > 1:
        trials += 1
        share = (limit - low) / (high - low) if math.isfinite(high) and high > low else 0.5
        if trials % 3 == 0:
            share = 0.5
        way = int(abs(outside - inside) * share)
        way = min(max(way, 1), abs(outside - inside) - 1)
        guess = inside + (way if outside > inside else -way)
        found = amount(guess)
        if found <= limit:
            inside, low = guess, found
        else:
            outside, high = guess, found
    return inside
