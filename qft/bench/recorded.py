"""Commands whose runs go into the ledger; see `qft.bench.ledger`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from qft.recipe import Recipe

Ledger = Annotated[
    Path | None,
    typer.Option(help="Where the record of this command goes; else QFT_LEDGER; off: nowhere."),
]


class RecordedCommand(TyperCommand):
    """A command that leaves a record; the option `ledger`, where it has one, says where."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command within a recording."""
        from qft.bench.flags import settings_of_command, source_of_command
        from qft.bench.ledger import recording

        verb = _verb_of(ctx)
        settings = settings_of_command(verb, ctx.params)
        noted = source_of_command(ctx.params) | ({"settings": settings} if settings else {})
        if "dtype" in settings:
            noted["dtype"] = settings["dtype"]
        with recording(verb, noted, ctx.params.get("ledger")) as open_one:
            open_one.written = _whose_size(verb, ctx.params)
            return super().invoke(ctx)


# the word of a command that names what is weighed; a training's is known when it is done
_WEIGHED = {"merge": "out", "export": "out", "prune": "out", "verify": "artefact"}


def _whose_size(verb: str, words: dict[str, Any]) -> Path | None:
    place = words.get(_WEIGHED.get(verb, ""))
    return Path(place) if place else None


def follow(recipe: Recipe) -> None:
    """Has the record of the command at hand name this recipe."""
    if (recording := _recording()) is not None:
        recording.recipe = recipe


def made(place: Path) -> None:
    """Has the record of the command at hand tell the size of this file or folder."""
    if (recording := _recording()) is not None:
        recording.written = place


def leave_no_record() -> None:
    """Of a command that turns out to do no work."""
    if (recording := _recording()) is not None:
        recording.kept = False


def _recording() -> Any:
    from qft.bench.ledger import current

    return current()


def _verb_of(ctx: Any) -> str:
    """``bench step`` of ``qft bench step``, whatever the program is called."""
    words: list[str] = []
    while ctx.parent is not None:
        words.insert(0, str(ctx.info_name))
        ctx = ctx.parent
    return " ".join(words)
