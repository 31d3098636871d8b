"""`qft.merge` and `qft.export`: from a run to a model others can use, and the proof that it works.

The proof compares two models on held-out rows: the reference is the adapter on the base *as
training saw it*, the artefact is read back from the disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qft import models
from qft.adapter_folder import AdapterFolder
from qft.calibration import Calibration
from qft.data.tasks import ExampleSet
from qft.errors import QftError, RecipeError
from qft.export.beside import beside_bytes, write_beside
from qft.export.calibration import calibration_for
from qft.export.delta_rounding import DeltaRounding
from qft.export.formats import require_known, write_format
from qft.export.place import proven_first, require_place
from qft.export.proven import artefact_of, proven, say_losses
from qft.export.right_base import (
    BESIDE,
    BaseChoice,
    choose_base,
    choose_for_bnb,
    choose_plain,
    is_stored_quantized,
    may_measure,
    require_word,
    rounding_of,
)
from qft.export.writers import ExportReport
from qft.held_out import recipe_of
from qft.merging.merge import open_source, write_model
from qft.merging.tensors import MergedTensors
from qft.merging.together import combine_folders, listed, located
from qft.pooling import CONFIG_KEY, resolve_pooling
from qft.progress import QUIET, Reporter, human_bytes
from qft.verification.adapter_file import APART, require_adapter
from qft.verification.proof import rows_of
from qft.verification.stops import complete_stops, needed_stops
from qft.verification.subject import Subject, locate, of_adapter

_STORED_AS = {"bfloat16": "safetensors:bf16", "float16": "safetensors:fp16"}


def merge(
    source: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    base: str | None = None,
    onto: str = "auto",
    dtype: str | None = None,
    verify: bool = False,
    data: str | None = None,
    strategy: str | None = None,
    combine: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    reporter: Reporter = QUIET,
) -> dict[str, Any]:
    """Folds an adapter, or several together, into the base, streamed block by block of rows.

    Args:
        source: a run, a checkpoint or an adapter folder; or several, of one base and task.
        out: the model folder to write.
        base: the base model, where it is not where the adapter remembers it.
        onto: ``original``, ``dequantized`` (what training saw of a quantized base), or ``auto``:
            whichever measures better on held-out rows.
        dtype: ``bfloat16``, ``float16`` or ``float32``; None keeps the base's.
        verify: compare with the adapter model on held-out rows.
        data: those rows; a run knows its own.
        strategy: a third party's strategy, by name.
        combine: how several become one: see :func:`qft.merging.together.located`; with
            ``adapter_only`` their adapter is written, and no model.
        overwrite: replace what ``out`` holds; with ``verify`` only once the new one is proven.

    Returns:
        What was written; ``base``: which one was taken, why, and the losses that were measured;
        with ``verification`` where it was asked for.

    Raises:
        VerificationError: the merged model is not the trained one; it stays in ``out`` to look at.
        QftError: anything else qft can explain; nothing is left half-written.
    """
    if dtype is not None and dtype not in models.DTYPES:
        raise RecipeError(
            "No such dtype.", where="--dtype", found=dtype, fix=", ".join(models.DTYPES)
        )
    require_word(onto)
    chosen = dict(combine or {})
    if chosen.pop("adapter_only", False):
        return combine_folders(source, out, chosen, base=base, strategy=strategy,
                               overwrite=overwrite, reporter=reporter)  # fmt: skip
    with located(source, out, chosen, base=base, strategy=strategy) as found:
        reference = of_adapter(found, str(listed(source)[0]))
        require_place(reference, Path(out), overwrite)
        rows = _rows(reference, data, "without --verify") if verify else None
        choice = _choice(reference, found, onto, rows, data, reporter)
        tensors = _open(found, models.DTYPES[dtype] if dtype else None, choice)
        return _merge(reference, tensors, choice, rows, Path(out), overwrite, reporter)


def _merge(
    reference: Subject,
    tensors: MergedTensors,
    choice: BaseChoice,
    rows: ExampleSet | None,
    out: Path,
    overwrite: bool,
    reporter: Reporter,
) -> dict[str, Any]:
    """Writes the merged model, and compares it where there are rows."""
    report: dict[str, Any] = {"out": str(out), "base": choice.to_dict()}
    with proven_first(out, overwrite and rows is not None) as target:
        with reporter.bar("merge", tensors.total_bytes()) as bar:
            written = write_model(tensors, target, overwrite=overwrite, progress=bar.advance)
        tensors.close()
        complete_stops(reference, target)
        changed, count = len(tensors.changed), len(tensors.names())
        report |= {"bytes": written, "tensors": count, "changed": changed}
        reporter.say(f"merged: {changed} of {count} tensors changed, "
                     f"{human_bytes(written)} in {target}")  # fmt: skip
        if rows is not None:
            stored = str(_stored_dtype(tensors)).removeprefix("torch.")
            format = _STORED_AS.get(stored, "safetensors:fp32")
            artefact = locate(target, task=reference.spec.task)
            report |= proven(reference, artefact, rows, format, report, reporter)
    return report


def export(
    source: str | Path,
    out: str | Path,
    *,
    format: str,
    base: str | None = None,
    onto: str = "auto",
    fuse: bool = False,
    verify: bool = True,
    data: str | None = None,
    calibrate: bool | None = None,
    calibration_data: str | None = None,
    calibration_rows: int = 128,
    strategy: str | None = None,
    overwrite: bool = False,
    reporter: Reporter = QUIET,
) -> dict[str, Any]:
    """Writes a model in another format, straight from base and adapter, and checks the result.

    Args:
        source: a run, an adapter, or a model folder.
        out: the folder to write.
        format: a key of ``qft.export.FORMATS``.
        onto: as for :func:`merge`. A bnb format quantizes original and change together; where only
            a quantized base is at hand, that is kept byte for byte, with the adapter beside it.
        fuse: for a bnb format: quantize the dequantized base with the change in it; verified
            always.
        verify: open the result and compare it with the model it was made from.
        data: rows to compare on; a run knows its own.
        calibrate: fit the rounding to rows; None does so where the format gains much by it and
            there are rows.
        calibration_data: those rows; a run takes its own training rows.
        calibration_rows: at most so many of them.

    Returns:
        What was written; ``base`` as for :func:`merge`; ``delta_rounding``: what a bnb format left
        of the adapter's change (:mod:`qft.export.delta_rounding`); ``loss`` of the reference and
        the result.

    Raises:
        VerificationError: the exported model lost more than its format may lose.
        QftError: anything else qft can explain; nothing is left half-written.
    """
    require_known(format)
    require_word(onto)
    if fuse:
        _require_fusible(format, verify)
    reference = locate(source, base=base, strategy=strategy)
    require_place(reference, Path(out), overwrite)
    rows = _rows(reference, data, "--no-verify") if verify else None
    calibration = calibration_for(
        reference, format, calibrate, calibration_data, calibration_rows, reporter
    )
    choice = _export_choice(reference, format, onto, fuse, rows, data, reporter)
    with proven_first(Path(out), overwrite and verify) as target:
        written = _write(reference, choice, format, target, calibration, overwrite, reporter)
        beside = choice is not None and choice.onto == BESIDE
        complete_stops(reference, target / "base" if beside else target)
        reporter.say(f"{format}: {human_bytes(written.bytes)} in {written.path}")
        notes = [*written.notes, *([_fused(written.delta_rounding)] if fuse else [])]
        for note in notes:
            reporter.say(f"note: {note}")
        report = {**asdict(written), "path": str(Path(out) / written.path.relative_to(target)),
                  "notes": notes, "base": choice and choice.to_dict()}  # fmt: skip
        if rows is not None:
            artefact = artefact_of(choice, written, reference, strategy)
            report |= proven(reference, artefact, rows, format, report, reporter)
        say_losses(written.delta_rounding, report.get("loss"), reporter)
    return report


def _require_fusible(format: str, verify: bool) -> None:
    if not format.startswith("bnb:"):
        raise RecipeError("--fuse is for the bnb formats, which round again.", where="--fuse",
                          found=format, fix="--base dequantized")  # fmt: skip
    if not verify:
        raise RecipeError("What --fuse makes is always verified.", where="--fuse",
                          found="--no-verify", fix="leave one of them out")  # fmt: skip


def _fused(rounding: DeltaRounding | None) -> str:
    """The warning that goes with a result of ``fuse``."""
    figures = f": {rounding.text()}" if rounding is not None else ""
    return (
        "--fuse has rounded the adapter with weights that sit on the grid already, where a small "
        f"change snaps back{figures}. Without --fuse nothing of it is lost"
    )


def _export_choice(
    reference: Subject,
    format: str,
    onto: str,
    fuse: bool,
    rows: ExampleSet | None,
    data: str | None,
    reporter: Reporter,
) -> BaseChoice | None:
    """Which base an export is made from.

    None is a model without an adapter, as it is stored, or an adapter without its base.
    """
    found = reference.adapter
    if format.startswith(APART):
        require_adapter(reference, onto)
        return None
    if found is None:
        return choose_plain(reference.folder, format, onto, fuse)
    if not format.startswith("bnb:"):
        return _choice(reference, found, onto, rows, data, reporter)
    choice = choose_for_bnb(found, format.removeprefix("bnb:"), onto, fuse)
    choice.say(reporter)
    return choice


def _choice(
    reference: Subject,
    found: AdapterFolder,
    onto: str,
    rows: ExampleSet | None,
    data: str | None,
    reporter: Reporter,
) -> BaseChoice:
    """Which base to merge into, measured where there are two and held-out rows."""
    if not may_measure(found, onto):
        rows = None
    elif rows is None and (data is not None or recipe_of(Path(reference.source)) is not None):
        rows = _rows_to_choose_by(reference, data)
    choice = choose_base(found, onto, rows, reporter)
    choice.say(reporter)
    return choice


def _rows_to_choose_by(reference: Subject, data: str | None) -> ExampleSet | None:
    """Those that were named, or the run's own; None of a run whose rows are not to be had."""
    try:
        return _rows(reference, data, "--base original")
    except QftError:
        if data is not None:
            raise
        return None


