"""`qft check`: everything about a job that can be known before its weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qft.data.preflight import counts, shown_example
from qft.errors import printable
from qft.files import free_disk_bytes
from qft.inputs import Inputs, open_inputs
from qft.progress import QUIET, Reporter, human_bytes
from qft.readiness import make_ready
from qft.recipe import Recipe

if TYPE_CHECKING:
    from rich.text import Text

SHOWN_ROWS = 3


def check(recipe: Recipe, *, reporter: Reporter = QUIET) -> dict[str, Any]:
    """Checks data, template, masks, model and disk of a recipe; loads no weight.

    Returns:
        `model` (class, parameters, trained parameters), `data` (counts a part), `rows` (what
        `qft.data.preflight.shown_example` says of the first few), `notes`, `free_disk_bytes`.

    Raises:
        QftError: the training would be refused; the error is the one `train` would raise.
    """
    inputs = open_inputs(recipe, reporter)
    parts = {"train": inputs.train, **({"eval": inputs.held_out} if inputs.held_out else {})}
    return {
        "model": _model_facts(recipe, inputs),
        "data": {name: counts(part) for name, part in parts.items()},
        "rows": [
            shown_example(example, inputs.tokenizer)
            for example in inputs.train.examples[:SHOWN_ROWS]
        ],
        "notes": inputs.notes,
        "free_disk_bytes": free_disk_bytes(_existing(Path(recipe.output))),
    }


def _model_facts(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    ready = make_ready(recipe, inputs)
    dtype = str(ready.spec.dtype).removeprefix("torch.")
    return {
        "class": type(ready.skeleton).__name__,
        "parameters": sum(p.numel() for p in ready.skeleton.parameters()),
        "base": ready.held if ready.held != "none" else dtype,
        "trained_parameters": ready.trained_parameters,
    }


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def lines(report: dict[str, Any]) -> list[Text]:
    """The report for a terminal: supervised text is green, and in brackets for those without."""
    from rich.text import Text

    shown: list[Text] = []
    for number, row in enumerate(report["rows"], start=1):
        shown.append(Text(
            f"row {number}: {row['tokens']} tokens, the loss is on {row['supervised']} "
            "(green, in ⟦brackets⟧)", style="bold",
        ))  # fmt: skip
        line = Text()
        for text, supervised in row["pieces"]:
            text = printable(text)
            line.append(f"⟦{text}⟧" if supervised else text, "green" if supervised else "dim")
        shown += [line, Text(f"label ids: {_shortened(row['labels'])}"), Text()]
    for name, facts in report["data"].items():
        amounts = ", ".join(f"{count:,} {what}" for what, count in facts.items())
        shown.append(Text(f"{name}: {amounts}"))
    facts = report["model"]
    share = facts["trained_parameters"] / max(1, facts["parameters"])
    shown.append(Text(
        f"model: {facts['class']}, {facts['parameters']:,} parameters in {facts['base']}, "
        f"{facts['trained_parameters']:,} train ({share:.2%})"
    ))  # fmt: skip
    shown.append(Text(f"disk: {human_bytes(report['free_disk_bytes'])} free for the output"))
    return [*shown, Text("This data can be trained on.", style="bold green")]


def _shortened(ids: list[int], length: int = 24) -> str:
    more = f" … ({len(ids)} in all)" if len(ids) > length else ""
    return " ".join(map(str, ids[:length])) + more
