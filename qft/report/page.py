"""The page of a run: one file, no network, no script, and a policy that forbids both."""

from __future__ import annotations

import os
from pathlib import Path

from qft.errors import RecipeError
from qft.files import write_text
from qft.report import outcome, particulars
from qft.report.drawing import STYLE
from qft.report.escaping import escaped
from qft.report.heading import head, title_of
from qft.report.story import Story, read_story
from qft.report.style import PAGE

REPORT = "report.html"
# even if something hostile came through: nothing runs, loads, or is sent anywhere
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)


def write_report(folder: Path, out: Path | None = None, *, samples: bool = True) -> Path:
    """Writes the page of a run, finished or not.

    Args:
        folder: of the run.
        out: the file to write; None is report.html in the run folder.
        samples: whether rows of the data are shown.

    Returns:
        The file.

    Raises:
        RecipeError: this is no run folder.
        SaveError: the file cannot be written.
    """
    story = read_story(folder)
    path = folder / REPORT if out is None else out
    if path.is_dir():
        raise RecipeError("The page is a file, and this is a folder.", where=path,
                          fix=f"--out {path / REPORT}")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page_of(story, _place(folder), samples=samples))
    return path


def page_of(story: Story, place: str, *, samples: bool = True) -> str:
    """The whole page.

    Args:
        place: how a command names the run folder.
        samples: whether rows of the data are shown.
    """
    body = [
        head(story),
        outcome.training(story),
        outcome.memory(story),
        outcome.metrics(story),
        particulars.data(story) if samples else "",
        particulars.notes(story),
        particulars.going_on(story, place),
        particulars.environment(story),
    ]
    title = escaped(f"{title_of(story)} · qft report")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{title}</title>\n<style>{PAGE}{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _place(folder: Path) -> str:
    """The folder as a command from here would name it, without what lies above."""
    name, here = folder.resolve().name, Path.cwd()
    if Path.home().is_relative_to(here):  # the way down from here would tell whose home it is
        return name
    try:
        shown = os.path.relpath(folder)
    except ValueError:
        return name
    return name if shown.startswith(("..", "~")) or shown == "." else shown
