"""The head of the page: what was trained on what, how it ended, and a few figures."""

from __future__ import annotations

from datetime import UTC, datetime

from qft.report.escaping import escaped, without_folders
from qft.report.figures import key_figures
from qft.report.markup import said, tag
from qft.report.numbers import short
from qft.report.story import Story, mapping, number, text


def head(story: Story) -> str:
    """What was trained on what, how it ended, and the figures everyone asks for."""
    cards = "".join(
        tag("div", tag("dt", escaped(name)) + tag("dd", escaped(value)))
        for name, value in key_figures(story).items()
    )
    state = "finished" if story.finished else "not finished"
    return tag(
        "header",
        tag("p", f"qft report · {said(story.name)} {tag('span', state, _pill(story))}", "over")
        + tag("h1", escaped(title_of(story)))
        + tag("p", result_of(story), "result")
        + tag("p", escaped(_when(story)), "soft")
        + (tag("dl", cards, "cards") if cards else ""),
    )


def _pill(story: Story) -> str:
    return "pill good" if story.finished else "pill open"


def title_of(story: Story) -> str:
    """Strategy, base and task."""
    strategy = mapping(story.run.get("strategy") or story.recipe.get("strategy"))
    name = text(strategy.get("name") or story.recipe.get("strategy"), 40) or "a training"
    base = text(story.run.get("base") or story.recipe.get("model"), 400).rstrip("/")
    base = text(base.rsplit("/", 1)[-1], 80)
    task = text(story.run.get("task") or story.recipe.get("task"), 40)
    held = text(story.run.get("quantize") or story.recipe.get("quantize"), 20)
    quantized = f" in {held}" if held and held != "none" else ""
    title = f"{name} on {base or 'a model'}{quantized}" + (f", task {task}" if task else "")
    return without_folders(title)


def result_of(story: Story) -> str:
    """One sentence."""
    lost = next((step for step, y in story.series("loss") if y is None), None)
    if lost is not None:
        return tag("strong", f"The loss was no longer a finite number at step {short(lost)}.")
    ending = "" if story.finished else f" It has come to step {story.steps} so far."
    for name, points in (("held-out", story.held_out.get("loss", [])),
                         ("training", story.series("loss"))):  # fmt: skip
        finite = [(step, y) for step, y in points if y is not None]
        if len(finite) < 2:
            continue
        (start, first), (end, last) = finite[0], finite[-1]
        went = "fell" if last < first else "rose" if last > first else "stayed"
        numbers = f"from {tag('strong', short(first))} at step {short(start)} to "
        numbers += f"{tag('strong', short(last))} at step {short(end)}"
        return f"The {name} loss {went} {numbers}.{ending}"
    loss = number(mapping(story.run.get("metrics")).get("loss"))
    if loss is not None:
        return f"The held-out loss is {tag('strong', short(loss))} after {story.steps} steps."
    return f"{story.steps} steps.{ending}" if story.steps else "Nothing has been logged yet."


def _when(story: Story) -> str:
    times = [y for _, y in story.series("time") if y is not None and 0 < y < 2**33]
    parts = []
    if times:
        parts.append(datetime.fromtimestamp(times[-1], UTC).strftime("%d %B %Y, %H:%M UTC"))
    parts.append(f"{story.steps:,} steps")
    if tokens := number(story.training.get("tokens")) or story.last("tokens"):
        parts.append(f"{tokens:,.0f} tokens")
    device = " ".join(text(story.run.get(key), 40) for key in ("device", "dtype")).strip()
    return " · ".join([*parts, *([device] if device else [])])
