"""HTML of small things: an element, a table, a section, a text of the run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qft.report.escaping import escaped, without_folders
from qft.report.story import text


def tag(name: str, content: str, kind: str = "", **attributes: str) -> str:
    """An HTML element; the content is markup already."""
    more = "".join(f' {key.rstrip("_")}="{escaped(value)}"' for key, value in attributes.items())
    kind = f' class="{kind}"' if kind else ""
    return f"<{name}{kind}{more}>{content}</{name}>"


def said(value: object, length: int = 300) -> str:
    """A short text of the run, escaped and without secrets or folders."""
    return escaped(without_folders(text(value, length)))


def section(title: str, *parts: str | None) -> str:
    """A part of the page with its heading; nothing where all of it is."""
    content = "".join(part for part in parts if part)
    anchor = re.sub(r"[^a-z]+", "-", title.lower())
    return tag("section", tag("h2", escaped(title)) + content, id=anchor) if content else ""


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), kind: str = "") -> str:
    """Cells are markup already; the first of a row is its name."""
    top = "".join(tag("th", cell, scope="col") for cell in head)
    body = "".join(
        tag("tr", tag("th", row[0], scope="row") + "".join(tag("td", c) for c in row[1:]))
        for row in rows
    )
    if not body:
        return ""
    whole = (tag("thead", tag("tr", top)) if top else "") + tag("tbody", body)
    return tag("div", tag("table", whole, kind), "wide")
