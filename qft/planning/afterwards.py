"""What comes after a training: merging its adapter into the base, and writing other formats.

Both are streamed: a block of rows at a time, of 16 MiB in float32, passes from the base's files
through the adapter to the new ones. What a block becomes on its way was measured
(`benchmarks/plan_phases.py`). Disk is counted by the very plans that write the files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from qft.errors import QftError
from qft.export.bnb_format import BnbPlan
from qft.export.compressed_schemes import SCHEMES, CompressedLayout
from qft.export.formats import fitted_unasked, require_known
from qft.export.gguf_format import GGUFPlan
from qft.export.integer_plan import IntegerPlan, Layout
from qft.export.safetensors_format import DTYPES, InDtype
from qft.files import folder_bytes
from qft.gguf.architectures import architecture_of
from qft.gguf.file import data_bytes
from qft.gguf.mixes import choose_types
from qft.gguf.types import TYPES, stored_bytes
from qft.lean.model_parts import layer_stacks
from qft.merging.side_files import files_bytes
from qft.planning.amounts import PhaseBytes
from qft.planning.job import PlannedJob
from qft.planning.saving import room_note
from qft.planning.shape_source import ShapeSource
from qft.shards import BLOCK_NUMBERS, tensor_bytes

_BLOCK_BYTES = 4 * BLOCK_NUMBERS  # of float32
FIXED_BYTES = 40 * 2**20  # what the libraries take when they first work (benchmarks/merge_peak)
_MERGE_BLOCKS = 5.0  # float32 blocks of a layer's matrix alive at once (the same)
_K_BLOCKS = 8.0  # GGUF's K-quants, whose scales are searched for (benchmarks/gguf_peak)
_BLOCKS = {
    "safetensors": 4.0, "bnb": 6.0, "compressed-tensors": 6.0, "torchao": 6.0, "gguf": 3.5,
    "gguf-lora": 1.0,
}  # fmt: skip
_ONNX_COPIES = {"onnx:fp32": 1.0, "onnx:int8": 1.5}  # of the float32 model, beside it (measured)
_ONNX_BYTES = 100 * 2**20
_ONNX_GRAPH_BYTES = 400 * 2**10
_TEXT_BYTES = 8 * 2**10  # config.json and the like
_HEADER_LINE_BYTES = 110  # a tensor in a safetensors header
_WORD_BYTES = 32  # a token in a GGUF file's vocabulary, with its merge
_FITTING_ROWS = 128


def merge_and_export(
    job: PlannedJob, formats: Sequence[str], replacing: Path | None = None
) -> list[PhaseBytes]:
    """What merging takes, where the strategy can be merged, and each export.

    Nothing of a training is in memory any more. All of it runs on the host.

    Args:
        job: a training that is over then.
        formats: keys of `qft.export.formats.FORMATS`.
        replacing: a former model at the same place; it stays until the new one is complete.

    Raises:
        RecipeError: there is no such format.
    """
    for format in formats:
        require_known(format)
    former = folder_bytes(replacing) if replacing is not None else 0
    source = ShapeSource(job)
    found = [merge_phase(job, source)] if job.recipe.strategy.mergeable else []
    found += [export_phase(job, source, format) for format in formats]
    out = Path(job.recipe.output)
    return [_with_room(phase, former, out) for phase in found]


def merge_phase(job: PlannedJob, source: ShapeSource) -> PhaseBytes:
    """`qft merge`: the base's tensors with the change in them, as they are stored."""
    size = source.bytes()
    disk = {"merged model": size + files_bytes(source.files) + _TEXT_BYTES}
    return _phase(job, "merge", _streaming(source, _MERGE_BLOCKS, job, merged=True), disk)


def export_phase(job: PlannedJob, source: ShapeSource, format: str) -> PhaseBytes:
    """`qft export`, without the proof that follows it."""
    family, _, kind = format.partition(":")
    try:
        written, temporary = _WRITTEN[family](job, source, kind)
    except QftError as error:
        return PhaseBytes(f"export:{format}", note=f"{error.what} {error.found or ''}".strip())
    disk = {format: written}
    memory = _memory(job, source, format)
    phase = _phase(job, f"export:{format}", memory, disk)
    note = "The proof that follows opens both models, or a layer of each where they do not fit."
    return replace(phase, disk_peak=written + temporary, note=note)


def _memory(job: PlannedJob, source: ShapeSource, format: str) -> dict[str, int]:
    family = format.partition(":")[0]
    if family == "onnx":
        whole = sum(4 * math.prod(source.shape(name)) for name in source.names())
        return {"weights": whole, "buffers": round(_ONNX_COPIES[format] * whole) + _ONNX_BYTES}
    searched = family == "gguf" and ("_k" in format or "iq" in format)
    memory = _streaming(source, _K_BLOCKS if searched else _BLOCKS[family], job)
    if fitted_unasked(format):
        memory = {"buffers": max(sum(memory.values()), sum(_fitting(job).values()))}
    return memory


def _streaming(
    source: ShapeSource, blocks: float, job: PlannedJob, *, merged: bool = False
) -> dict[str, int]:
    """Blocks of the largest tensor on their way.

    Args:
        blocks: float32 blocks alive at once.
        merged: only what an adapter changes becomes float32: the layers' matrices.
    """
    sizes = [math.prod(source.shape(name)) for name in source.names()]
    if merged:
        sizes = [module.weight.numel() for module in _linears(job)] or sizes
    return {"buffers": round(blocks * min(_BLOCK_BYTES, 4 * max(sizes))) + FIXED_BYTES}


