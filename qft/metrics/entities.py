"""Precision, recall and F1 of named entities: a whole span with its type is right, or it is not.

Source: the CoNLL-2000 evaluation, Tjong Kim Sang & Buchholz, https://aclanthology.org/W00-0726.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Entity = tuple[int, int, str]  # first word, word after the last, type

_OPENING = ("B", "S", "U")
_CLOSING = ("E", "L", "S", "U")
_OF_AN_ENTITY = re.compile(r"[BIESLU]-.+", re.DOTALL)


def mark_entities(labels: Sequence[str]) -> bool:
    """Whether the tags are O and prefix-TYPE; numbers and parts of speech mark no entities."""
    inside = [label for label in labels if label != "O"]
    return bool(inside) and all(_OF_AN_ENTITY.fullmatch(label) for label in inside)


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities that a sentence's tags mark.

    Known are IOB1, IOB2, IOE, IOBES and BILOU; where a tag cannot follow another, an entity begins.
    """
    found: set[Entity] = set()
    start, kind, closed = 0, "", True
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        outside = tag in ("O", "")
        begins = not outside and (closed or prefix in _OPENING or name != kind)
        if not closed and (outside or begins):
            found.add((start, place, kind))
        if begins:
            start, kind = place, name
        closed = outside
        if not outside and prefix in _CLOSING:
            found.add((start, place + 1, kind))
            closed = True
    return found


def entity_scores(
    predictions: Sequence[Sequence[str]], truths: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Over all sentences together, each in [0, 1].

    Args:
        predictions: tags, one a word, sentence by sentence.
        truths: likewise, of the same lengths.

    Returns:
        ``entity_precision``, ``entity_recall``, ``entity_f1``.
    """
    right = guessed = there = 0
    for answer, truth in zip(predictions, truths, strict=True):
        if len(answer) != len(truth):
            raise ValueError("a tag a word")
        found, wanted = entities(answer), entities(truth)
        right += len(found & wanted)
        guessed += len(found)
        there += len(wanted)
    return {
        "entity_precision": right / guessed if guessed else 0.0,
        "entity_recall": right / there if there else 0.0,
        "entity_f1": 2 * right / (guessed + there) if guessed + there else 0.0,
    }
