"""The proof that goes with a delivered model, and what it says of the loss."""

from __future__ import annotations

import math
from typing import Any

from qft.data.tasks import ExampleSet
from qft.export.beside import BesideSubject, locate_beside
from qft.export.delta_rounding import DeltaRounding
from qft.export.right_base import BESIDE, BaseChoice
from qft.export.writers import ExportReport
from qft.progress import Reporter
from qft.verification.adapter_file import APART, AdapterFile
from qft.verification.proof import prove
from qft.verification.subject import Subject, locate
from qft.verification.verify import FILE


def artefact_of(
    choice: BaseChoice | None, written: ExportReport, reference: Subject, strategy: str | None
) -> Subject:
    """What an export wrote, located as its users find it."""
    if written.format.startswith(APART):
        return AdapterFile.of(reference, written.path)
    if choice is not None and choice.onto == BESIDE:
        return locate_beside(written.path, strategy)
    return locate(written.path, task=reference.spec.task)


def proven(
    reference: Subject,
    artefact: Subject,
    rows: ExampleSet,
    format: str,
    report: dict[str, Any],
    reporter: Reporter,
) -> dict[str, Any]:
    """Compares reference and artefact; writes verification.json; raises past the thresholds."""
    also = {key: report[key] for key in ("base", "delta_rounding") if report.get(key)}
    home = artefact.home.parent if isinstance(artefact, BesideSubject) else artefact.home
    found = prove(reference, artefact, rows, format=format, file=home / FILE, also=also,
                  reporter=reporter)  # fmt: skip
    return {"verification": found, "loss": _losses(found)}


def _losses(verification: dict[str, Any]) -> dict[str, float] | None:
    """Mean loss of the held-out labels, of reference and result."""
    both = {
        "reference": verification["perplexity_reference"],
        "result": verification["perplexity"],
    }
    if any(value is None for value in both.values()):
        return None
    return {key: math.log(value) for key, value in both.items()}


def say_losses(
    rounding: DeltaRounding | None, loss: dict[str, float] | None, reporter: Reporter
) -> None:
    """One line: what was lost of the change, and what it cost."""
    parts = [rounding.text()] if rounding is not None else []
    if loss is not None:
        parts.append(f"loss {loss['result']:.4f}, of the reference {loss['reference']:.4f}")
    if parts:
        reporter.say("; ".join(parts))
