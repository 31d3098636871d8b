"""SVG elements, colours, and the words of a chart."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from qft.report.escaping import escaped

WIDTH = 480  # of every chart, in its own units: words stay readable at a phone's width
_SIZE = 13.0  # of words
# bright enough for a dark page, and dark enough for a light one
COLOURS = {
    "weights": "#4e79a7", "adapters": "#59b5c3", "gradients": "#5aa454", "optimizer": "#a77fc0",
    "activations": "#f28e2b", "temporary": "#e0b93f", "teacher": "#9c755f",
    "key-value cache": "#e97f92", "buffers": "#c3639b", "allocator": "#a3a8b0",
    "context": "#737b86",
}  # fmt: skip
_OTHERS = ("#2f8f83", "#b5651d", "#6c6fb3", "#8aa13c", "#c2504d", "#4aa0d8")

# names begin with q- since a drawing's rules reach the whole page that it stands in
STYLE = """
svg.q-chart{--q-ink:#1d2430;--q-soft:#667085;--q-grid:#e4e7ec;--q-back:#ffffff;
--q-one:#2f6fb3;--q-two:#d9660f;--q-bad:#c43a31;--q-good:#2e8b57;
font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans',sans-serif}
@media (prefers-color-scheme:dark){svg.q-chart{--q-ink:#e6e9ef;--q-soft:#98a2b3;--q-grid:#2c3440;
--q-back:#151a21;--q-one:#6aa9e9;--q-two:#f59a4c;--q-bad:#ff7b72;--q-good:#5cc98c}}
@media print{svg.q-chart{--q-ink:#1d2430;--q-soft:#667085;--q-grid:#e4e7ec;--q-back:#ffffff;
--q-one:#2f6fb3;--q-two:#d9660f;--q-bad:#c43a31;--q-good:#2e8b57}}
.q-chart text{fill:var(--q-soft);font-size:13px}
.q-chart .q-strong{fill:var(--q-ink);font-weight:600}
.q-chart .q-head{fill:var(--q-ink);font-weight:600;font-size:14.5px}
.q-chart .q-over{fill:var(--q-bad);font-weight:600}
.q-chart .q-limit{fill:var(--q-bad)}
.q-chart .q-grid{stroke:var(--q-grid);stroke-width:1}
.q-chart .q-axis{stroke:var(--q-soft);stroke-width:1}
"""


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour each, the same for the same category in every drawing."""
    unknown = [name for name in dict.fromkeys(names) if name not in COLOURS]
    more = {name: _OTHERS[number % len(_OTHERS)] for number, name in enumerate(unknown)}
    return COLOURS | more


def element(tag: str, content: str = "", /, **attributes: object) -> str:
    """An SVG or HTML element; attribute values are escaped, the content is markup already."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{written}>{content}</{tag}>" if content else f"<{tag}{written}/>"


def _value(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else escaped(value)


def words(x: float, y: float, text: object, kind: str = "", anchor: str = "start") -> str:
    """A line of text at a place."""
    placed = None if anchor == "start" else anchor
    return element("text", escaped(text), x=float(x), y=float(y), text_anchor=placed,
                   class_=kind or None)  # fmt: skip


def rule(x1: float, y1: float, x2: float, y2: float, kind: str, **more: object) -> str:
    """A straight line."""
    ends = {"x1": float(x1), "y1": float(y1), "x2": float(x2), "y2": float(y2)}
    return element("line", **{"class": kind, **ends, **more})


def text_width(text: str, size: float = _SIZE) -> float:
    """About as wide as a line of text will be drawn; no browser is here to ask."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return size * (0.56 * (len(text) - wide) + wide)


def clipped(text: str, width: float, size: float = _SIZE) -> str:
    """The text, cut where it would be wider."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text + "…"


Key = tuple[str, str]  # a sample of the mark as markup, 16 wide and around y = 0; what it means


def legend(
    keys: Sequence[Key], top: float, left: float = 0, width: float = WIDTH
) -> tuple[str, float]:
    """Marks with their meaning, in as many lines as they need.

    Returns:
        Its markup, and where it ends.
    """
    drawn, x, y = [], left, top + 12
    for mark, meaning in keys:
        takes = 22 + text_width(meaning) + 16
        if x > left and x + takes > WIDTH:
            x, y = left, y + 19
        drawn.append(element("g", mark, transform=f"translate({x:.1f} {y - 4:.1f})"))
        drawn.append(words(x + 22, y, meaning))
        x += takes
    return "".join(drawn), y + 8 if keys else top


def swatch(colour: str) -> str:
    """A filled square of a legend."""
    return element("rect", x=2, y=-6, width=12, height=12, rx=2, fill=colour)


def drawing(content: str, height: float, told: str, *, alone: bool = False) -> str:
    """A whole SVG.

    Args:
        told: what it shows, for those who do not see it.
        alone: a file of its own, with its rules and a background.
    """
    back = ""
    if alone:
        back = element("style", STYLE) + element(
            "rect", x=-12, y=-10, width=WIDTH + 24, height=height + 20, rx=6, fill="var(--q-back)"
        )
    edge = (-12, -10, WIDTH + 24, height + 20) if alone else (0, 0, WIDTH, height)
    box = " ".join(f"{value:.0f}" for value in edge)
    size = {"width": f"{edge[2]:.0f}", "height": f"{edge[3]:.0f}"} if alone else {}
    return element(
        "svg", back + content, xmlns="http://www.w3.org/2000/svg", viewBox=box, class_="q-chart",
        role="img", aria_label=told, **size,
    )  # fmt: skip
