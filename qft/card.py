"""`qft.json` beside an adapter: what it was trained for, and on which base.

PEFT's own files do not say the task, the classes, the pooling or how the base was quantized; a
folder without this card (PEFT wrote it elsewhere) opens all the same, with those told by the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qft.errors import AdapterError
from qft.files import read_json, write_json

CARD = "qft.json"


def make_card(
    *,
    base: str,
    base_fingerprint: str,
    original_fingerprint: str | None,
    task: str,
    labels: tuple[str, ...] | None,
    pooling: str,
    quantize: str,
    dtype: str,
    strategy: Mapping[str, Any],
    max_length: int,
    labels_are: str = "one",
) -> dict[str, Any]:
    """The card's content.

    Args:
        base: hub id, or the folder's absolute path.
        base_fingerprint: from :func:`qft.models.fingerprint`.
        original_fingerprint: of the model a base stored quantized was made from, where it says so.
        max_length: the longest sequence it trained on, in tokens.
    """
    return {
        "format": 1,
        "task": task,
        "labels": list(labels) if labels else None,
        "labels_are": labels_are,
        "pooling": pooling,
        "base": base,
        "base_fingerprint": base_fingerprint,
        "original_fingerprint": original_fingerprint,
        "quantize": quantize,
        "dtype": dtype,
        "max_length": max_length,
        "strategy": dict(strategy),
    }


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Writes the card into an adapter folder."""
    write_json(folder / CARD, dict(card))


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card of an adapter folder, or None where it has none.

    Raises:
        AdapterError: it is there and cannot be read.
    """
    path = folder / CARD
    if not path.is_file():
        return None
    try:
        values = read_json(path)
        if values["format"] != 1:
            raise ValueError("not a card of format 1")
        for key in ("base", "base_fingerprint", "task", "pooling", "quantize", "dtype"):
            if not isinstance(values[key], str):
                raise ValueError(f"{key} is no text")
        if not isinstance(values["strategy"], dict):
            raise ValueError("strategy is no mapping")
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError("The adapter's card cannot be read.", where=path, found=error) from None
    return dict(values)
