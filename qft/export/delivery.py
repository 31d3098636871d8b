"""`qft.merge` and `qft.export`: from a run to a model others can use, and the proof that it works.

The proof compares two models on held-out rows: the reference is the adapter on the base *as
training saw it*, the artefact is read back from the disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qft import hardware, models
from qft.adapter_folder import AdapterFolder, adapter_in, locate_adapter, open_adapter_model
from qft.data.tasks import TASKS, ExampleSet, Task, pad_id
from qft.errors import RecipeError
from qft.export.formats import require_known, write_format
from qft.export.verify import THRESHOLDS, Thresholds, read_back
from qft.export.verify import verify as compare
from qft.files import replace_folder, require_apart
from qft.held_out import held_out_examples
from qft.merging.merge import open_source, write_model
from qft.merging.tensors import MergedTensors
from qft.merging.together import combine_folders, located
from qft.progress import QUIET, Bar, Reporter, human_bytes
from qft.shards import ShardedCheckpoint

_STORED_AS = {"bfloat16": "safetensors:bf16", "float16": "safetensors:fp16"}
_BATCH = 8  # examples a comparison batch


def merge(
    source: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    verify: bool = False,
    data: str | None = None,
    strategy: str | None = None,
    combine: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    reporter: Reporter = QUIET,
) -> dict[str, Any]:
    """Folds an adapter, or several together, into the original base, streamed tensor by tensor.

    Args:
        source: a run, a checkpoint or an adapter folder; or several, of one base and task.
        out: the model folder to write.
        base: the base model, where it is not where the adapter remembers it.
        dtype: ``bfloat16``, ``float16`` or ``float32``; None keeps the base's.
        verify: compare with the adapter model on held-out rows.
        data: those rows; a run knows its own.
        strategy: a third party's strategy, by name.
        combine: how several become one: see :func:`qft.merging.together.located`; with
            ``adapter_only`` their adapter is written, and no model.
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
    chosen = dict(combine or {})
    if chosen.pop("adapter_only", False):
        return combine_folders(source, out, chosen, base=base, strategy=strategy,
                               overwrite=overwrite, reporter=reporter)  # fmt: skip
    with located(source, out, chosen, base=base, strategy=strategy) as found:
        first = Path(source if isinstance(source, (str, Path)) else source[0])
        rows = _rows(found, first, data, "without --verify") if verify else None
        return _merge(found, Path(out), dtype, rows, overwrite, reporter)


def _merge(
    found: AdapterFolder,
    out: Path,
    dtype: str | None,
    rows: ExampleSet | None,
    overwrite: bool,
    reporter: Reporter,
) -> dict[str, Any]:
    """Writes the merged model, and compares it where there are rows."""
    require_apart(out, found.base, found.folder, _run_of(found.folder))
    tensors = _open(found, models.DTYPES[dtype] if dtype else None)
    stored = dtype or str(_stored_dtype(tensors)).removeprefix("torch.")
    report: dict[str, Any] = {"out": str(out)}
    with _proven_first(out, overwrite and rows is not None) as target:
        with reporter.bar("merge", tensors.total_bytes()) as bar:
            written = write_model(tensors, target, overwrite=overwrite, progress=bar.advance)
        tensors.close()
        changed, count = len(tensors.changed), len(tensors.names())
        report |= {"bytes": written, "tensors": count, "changed": changed}
        reporter.say(f"merged: {changed} of {count} tensors changed, "
                     f"{human_bytes(written)} in {target}")  # fmt: skip
        if rows is not None:
            format = _STORED_AS.get(stored, "safetensors:fp32")
            report["verification"] = _prove(found, rows, format, target, reporter)
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
    path = Path(source)
    found: AdapterFolder | models.ModelSpec
    if adapter_in(path) is not None or (path / "checkpoints").is_dir():
        found = locate_adapter(path, base=base, strategy=strategy)
        require_apart(Path(out), found.base, found.folder, _run_of(found.folder))
        tensors = _open(found, None)
    else:
        found = _plain_spec(str(source))
        folder = models.resolve_folder(found.source)
        models.check_folder(folder)
        require_apart(Path(out), folder)
        tensors = open_source(folder, models.open_skeleton(folder, found))
    rows = _rows(found, path, data, "--no-verify") if verify else None
    with _proven_first(Path(out), overwrite and verify) as target:
        with reporter.bar(f"export {format}", tensors.total_bytes()) as bar:
            written = write_format(
                tensors, format, target, overwrite=overwrite, progress=bar.advance
            )
        tensors.close()
        reporter.say(f"{format}: {human_bytes(written.bytes)} in {written.path}")
        for note in written.notes:
            reporter.say(f"note: {note}")
        report = {**asdict(written), "path": str(Path(out) / written.path.relative_to(target))}
        if rows is not None:
            report["verification"] = _prove(found, rows, format, written.path, reporter)
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


