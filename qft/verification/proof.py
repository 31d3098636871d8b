"""`qft.verify`, and the proof that `qft.merge` and `qft.export` give: one and the same.

The reference is what was trained (an adapter on the base as training saw it, or a model), the
artefact is read back from the disk. Files are compared first, since they say best what is wrong;
then the two models' answers on held-out rows, and a generation that must stop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qft import hardware, models
from qft.data.tasks import TASKS, ExampleSet, pad_id
from qft.errors import ModelError, RecipeError, VerificationError
from qft.files import write_json
from qft.held_out import held_out_examples
from qft.onnx_files import weight_count
from qft.progress import QUIET, Bar, Reporter
from qft.shards import ShardedCheckpoint
from qft.verification.diagnosis import Finding, advice
from qft.verification.layerwise import verify_by_layers
from qft.verification.stops import (
    check_generation,
    generation_config,
    stand_in,
    taught_ids,
)
from qft.verification.streams import CannotStreamError, open_weights
from qft.verification.subject import Subject, locate
from qft.verification.summary import summary
from qft.verification.tensors_check import check_tensors
from qft.verification.thresholds import Thresholds, limits, thresholds_of
from qft.verification.verify import FILE, Rows, Verification
from qft.verification.verify import verify as compare
from qft.verification.words_check import check_words, has_settings, vocabulary

_TEXTS = 64  # held-out texts whose tokens are compared
_LONGEST = 512  # tokens


@dataclass(frozen=True)
class Way:
    """How two models are compared.

    Attributes:
        layer_by_layer: one layer of each in memory at a time, instead of both models.
        dtype: of the arithmetic.
    """

    layer_by_layer: bool
    dtype: torch.dtype


def verify(
    reference: str | Path,
    artefact: str | Path,
    *,
    data: str | None = None,
    task: str | None = None,
    format: str | None = None,
    base: str | None = None,
    strategy: str | None = None,
    limit: int | None = None,
    layer_by_layer: bool | None = None,
    out: str | Path | None = None,
    reporter: Reporter = QUIET,
) -> dict[str, Any]:
    """Checks that ``artefact`` still is the model that ``reference`` is.

    Args:
        reference: a run, adapter, checkpoint, model folder, GGUF export or hub id.
        artefact: likewise; what was made of the reference.
        data: rows to compare on; a run knows its own held-out ones.
        task: where the reference does not say it.
        format: whose thresholds count; None is how the artefact is stored.
        base: for an adapter, where its base is.
        strategy: a third party's, by name.
        limit: at most so many rows.
        layer_by_layer: one layer of each model in memory at a time; None does so where the two do
            not fit together.
        out: a file to write instead of verification.json beside the artefact.

    Returns:
        What verification.json holds.

    Raises:
        VerificationError: the artefact is not the model that was trained; says what differs and
            what to do.
        QftError: one of the two cannot be opened, or there are no rows to compare on.
    """
    first = locate(reference, base=base, strategy=strategy, task=task)
    second = locate(artefact, base=base, strategy=strategy, task=first.spec.task)
    named = format or second.format()
    thresholds_of(named)
    rows = rows_of(first, data=data, limit=limit)
    place = Path(out) if out is not None else second.home / FILE
    return prove(first, second, rows, format=named, layer_by_layer=layer_by_layer, file=place,
                 reporter=reporter)  # fmt: skip


def rows_of(reference: Subject, *, data: str | None = None, limit: int | None = None) -> ExampleSet:
    """The held-out rows to compare on.

    Raises:
        RecipeError: there are none: the reference is no run, and no ``data``.
        DataError: they do not fit the task.
    """
    spec = reference.spec
    if spec.task not in TASKS:
        raise RecipeError("No such task.", where="--task", found=spec.task, fix=", ".join(TASKS))
    return held_out_examples(
        Path(reference.source),
        reference.tokenizer(),
        task=spec.task,
        labels=spec.labels,
        labels_are=spec.labels_are,
        data=data,
        max_length=_longest(reference) if spec.task == "embed" else None,
        limit=limit,
    ).first(limit)  # a text makes several examples


def _longest(reference: Subject) -> int:
    """Tokens of a text that an encoder without a head is compared on."""
    return min(_LONGEST, models.longest_input(reference.folder, reference.spec) or _LONGEST)


def prove(
    reference: Subject,
    artefact: Subject,
    rows: ExampleSet,
    *,
    format: str,
    file: Path,
    layer_by_layer: bool | None = None,
    also: Mapping[str, Any] | None = None,
    reporter: Reporter = QUIET,
) -> dict[str, Any]:
    """Compares two subjects, writes the figures, shows them, and raises past the thresholds.

    Args:
        format: a key of THRESHOLDS.
        file: where to write; replaced as a whole.
        also: what else is to be written there.

    Returns:
        What was written.

    Raises:
        VerificationError: the artefact is not the reference.
    """
    tokenizer = reference.tokenizer()
    lost = check_tensors(artefact)
    if any(finding.kind == "missing" for finding in lost):
        raise _unusable(format, lost, file, artefact)
    texts = [str(tokenizer.decode(e.inputs["input_ids"])) for e in rows.examples[:_TEXTS]]
    findings, notes = check_words(reference, artefact, tokenizer, texts)
    _require_words(reference, artefact, rows, format, file)
    task = TASKS[reference.spec.task]
    held = Rows(rows.examples, task, pad_id(tokenizer), rows.labels)
    way = choose_way(reference, artefact, layer_by_layer)
    allowed = limits(format, (reference.held_as(), artefact.held_as()), way.dtype)
    if task.predicts == "vectors":
        allowed = replace(allowed, top1=0.0)  # the largest of a vector's dimensions is no choice
    needed = taught_ids(reference, tokenizer) if task.predicts == "tokens" else []
    with reporter.bar("verify", len(rows.examples)) as bar:
        try:
            result, writer = _compared(reference, artefact, held, format, allowed, way, bar)
        except ModelError as error:
            if not findings:
                raise
            why = Finding("tensors", f"it cannot be opened: {error.found or error.what}", "")
            raise _unusable(format, [*findings, why], file, artefact) from error
    findings += check_generation(writer, needed, tokenizer)
    result = replace(
        result,
        findings=_once([*lost, *findings]),
        notes=(*result.notes, *notes),
        quantized=reference.held_as() != "none",
    )
    written = {**result.to_dict(), "dtype": str(way.dtype).removeprefix("torch."),
               "rows": len(rows.examples), "layer_by_layer": way.layer_by_layer,
               **(also or {})}  # fmt: skip
    write_json(file, written)
    for line in summary(result, texts=len(texts), stops=needed, tokenizer=tokenizer):
        reporter.say(line)
    result.check(artefact.gguf or artefact.onnx or artefact.home)
    return written


def _compared(
    reference: Subject,
    artefact: Subject,
    rows: Rows,
    format: str,
    allowed: Thresholds,
    way: Way,
    bar: Bar,
) -> tuple[Verification, nn.Module]:
    """The figures, and a model that writes with the artefact's settings."""
    if way.layer_by_layer:
        try:
            with (
                open_weights(reference, way.dtype) as one,
                open_weights(artefact, way.dtype) as two,
            ):
                found = verify_by_layers(one, two, rows, format=format, thresholds=allowed,
                                         progress=bar.advance)  # fmt: skip
            return found, stand_in(artefact, vocabulary(artefact))
        except CannotStreamError as error:
            note = f"Both models were opened whole: {error.what} ({error.found or error.where})"
            found, writer = _compared_whole(reference, artefact, rows, format, allowed, way, bar)
            return replace(found, notes=(*found.notes, note)), writer
    return _compared_whole(reference, artefact, rows, format, allowed, way, bar)


