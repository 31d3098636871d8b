"""The largest number whose bytes fit, found in few evaluations.

Bytes in a length are a line in pieces: the loss and attention work in chunks and tiles, packing
fills whole rows, and the fullest moment may be another one from some length on. So no line is
trusted: one through what is known tells where to ask next, and the answer has been asked for itself
and so has its neighbour, which does not fit.
"""

from __future__ import annotations

from collections.abc import Callable


def largest_fitting(
    taken: Callable[[int], int], budget: int, *, least: int, most: int, step: int
) -> int | None:
    """The largest multiple of ``step`` from ``least`` to ``most`` that takes no more than allowed.

    Exact to ``step``: it was evaluated and so was the next multiple, unless it is the last there
    is. ``least`` and ``most`` are multiples too, or are rounded to the nearest one within.

    Args:
        taken: bytes at a number; it must not fall.
        budget: bytes allowed.

    Returns:
        None where not even the least fits.
    """
    low, high = -(-least // step), most // step
    if low > high:
        return None
    known: dict[int, int] = {}

    def excess(at: int) -> int:
        if at not in known:
            known[at] = taken(at * step) - budget
        return known[at]

    if excess(low) > 0:
        return None
    # outwards first: what is far too long may take very long to evaluate
    above = low
    while excess(above) <= 0:
        if above == high:
            return high * step
        low, above = above, min(high, max(above + 1, _outward(above, low, excess)))
    return _between(low, above, excess) * step


def _outward(above: int, low: int, excess: Callable[[int], int]) -> int:
    """Where a line through the last two would meet the budget, and a little further."""
    gained = excess(above) - excess(low)
    if above == low or gained <= 0:
        return 2 * above
    reached = above - excess(above) * (above - low) // gained
    return min(max(reached + 1, above + 1), 8 * above)


def _between(low: int, above: int, excess: Callable[[int], int]) -> int:
    """The last that fits of two borders, of which the lower does and the upper does not."""
    halve = False
    while above - low > 1:
        before = above - low
        if halve:
            middle = (low + above) // 2
        else:  # where the line between the two meets the budget
            middle = low + -excess(low) * before // (excess(above) - excess(low))
        middle = min(max(middle, low + 1), above - 1)
        if excess(middle) <= 0:
            low = middle
            if above - low > 1 and excess(low + 1) > 0:  # a line is right, or nearly so
                above = low + 1
            elif above - low > 1:
                low += 1
        else:
            above = middle
            if excess(above - 1) <= 0:
                low = above - 1
            else:
                above -= 1
        halve = above - low > before // 2  # a line that is far off is not asked again
    return low
