"""One writer a family of formats: it plans, checks the disk, and writes a folder atomically."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qft.calibration import Calibration
from qft.export.delta_rounding import DeltaRounding
from qft.files import folder_bytes, new_folder, require_disk, unfinished
from qft.merging.merge import Progress, write_model
from qft.merging.side_files import files_bytes
from qft.merging.tensors import MergedTensors, TensorSource
from qft.shard_writer import MAX_SHARD_BYTES
from qft.shards import tensor_bytes

if TYPE_CHECKING:
    from qft.export.integer_plan import IntegerPlan


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        format: one of FORMATS.
        path: the .gguf file (of the model, or of the adapter alone), or the model folder.
        bytes: of the tensors on disk.
        notes: what a user should know, a sentence each.
        delta_rounding: what a quantized format has left of an adapter's change.
    """

    format: str
    path: Path
    bytes: int
    notes: tuple[str, ...] = ()
    delta_rounding: DeltaRounding | None = None


@dataclass(frozen=True)
class Writing:
    """One export to be written; the fields are :func:`qft.export.formats.write_format`'s."""

    source: MergedTensors
    format: str
    out: Path
    max_shard_bytes: int = MAX_SHARD_BYTES
    calibration: Calibration | None = None
    stops: Sequence[int] = ()
    overwrite: bool = False
    progress: Progress | None = None

    @property
    def kind(self) -> str:
        """The format without its family."""
        return self.format.partition(":")[2]

    def scaled(self, work: int) -> Progress | None:
        """Reports bytes of ``work`` as bytes of the source, exact at the end."""
        if self.progress is None:
            return None
        report, total, done = self.progress, _source_bytes(self.source), 0

        def advance(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            report(done * total // max(1, work) - before * total // max(1, work))

        return advance

    def require_disk(self, needed: int) -> None:
        """Refuses where so many bytes, less those an unfinished write left, are not free."""
        require_disk(self.out, max(0, needed - folder_bytes(unfinished(self.out))))


def _safetensors(job: Writing) -> ExportReport:
    from qft.export.safetensors_format import DTYPES, InDtype

    cast = InDtype(job.source, DTYPES[job.kind])
    written = write_model(
        cast, job.out, max_shard_bytes=job.max_shard_bytes, overwrite=job.overwrite,
        progress=job.scaled(_source_bytes(cast)),
    )  # fmt: skip
    return ExportReport(job.format, job.out, written)


def _bnb(job: Writing) -> ExportReport:
    from qft.export.bnb_format import BnbPlan, write_bnb

    plan = BnbPlan(job.source, job.kind)
    require_disk(job.out, plan.bytes + files_bytes(job.source.files))
    with new_folder(job.out, overwrite=job.overwrite) as folder:
        write_bnb(plan, folder, job.max_shard_bytes, job.scaled(plan.bytes))
    return ExportReport(job.format, job.out, plan.bytes, tuple(plan.notes), plan.delta_rounding())


def _onnx(job: Writing) -> ExportReport:
    from qft.export.onnx_format import OnnxPlan, write_onnx

    plan = OnnxPlan(job.source, job.kind)
    require_disk(job.out, plan.bytes + files_bytes(job.source.files))
    with new_folder(job.out, overwrite=job.overwrite) as folder:
        written = write_onnx(plan, folder, job.progress)
    return ExportReport(job.format, job.out, written, tuple(plan.notes))


def _compressed_tensors(job: Writing) -> ExportReport:
    from qft.export.compressed_schemes import SCHEMES, CompressedLayout
    from qft.export.integer_plan import IntegerPlan

    layout = CompressedLayout(SCHEMES[job.kind])
    return _integers(job, IntegerPlan(job.source, layout, job.calibration))


def _torchao(job: Writing) -> ExportReport:
    from qft.export.integer_plan import IntegerPlan
    from qft.export.torchao_format import TorchaoLayout

    return _integers(job, IntegerPlan(job.source, TorchaoLayout(), job.calibration))


def _integers(job: Writing, plan: IntegerPlan) -> ExportReport:
    from qft.export.integer_plan import write_integers

    write_integers(
        plan, job.out, max_shard_bytes=job.max_shard_bytes, overwrite=job.overwrite,
        progress=job.scaled(plan.bytes + plan.fitted_bytes),
    )  # fmt: skip
    return ExportReport(job.format, job.out, plan.bytes, tuple(plan.notes), plan.delta_rounding())


def _gguf(job: Writing) -> ExportReport:
    from qft.export.gguf_format import GGUFPlan, write_gguf

    plan = GGUFPlan(job.source, job.kind, stops=job.stops)  # refuses before the rows are run
    if job.calibration is not None:
        from qft.gguf.importance import importance_of

        plan.weigh(importance_of(job.source, job.calibration))
    job.require_disk(plan.bytes)
    with new_folder(job.out, overwrite=job.overwrite, go_on=True) as folder:
        name = write_gguf(plan, folder, job.scaled(plan.tensor_bytes)).name
    return _one_file(job, name, plan.notes)


def _gguf_adapter(job: Writing) -> ExportReport:
    from qft.export.gguf_adapter_format import AdapterPlan, write_adapter

    plan = AdapterPlan(job.source, job.kind, job.stops)
    job.require_disk(plan.bytes)
    with new_folder(job.out, overwrite=job.overwrite, go_on=True) as folder:
        name = write_adapter(plan, folder, job.scaled(plan.tensor_bytes)).name
    return _one_file(job, name, plan.notes)


def _one_file(job: Writing, name: str, notes: Sequence[str]) -> ExportReport:
    path = job.out / name
    return ExportReport(job.format, path, path.stat().st_size, tuple(notes))


def _source_bytes(source: TensorSource) -> int:
    return sum(tensor_bytes(source.shape(name), source.dtype(name)) for name in source.names())


WRITERS: Mapping[str, Callable[[Writing], ExportReport]] = {
    "gguf": _gguf,
    "gguf-lora": _gguf_adapter,
    "bnb": _bnb,
    "compressed-tensors": _compressed_tensors,
    "torchao": _torchao,
    "safetensors": _safetensors,
    "onnx": _onnx,
}