def _fitting(job: PlannedJob) -> dict[str, int]:
    """Rounding a layer to rows: it and its copy in float32, its Hessian, and the rows' states."""
    stacks = layer_stacks(job.ready.skeleton)
    layers = [layer for stack in stacks.values() for layer in stack]
    largest = max(4 * sum(p.numel() for p in layer.parameters()) for layer in layers)
    widths = [module.in_features for module in _linears(job)]
    lengths = sorted((len(e.inputs["input_ids"]) for e in job.inputs.train.examples), reverse=True)
    tokens = sum(lengths[:_FITTING_ROWS])
    config = job.ready.skeleton.config
    states = 2 * 4 * tokens * int(config.hidden_size)  # type: ignore[union-attr,arg-type]
    return {"weights": 2 * largest, "hessian": 2 * 4 * max(widths) ** 2, "states": states}


def _phase(
    job: PlannedJob, phase: str, memory: Mapping[str, int], disk: Mapping[str, int]
) -> PhaseBytes:
    """On the host, which is the device only where the job has no other."""
    size = sum(disk.values())
    if job.device == "cpu":
        return PhaseBytes(phase, memory, {}, disk, size)
    return PhaseBytes(phase, {}, memory, disk, size)


def _with_room(phase: PhaseBytes, former: int, out: Path) -> PhaseBytes:
    needed = phase.disk_peak + former
    note = " ".join(part for part in (room_note(needed, out), phase.note) if part)
    return replace(phase, disk_peak=needed, note=note)


# bytes written, and of temporary files beside them
_Written = Callable[[PlannedJob, ShapeSource, str], tuple[int, int]]


def _safetensors(job: PlannedJob, source: ShapeSource, kind: str) -> tuple[int, int]:
    cast = InDtype(source, DTYPES[kind])
    size = sum(tensor_bytes(cast.shape(name), cast.dtype(name)) for name in cast.names())
    return size + _beside(source), 0


def _bnb(job: PlannedJob, source: ShapeSource, kind: str) -> tuple[int, int]:
    plan = BnbPlan(source, kind)
    return plan.bytes + _header(len(plan.specs)) + _beside(source), 0


def _compressed(job: PlannedJob, source: ShapeSource, kind: str) -> tuple[int, int]:
    return _integers(job, source, CompressedLayout(SCHEMES[kind]), f"compressed-tensors:{kind}")


def _torchao(job: PlannedJob, source: ShapeSource, kind: str) -> tuple[int, int]:
    from qft.export.torchao_format import TorchaoLayout

    return _integers(job, source, TorchaoLayout(), f"torchao:{kind}")


def _integers(job: PlannedJob, source: ShapeSource, layout: Layout, format: str) -> tuple[int, int]:
    plan = IntegerPlan(source, layout)  # type: ignore[arg-type]
    kept = 0
    if fitted_unasked(format):  # in 8 bits, until all is written
        kept = sum(module.weight.numel() for module in _linears(job))
    return plan.bytes + _header(len(plan.specs)) + _beside(source), kept


def _linears(job: PlannedJob) -> Iterator[nn.Linear]:
    """The matrices in the model's stacks of layers."""
    for stack in layer_stacks(job.ready.skeleton).values():
        yield from (module for module in stack.modules() if isinstance(module, nn.Linear))


def _gguf(job: PlannedJob, source: ShapeSource, kind: str) -> tuple[int, int]:
    if source.files:
        plan = GGUFPlan(source, kind)  # type: ignore[arg-type]
        return len(plan.header) + data_bytes(plan.tensors) + _beside(source), 0
    architecture = architecture_of(source.config)
    facts = [(t.name, t.shape) for t in architecture.tensors(source)]  # type: ignore[arg-type]
    chosen = choose_types(kind, architecture.name, facts, architecture.metadata(source.config))
    size = sum(stored_bytes(chosen[name].kind, shape) for name, shape in facts)
    words = int(source.config.get("vocab_size", 0)) * _WORD_BYTES
    return size + len(facts) * 100 + words, 0


def _gguf_adapter(job: PlannedJob, source: ShapeSource, kind: str) -> tuple[int, int]:
    stored = TYPES[kind]
    size = job.ready.trained_parameters * stored.bytes // stored.block
    return size + _TEXT_BYTES, 0


def _onnx(job: PlannedJob, source: ShapeSource, kind: str) -> tuple[int, int]:
    from qft.export.onnx_format import OnnxPlan

    plan = OnnxPlan(source, kind)  # type: ignore[arg-type]
    whole = sum(4 * math.prod(source.shape(name)) for name in source.names())
    if kind == "fp32":
        return whole + _ONNX_GRAPH_BYTES + _beside(source), 0
    matrices = sum(math.prod(source.shape(n)) for n in source.names() if len(source.shape(n)) > 1)
    written = whole - 3 * matrices + _ONNX_GRAPH_BYTES + _beside(source)
    return written, plan.bytes - written


def _beside(source: ShapeSource) -> int:
    return files_bytes(source.files) + _TEXT_BYTES


def _header(tensors: int) -> int:
    return tensors * _HEADER_LINE_BYTES


_WRITTEN: Mapping[str, _Written] = {
    "safetensors": _safetensors, "bnb": _bnb, "compressed-tensors": _compressed,
    "torchao": _torchao, "gguf": _gguf, "gguf-lora": _gguf_adapter, "onnx": _onnx,
}  # fmt: skip
