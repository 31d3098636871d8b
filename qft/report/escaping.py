"""What a run says, made harmless before it is shown: markup, control characters, paths, secrets."""

from __future__ import annotations

import html
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

_JOINERS = "\u200c\u200d"  # invisible, and part of how Persian, Hindi and emoji are written
# what a hub, a code host or a model service hands out
_SECRET = re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|xox[abp]-|AKIA)[A-Za-z0-9_-]{12,}")
_IN_ADDRESS = re.compile(r"(?<=://)[^\s/@:]+(?::[^\s/@]*)?@")
_HOMES = re.compile(r"(?:/home|/Users|[A-Za-z]:\\Users)[/\\][^/\\\s\"']+|/root(?=[/\s\"']|$)")
_ROOTED = re.compile(r"(?<![^\s\"'=:,\[({])/(?:[^/\s\"',\])}]+/)+(?=[^/\s\"',\])}])")


def escaped(text: object) -> str:
    """Text for HTML or SVG, in an element or an attribute."""
    return html.escape(visible(str(text)))


def visible(text: str) -> str:
    """Control characters as signs that can be seen; what turns the writing direction as well.

    Some would not be legal in a page, and some would make it read as what it is not.
    """
    return "".join(c if c in "\n\t" or _harmless(c) else _sign(c) for c in text)


def _harmless(character: str) -> bool:
    if character.isprintable() or character in _JOINERS:
        return True
    return unicodedata.category(character) == "Zs"  # spaces of other widths


def _sign(character: str) -> str:
    number = ord(character)
    if number < 0x20:
        return chr(0x2400 + number)  # ␀ ␁ …
    return f"⟨{number:04X}⟩"


def discreet(text: str) -> str:
    """Without access tokens and without the home folder of whoever ran it."""
    for name, value in os.environ.items():
        if name.endswith(("TOKEN", "API_KEY", "PASSWORD", "SECRET")) and len(value) >= 8:
            text = text.replace(value, "[hidden]")
    text = _IN_ADDRESS.sub("[hidden]@", _SECRET.sub("[hidden]", text))
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(rf"{re.escape(home)}(?=[/\\\s\"']|$)", "~", text)
    return text


def without_folders(text: str) -> str:
    """Absolute paths shortened to their last part: `/data/mine/rows.jsonl` to `…/rows.jsonl`."""
    shortened = _ROOTED.sub("…/", _HOMES.sub("~", text))
    return re.sub(r"~[/\\](?:[^/\\\s\"',\])}]+[/\\])+", "…/", discreet(shortened))


def last_part(value: Any) -> Any:
    """The same for all texts of a recipe: one that is a whole path is cut even at its spaces."""
    if isinstance(value, dict):
        return {str(key): last_part(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [last_part(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~", "\\")) or re.match(r"[A-Za-z]:[/\\]", value):
        return discreet("…/" + re.split(r"[/\\]", value.rstrip("/\\"))[-1])
    return without_folders(value)