def _write(
    reference: Subject,
    choice: BaseChoice | None,
    format: str,
    target: Path,
    calibration: Calibration | None,
    overwrite: bool,
    reporter: Reporter,
) -> ExportReport:
    found = reference.adapter
    if found is not None and choice is not None and choice.onto == BESIDE:
        with reporter.bar(f"export {format}", beside_bytes(found)) as bar:
            size = write_beside(found, target, overwrite=overwrite, progress=bar.advance)
        return ExportReport(format, target, size, delta_rounding=DeltaRounding(0.0, 1.0))
    if found is not None and choice is not None:
        # rounded once, to the format's own numbers; these keep the base's dtype beside them
        keeps = format.startswith(("bnb:", "compressed-tensors:", "torchao:"))
        tensors = _open(found, None if keeps else torch.float32, choice)
    elif found is not None:
        tensors = _open(found, None, None)
    else:
        tensors = _open_plain(reference)
    with reporter.bar(f"export {format}", tensors.total_bytes()) as bar:
        written = write_format(tensors, format, target, calibration=calibration,
                               overwrite=overwrite, progress=bar.advance,
                               stops=needed_stops(reference))  # fmt: skip
    tensors.close()
    return written


def _open_plain(reference: Subject) -> MergedTensors:
    """A model as it is stored; an encoder without a head says how a text becomes one vector."""
    folder = reference.folder
    skeleton = models.open_skeleton(folder, reference.spec)
    tensors = open_source(folder, skeleton)
    if reference.spec.task == "embed":
        kind = resolve_pooling("auto", folder, skeleton.config)
        tensors.config = {**tensors.config, CONFIG_KEY: kind}
    return tensors


def _open(
    found: AdapterFolder, dtype: torch.dtype | None, choice: BaseChoice | None
) -> MergedTensors:
    skeleton = models.open_skeleton(found.base, found.spec())
    rounding = None
    if choice is not None and choice.onto == "dequantized" and not is_stored_quantized(found.base):
        rounding = rounding_of(found, skeleton)
    tensors = open_source(
        found.base, skeleton, adapter=found.folder, strategy=found.strategy, dtype=dtype,
        rounding=rounding,
    )  # fmt: skip
    tensors.config = {**tensors.config, models.TASK_KEY: found.task}
    return tensors


def _stored_dtype(tensors: MergedTensors) -> torch.dtype:
    return max((tensors.dtype(name) for name in tensors.names()), key=lambda d: d.itemsize)


def _rows(subject: Subject, data: str | None, way_out: str) -> ExampleSet:
    """The rows to compare on, before anything is written."""
    try:
        return rows_of(subject, data=data)
    except RecipeError as error:
        raise RecipeError(
            error.what, where=error.where, found=error.found, fix=f"{error.fix}, or {way_out}"
        ) from None