def _plain_spec(source: str) -> models.ModelSpec:
    config = models.read_config(models.resolve_folder(source))
    labels, kind = models.labels_in(config)
    task = models.task_of(config)
    has_labels = task in ("classify", "token")
    return models.ModelSpec(source, task, labels if has_labels else None, kind)


def _folder_of(found: AdapterFolder | models.ModelSpec) -> Path:
    if isinstance(found, AdapterFolder):
        return found.base
    return models.resolve_folder(found.source)


def _rows(
    found: AdapterFolder | models.ModelSpec, source: Path, data: str | None, way_out: str
) -> ExampleSet:
    """The rows to compare on, before anything is written."""
    spec = found.spec() if isinstance(found, AdapterFolder) else found
    tokenizer = models.open_tokenizer(_folder_of(found))
    try:
        return held_out_examples(
            source,
            tokenizer,
            task=spec.task,
            labels=spec.labels,
            labels_are=spec.labels_are,
            data=data,
        )
    except RecipeError as error:
        raise RecipeError(
            error.what, where=error.where, found=error.found, fix=f"{error.fix}, or {way_out}"
        ) from None


def _prove(
    found: AdapterFolder | models.ModelSpec,
    rows: ExampleSet,
    format: str,
    artefact: Path,
    reporter: Reporter,
) -> dict[str, Any]:
    """Compares reference and artefact; writes verification.json; raises past the thresholds."""
    spec = found.spec() if isinstance(found, AdapterFolder) else found
    base = _folder_of(found)
    dtype = _proof_dtype(base)
    reference = _reference(found, replace(spec, dtype=dtype))
    task = TASKS[spec.task]
    pad = pad_id(models.open_tokenizer(base))
    with reporter.bar("verify", len(rows.examples)) as bar:
        result = compare(
            reference,
            read_back(artefact, dtype=dtype),
            _batches(rows, task, pad, bar),
            format=format,
            thresholds=_limits(format, spec.quantize, dtype),
        )
    result.write(artefact if artefact.is_dir() else artefact.parent)
    reporter.say(
        f"verified on {result.positions} predictions: mean KL {result.mean_kl:.2g} nats, "
        f"same first choice in {result.top1:.1%}"
        + (f", perplexity {result.perplexity:.2f} against {result.perplexity_reference:.2f}"
           if result.perplexity is not None and result.perplexity_reference is not None else "")
    )  # fmt: skip
    result.check()
    return result.to_dict()


def _batches(rows: ExampleSet, task: Task, pad: int, bar: Bar) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(rows.examples), _BATCH):
        part = rows.examples[start : start + _BATCH]
        yield task.collate(part, pad)
        bar.advance(len(part))


def _reference(found: AdapterFolder | models.ModelSpec, spec: models.ModelSpec) -> nn.Module:
    """The model the artefact must equal: an adapter's base is quantized as training saw it."""
    if isinstance(found, AdapterFolder):
        return open_adapter_model(found, spec)
    return models.open_model(models.resolve_folder(found.source), spec)


def _proof_dtype(base: Path) -> torch.dtype:
    """float32 where two such models fit, so that only the format's own rounding is measured."""
    checkpoint = ShardedCheckpoint(base)
    values = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    checkpoint.close()
    free = hardware.free_memory_bytes(hardware.choose().device)
    return torch.float32 if free is None or 2 * 4 * values < free / 2 else torch.bfloat16


def _limits(format: str, quantize: str, dtype: torch.dtype) -> Thresholds:
    """The format's thresholds, widened by what rounds the reference itself.

    An artefact is made from the original base; a reference on a quantized one is the one that is
    rounded, and differs from it by as much as an export to that quantization may.
    """
    causes = [format]
    if quantize != "none":
        causes.append("bnb:int8" if quantize == "int8" else "bnb:nf4")
    if dtype != torch.float32:
        causes.append("safetensors:bf16")
    limits = [THRESHOLDS[cause] for cause in causes]
    return Thresholds(
        mean_kl=max(limit.mean_kl for limit in limits),
        p99_kl=max(limit.p99_kl for limit in limits),
        top1=min(limit.top1 for limit in limits),
        perplexity_ratio=max(limit.perplexity_ratio for limit in limits),
    )
