"""More rows of few: words masked, put in, replaced, left out or swapped, at random.

Source: Wei & Zou 2019, https://arxiv.org/abs/1901.11196. Only training rows are ever changed, and
the rows themselves stay beside their copies.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qft.data.examples import NumberedRow
from qft.recipe import Augment
from qft.scripts import UNSPACED

# their punctuation too
_CHARACTER = re.compile(rf"{UNSPACED.pattern}|[\u3001-\u303f\uff00-\uff65]")
_CHARACTERS = re.compile(f"({_CHARACTER.pattern})")


def augmented(
    rows: Sequence[NumberedRow],
    columns: Sequence[str],
    settings: Augment,
    *,
    seed: int,
    mask_token: str | None,
) -> list[NumberedRow]:
    """The rows, each followed by its changed copies under its own number.

    Args:
        columns: those that hold the texts.
        seed: the same seed gives the same copies.
        mask_token: what a masked word becomes; without one it is left out.
    """
    if not settings.copies:
        return list(rows)
    found = {part.text for _, row in rows for c in columns for part in _parts(str(row[c]))}
    pool = {kind: sorted(text for text in found if _Part(text).is_character is kind)
            for kind in (False, True)}  # fmt: skip
    generator = random.Random(seed)
    made: list[NumberedRow] = []
    for number, row in rows:
        made.append((number, row))
        for _ in range(settings.copies):
            changed: Mapping[str, Any] = {
                c: _change(str(row[c]), settings, pool, mask_token, generator) for c in columns
            }
            made.append((number, {**row, **changed}))
    return made


@dataclass(frozen=True)
class _Part:
    """A word, or a character of a script without spaces; and whether a space stood before it."""

    text: str
    spaced: bool = False

    @property
    def is_character(self) -> bool:
        return bool(_CHARACTER.fullmatch(self.text))


def _parts(text: str) -> list[_Part]:
    """A text as what is masked, moved and left out; Han is had by character wherever it stands."""
    return [
        _Part(piece, spaced=first and number > 0)
        for number, word in enumerate(text.split())
        for first, piece in _pieces(word)
    ]


def _pieces(word: str) -> list[tuple[bool, str]]:
    pieces = [piece for piece in _CHARACTERS.split(word) if piece]
    return [(place == 0, piece) for place, piece in enumerate(pieces)]


def _join(parts: Sequence[_Part]) -> str:
    """With the spaces there were, and one between words that would run together."""
    text = ""
    for before, part in zip([None, *parts], parts, strict=False):
        words = before is not None and not before.is_character and not part.is_character
        text += (" " if text and (part.spaced or words) else "") + part.text
    return text


def _change(
    text: str,
    settings: Augment,
    pool: Mapping[bool, Sequence[str]],
    mask_token: str | None,
    generator: random.Random,
) -> str:
    """A changed copy; what is put in is a word beside a word and a character beside one."""
    parts = _parts(text)
    kept: list[_Part] = []
    for part in parts:
        draw = generator.random
        kind = part.is_character
        if draw() < settings.delete and len(parts) > 1:
            continue
        if draw() < settings.mask:
            part = _Part(mask_token or "", part.spaced)
        elif draw() < settings.replace:
            part = _Part(generator.choice(pool[kind]), part.spaced)
        kept.append(part)
        if draw() < settings.insert:
            kept.append(_Part(generator.choice(pool[kind])))
    for place in range(len(kept) - 1):
        if generator.random() < settings.swap:
            kept[place], kept[place + 1] = kept[place + 1], kept[place]
    return _join([part for part in kept if part.text] or parts[:1])
