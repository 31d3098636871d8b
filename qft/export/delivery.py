"""`qft.merge` and `qft.export`: from a run to a model others can use, and the proof that it works.

The proof compares two models on held-out rows: the reference is the adapter on the base *as
training saw it*, the artefact is read back from the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qft import models
from qft.adapter_folder import AdapterFolder, locate_adapter
from qft.data.tasks import ExampleSet
from qft.errors import RecipeError
from qft.export.formats import require_known, write_format
from qft.export.proof import prove, rows_of
from qft.export.stops import complete_stops
from qft.export.subject import Subject, locate, of_adapter
from qft.export.verify import FILE
from qft.files import replace_folder, require_apart
from qft.merging.merge import open_source, write_model
from qft.merging.tensors import MergedTensors
from qft.progress import QUIET, Reporter, human_bytes

_STORED_AS = {"bfloat16": "safetensors:bf16", "float16": "safetensors:fp16"}


def merge(
    source: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    verify: bool = False,
    data: str | None = None,
    strategy: str | None = None,
    overwrite: bool = False,
    reporter: Reporter = QUIET,
) -> dict[str, Any]:
    """Folds an adapter into its original base, streamed tensor by tensor.

    Args:
        source: a run, a checkpoint or an adapter folder.
        out: the model folder to write.
        base: the base model, where it is not where the adapter remembers it.
        dtype: ``bfloat16``, ``float16`` or ``float32``; None keeps the base's.
        verify: compare with the adapter model on held-out rows.
        data: those rows; a run knows its own.
        strategy: a third party's strategy, by name.
        overwrite: replace what ``out`` holds; with ``verify`` only once the new one is proven.

    Returns:
        What was written, with ``verification`` where it was asked for.

    Raises:
        VerificationError: the merged model is not the trained one; it stays in ``out`` to look at.
        QftError: anything else qft can explain; nothing is left half-written.
    """
    if dtype is not None and dtype not in models.DTYPES:
        raise RecipeError(
            "No such dtype.", where="--dtype", found=dtype, fix=", ".join(models.DTYPES)
        )
    found = locate_adapter(source, base=base, strategy=strategy)
    require_apart(Path(out), found.base, found.folder, _run_of(found.folder))
    reference = of_adapter(found, str(source))
    rows = _rows(reference, data, "without --verify") if verify else None
    tensors = _open(found, models.DTYPES[dtype] if dtype else None)
    stored = dtype or str(_stored_dtype(tensors)).removeprefix("torch.")
    report: dict[str, Any] = {"out": str(out)}
    with _proven_first(Path(out), overwrite and verify) as target:
        with reporter.bar("merge", tensors.total_bytes()) as bar:
            written = write_model(tensors, target, overwrite=overwrite, progress=bar.advance)
        tensors.close()
        complete_stops(reference, target)
        changed, count = len(tensors.changed), len(tensors.names())
        report |= {"bytes": written, "tensors": count, "changed": changed}
        reporter.say(f"merged: {changed} of {count} tensors changed, "
                     f"{human_bytes(written)} in {target}")  # fmt: skip
        if rows is not None:
            format = _STORED_AS.get(stored, "safetensors:fp32")
            report["verification"] = _prove(reference, rows, format, target, reporter)
    return report


def export(
    source: str | Path,
    out: str | Path,
    *,
    format: str,
    base: str | None = None,
    verify: bool = True,
    data: str | None = None,
    strategy: str | None = None,
    overwrite: bool = False,
    reporter: Reporter = QUIET,
) -> dict[str, Any]:
    """Writes a model in another format, straight from base and adapter, and checks the result.

    Args:
        source: a run, an adapter, or a model folder.
        out: the folder to write.
        format: a key of ``qft.export.FORMATS``.
        verify: open the result and compare it with the model it was made from.
        data: rows to compare on; a run knows its own.

    Raises:
        VerificationError: the exported model lost more than its format may lose.
        QftError: anything else qft can explain; nothing is left half-written.
    """
    require_known(format)
    reference = locate(source, base=base, strategy=strategy)
    if found := reference.adapter:
        require_apart(Path(out), found.base, found.folder, _run_of(found.folder))
        # rounded once, to the format's own numbers; bitsandbytes keeps the base's dtype beside them
        tensors = _open(found, None if format.startswith("bnb:") else torch.float32)
    else:
        folder = reference.folder
        models.check_folder(folder)
        require_apart(Path(out), folder)
        tensors = open_source(folder, models.open_skeleton(folder, reference.spec))
    rows = _rows(reference, data, "--no-verify") if verify else None
    with _proven_first(Path(out), overwrite and verify) as target:
        with reporter.bar(f"export {format}", tensors.total_bytes()) as bar:
            written = write_format(
                tensors, format, target, overwrite=overwrite, progress=bar.advance
            )
        tensors.close()
        complete_stops(reference, target)
        reporter.say(f"{format}: {human_bytes(written.bytes)} in {written.path}")
        for note in written.notes:
            reporter.say(f"note: {note}")
        report = {**asdict(written), "path": str(Path(out) / written.path.relative_to(target))}
        if rows is not None:
            report["verification"] = _prove(reference, rows, format, written.path, reporter)
    return report


@contextmanager
def _proven_first(out: Path, wait: bool) -> Iterator[Path]:
    """Where to write: with ``wait`` beside a former artefact, which stays until the proof."""
    if not (wait and out.exists()):
        yield out
        return
    unproven = out.with_name(f"{out.name}.unproven")
    yield unproven
    replace_folder(unproven, out)


def _run_of(adapter: Path) -> Path:
    """The run an adapter lies in, or the adapter itself."""
    return adapter.parent if (adapter.parent / "recipe.yaml").is_file() else adapter


def _open(found: AdapterFolder, dtype: torch.dtype | None) -> MergedTensors:
    skeleton = models.open_skeleton(found.base, found.spec())
    tensors = open_source(
        found.base, skeleton, adapter=found.folder, strategy=found.strategy, dtype=dtype
    )
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


def _prove(
    reference: Subject, rows: ExampleSet, format: str, written: Path, reporter: Reporter
) -> dict[str, Any]:
    """Compares reference and artefact; writes verification.json; raises past the thresholds."""
    artefact = locate(written, task=reference.spec.task)
    file = artefact.home / FILE
    return prove(reference, artefact, rows, format=format, file=file, reporter=reporter)
