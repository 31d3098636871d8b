"""What went in and what comes next: data, notes, commands, recipe, environment."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from qft.report.escaping import discreet, escaped, last_part, without_folders
from qft.report.markup import said, section, table, tag
from qft.report.numbers import short
from qft.report.story import Story, mapping, number, sequence, text

_WRITING = ("text", "chat", "instruct", "seq2seq")  # tasks whose model writes
_SHOWN = 4_000  # characters of a row
_RECIPE_CHARACTERS = 20_000


def data(story: Story) -> str:
    """How much data, and a few rows with what the loss is on."""
    counts = mapping(story.samples.get("data"))
    names = {"examples": "examples", "tokens": "tokens", "longest": "longest, tokens"}
    rows = [
        [said(part), *(f"{number(mapping(facts).get(key)) or 0:,.0f}" for key in names)]
        for part, facts in list(counts.items())[:4]
    ]
    shown = [_sample(mapping(row)) for row in sequence(story.samples.get("rows"))[:8]]
    legend = None
    if shown:
        mark = tag("mark", "Marked text")
        legend = tag("p", f"{mark} is what the loss is on; the rest is only read.", "soft")
    return section("Data", table(rows, ["part", *names.values()], "numbers"), legend, *shown)


def _sample(row: Mapping[str, Any]) -> str:
    tokens, supervised = (number(row.get(key)) or 0 for key in ("tokens", "supervised"))
    name = f"Example {number(row.get('example')) or 0:,.0f}"
    facts = [text(row.get("why"), 60), f"{tokens:,.0f} tokens"]
    label = row.get("label")
    facts.append(
        f"label {text(label, 80)}" if label is not None else f"{supervised:,.0f} supervised"
    )
    top = tag("strong", name) + escaped(" · " + " · ".join(fact for fact in facts if fact))
    pieces, left = "", _SHOWN
    for piece in sequence(row.get("pieces")):
        if left > 0 and isinstance(piece, list) and len(piece) == 2:
            pieces += _piece(text(piece[0], left), piece[1] is True)
            left -= len(str(piece[0])) + 10  # an empty piece is markup too
    cut = row.get("cut") is True or left <= 0
    more = tag("span", " … the rest is not shown", "soft") if cut else ""
    return tag("article", tag("p", top, "top") + tag("div", pieces + more, "row", dir="auto"))


def _piece(shown: str, supervised: bool) -> str:
    return tag("mark" if supervised else "span", escaped(discreet(shown)))


def notes(story: Story) -> str:
    """What a person should know."""
    found = [said(note, 600) for note in sequence(story.samples.get("notes"))[:40]]
    found += [said(note, 600) for note in sequence(story.run.get("notes"))[:40]]
    if failed := story.plan.get("failed"):
        found.append(f"This job could not be planned: {said(failed, 600)}")
    found += [f"Step {short(step)}: {said(what)}." for step, what in story.shortages[:20]]
    items = "".join(tag("li", note) for note in dict.fromkeys(found) if note)
    return section("Notes and warnings", tag("ul", items) if items else None)


def going_on(story: Story, place: str) -> str:
    """The commands that come next.

    Args:
        place: how a command names the folder.
    """
    run = shlex.quote(place)
    task = story.run.get("task") or story.recipe.get("task")
    steps = []
    if not story.finished:
        steps.append(
            ("Go on with the training", f"qft train {shlex.quote(place + '/recipe.yaml')} --resume")
        )
    else:
        steps.append(("Measure it", f"qft eval {run}"))
        if task in _WRITING:
            steps.append(("Let it write", f"qft generate {run} --prompt '…'"))
        if story.run.get("mergeable") is not False:
            merged = shlex.quote(f"{place}-merged")
            steps.append(("Merge it into its base", f"qft merge {run} --out {merged}"))
        if task in _WRITING:
            small = shlex.quote(f"{place}-gguf")
            steps.append(
                ("Export it, verified", f"qft export {run} --format gguf:q8_0 --out {small}")
            )
    items = "".join(
        tag("dt", escaped(what)) + tag("dd", tag("code", said(command, 2000)))
        for what, command in steps
    )
    return section("How to go on", tag("dl", items, "steps"))


def _recipe(story: Story) -> str:
    import yaml

    if not story.recipe:
        return without_folders(text(story.recipe_text, _RECIPE_CHARACTERS))
    written = yaml.safe_dump(last_part(story.recipe), sort_keys=False, allow_unicode=True)
    return text(written, _RECIPE_CHARACTERS)


def environment(story: Story) -> str:
    """Versions and device, and the recipe with every default."""
    run = story.run
    facts = [(key, run.get(key)) for key in ("device", "dtype", "quantize", "feature_cache")]
    facts += [(key.replace("_", " "), text(run.get(key), 16))
              for key in ("base_fingerprint", "data_fingerprint")]  # fmt: skip
    facts += list(mapping(run.get("versions")).items())[:40]
    rows = [[said(name), said(value)] for name, value in facts if value not in (None, "")]
    shown = tag("pre", escaped(_recipe(story)))
    return section(
        "Recipe and environment",
        tag("details", tag("summary", "The resolved recipe") + shown),
        tag("details", tag("summary", "Device and versions") + table(rows)) if rows else None,
    )
