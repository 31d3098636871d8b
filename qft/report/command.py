"""The verb `qft report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="A run folder; it need not be finished.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Else report.html in the run folder.")
    ] = None,
    no_samples: Annotated[
        bool, typer.Option("--no-samples", help="Without rows of the data: to show it to others.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what --out names.")
    ] = False,
) -> None:
    """Write a run as one HTML page: loss, memory, throughput, data, metrics, environment."""
    from qft.files import require_absent
    from qft.report.page import write_report

    if out is not None:
        require_absent(out, overwrite=overwrite)
    print(write_report(run, out, samples=not no_samples))
