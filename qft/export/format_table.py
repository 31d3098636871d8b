"""The formats there are: what runs each, what it may lose, whether its rounding fits to rows."""

from __future__ import annotations

from typing import Any

from qft.export.formats import FORMATS, fits_to_rows, fitted_unasked
from qft.verification.thresholds import THRESHOLDS


def format_table() -> list[dict[str, Any]]:
    """A row a format.

    ``mean_kl`` is what it may lose at most, in nats a position; ``fitted`` is ``always`` where
    rounding is fitted to rows unless the user says otherwise, ``asked`` where only then, else
    ``never``.
    """
    return [
        {
            "name": name,
            "runs_in": text,
            "mean_kl": THRESHOLDS[name].mean_kl,
            "fitted": _fitted(name),
        }
        for name, text in FORMATS.items()
    ]


def _fitted(name: str) -> str:
    if not fits_to_rows(name):
        return "never"
    return "always" if fitted_unasked(name) else "asked"