def _compared_whole(
    reference: Subject,
    artefact: Subject,
    rows: Rows,
    format: str,
    allowed: Thresholds,
    way: Way,
    bar: Bar,
) -> tuple[Verification, nn.Module]:
    first, second = reference.open(way.dtype), artefact.open(way.dtype)
    result = compare(first, second, rows, format=format, thresholds=allowed, progress=bar.advance)
    if artefact.gguf is not None and has_settings(artefact):  # that loader does not read the file
        second.generation_config = generation_config(artefact)  # type: ignore[assignment]
    return result, second


def _once(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Each text once, in order."""
    return tuple({finding.text: finding for finding in findings}.values())


def _require_words(
    reference: Subject, artefact: Subject, rows: ExampleSet, format: str, file: Path
) -> None:
    """Refuses to run an artefact on tokens that it has no embedding of."""
    held = vocabulary(artefact)
    largest = max((max(e.inputs["input_ids"]) for e in rows.examples), default=0)
    if largest < held:
        return
    text = f"token {largest} of the held-out rows is not among the artefact's {held}"
    finding = Finding("tokens", text, "")
    write_json(file, {"format": format, "passed": False, "findings": [asdict(finding)]})
    raise VerificationError(
        f"The artefact ({format}) has another vocabulary than what was trained.",
        where=artefact.home,
        found=f"{text}; the reference has {vocabulary(reference)}",
        fix="compare it with the model it was made from",
    )


def _unusable(
    format: str, findings: Sequence[Finding], file: Path, artefact: Subject
) -> VerificationError:
    """Nothing can be run; the file says so."""
    stated = [asdict(finding) for finding in findings]
    write_json(file, {"format": format, "passed": False, "findings": stated})
    lost = any(finding.kind == "missing" for finding in findings)
    return VerificationError(
        f"The artefact ({format}) {'does not hold the whole model' if lost else 'cannot be run'}.",
        where=artefact.home,
        found="; ".join(finding.text for finding in findings),
        fix=advice(format, False, None, (), [finding for finding in findings if finding.fix]),
    )


def choose_way(reference: Subject, artefact: Subject, asked: bool | None) -> Way:
    """Both models in float32 where they fit, so that only the format's own rounding is measured.

    Else both in what the machine is fast at; else layer by layer.
    """
    free = hardware.free_memory_bytes(hardware.choose().device)
    fast = hardware.choose().dtype
    values = max(_values(reference), _values(artefact))
    fits = {dtype: free is None or 2 * dtype.itemsize * values < free / 2
            for dtype in (torch.float32, fast)}  # fmt: skip
    dtype = torch.float32 if fits[torch.float32] else fast
    return Way(asked or (asked is None and not fits[dtype]), dtype)


def _values(subject: Subject) -> int:
    """How many numbers a model holds, from headers alone."""
    if subject.gguf is not None:
        return sum(int(tensor.n_elements) for tensor in subject.reader.tensors)
    if subject.onnx is not None:
        return weight_count(subject.onnx)
    with ShardedCheckpoint(subject.folder) as checkpoint:
        return sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
