"""More rows of few: words masked, put in, replaced, left out or swapped, at random.

Source: Wei & Zou 2019, https://arxiv.org/abs/1901.11196. Only training rows are ever changed, and
the rows themselves stay beside their copies.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from qft.data.examples import NumberedRow
from qft.recipe import Augment


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
    words = sorted({word for _, row in rows for c in columns for word in str(row[c]).split()})
    generator = random.Random(seed)
    made: list[NumberedRow] = []
    for number, row in rows:
        made.append((number, row))
        for _ in range(settings.copies):
            changed: Mapping[str, Any] = {
                c: _change(str(row[c]), settings, words, mask_token, generator) for c in columns
            }
            made.append((number, {**row, **changed}))
    return made


def _change(
    text: str,
    settings: Augment,
    words: Sequence[str],
    mask_token: str | None,
    generator: random.Random,
) -> str:
    # a script without spaces has no words to be had so; its characters take their place
    spaced = " " in text.strip()
    parts = text.split() if spaced else list(text)
    kept: list[str] = []
    for part in parts:
        draw = generator.random
        if draw() < settings.delete and len(parts) > 1:
            continue
        if draw() < settings.mask:
            part = mask_token or ""
        elif draw() < settings.replace:
            part = _another(words, spaced, generator)
        kept.append(part)
        if draw() < settings.insert:
            kept.append(_another(words, spaced, generator))
    for place in range(len(kept) - 1):
        if generator.random() < settings.swap:
            kept[place], kept[place + 1] = kept[place + 1], kept[place]
    kept = [part for part in kept if part] or parts[:1]
    return (" " if spaced else "").join(kept)


def _another(words: Sequence[str], spaced: bool, generator: random.Random) -> str:
    word = generator.choice(words)
    return word if spaced else generator.choice(word)
