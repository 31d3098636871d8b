"""How much goes through a model at once, and how it shrinks where memory runs out.

Training, evaluation, generation and teachers all split their work by it. What shrinks is the number
of tokens at once, padding included: one long example costs the short ones after it nothing, and
nothing has to be tried again later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qft.out_of_memory import Shortage, free_idle_memory


def _nothing() -> str | None:
    return None


def _unheard(sentence: str) -> None:
    """Nobody wants to know."""


@dataclass
class MicroBatch:
    """At most so many examples at once, and so many tokens; one example always goes.

    Attributes:
        examples: as the recipe or a caller says.
        tokens: padding included; None is no limit. Shrinks, and never grows.
        padded: every row counts as much as the widest; else tokens are simply added up.
        relieve: makes room where not even one example fits, and says how; None if it cannot.
        told: hears a sentence whenever something had to change.
        fixed: it is a trial: what does not fit is an error at once.
        shrinks: how often it shrank.
        retries: how often the same was tried again after idle memory was freed.
    """

    examples: int
    tokens: int | None = None
    padded: bool = True
    relieve: Callable[[], str | None] = _nothing
    told: Callable[[str], object] = _unheard
    fixed: bool = False
    shrinks: int = 0
    retries: int = 0
    _retried: set[tuple[int, ...]] = field(default_factory=set)

    def size(self, widths: Sequence[int]) -> int:
        """Tokens of rows that go together."""
        return len(widths) * max(widths) if self.padded else sum(widths)

    def count(self, widths: Sequence[int], start: int = 0) -> int:
        """How many of the rows from ``start`` on go together.

        Args:
            widths: of all rows, in tokens.
        """
        most = min(self.examples, len(widths) - start)
        if self.tokens is None:
            return most
        fits = 1
        while fits < most and self.size(widths[start : start + fits + 1]) <= self.tokens:
            fits += 1
        return fits

    def split(self, widths: Sequence[int]) -> list[range]:
        """The rows that go together, in order."""
        parts, start = [], 0
        while start < len(widths):
            end = start + self.count(widths, start)
            parts.append(range(start, end))
            start = end
        return parts

    def make_room(self, widths: Sequence[int], shortage: Shortage) -> bool:
        """After rows of these widths did not fit. Whether another try is worth it.

        Idle memory is freed. The same rows are tried once more where that could be enough, or
        where it is but one row; else half of them at once from now on. One row alone that fails
        again asks `relieve`.
        """
        if self.fixed:
            return False
        free_idle_memory()
        key = tuple(widths)
        again = key not in self._retried and (shortage.fragmented or len(widths) == 1)
        what = f"out of memory with {_examples(widths)} ({shortage.message})"
        if again:
            self._retried.add(key)
            self.retries += 1
            self.told(f"{what}; idle memory was freed, and the same was tried again")
        elif len(widths) > 1:
            self.tokens = self.size(sorted(widths, reverse=True)[: (len(widths) + 1) // 2])
            self.shrinks += 1
            self.told(f"{what}; at most {self.tokens:,} tokens at once from now on")
        elif how := self.relieve():
            self._retried.discard(key)
            self.told(f"{what}; {how}")
        else:
            return False
        return True

    def went_well(self) -> None:
        """What was tried again, and was enough, may be tried again another time."""
        self._retried.clear()


def _examples(widths: Sequence[int]) -> str:
    if len(widths) == 1:
        return f"one example of {widths[0]:,} tokens"
    return f"{len(widths)} examples of up to {max(widths):,} tokens at once"
