"""A model whose linear layers become integers with scales, written as they are rounded.

Each linear layer is rounded from the source block by block of rows and written at once; how a
format keeps integers and scales is its :class:`Layout`. Heads, embeddings, norms and biases stay as
they are, in the source's dtype. Where there are calibration rows, the layers of the model's stack
are rounded first, by `qft.export.error_compensation`, and kept beside the files until these are
written.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qft import models, quantization
from qft.calibration import Calibration
from qft.errors import ModelError
from qft.export.delta_rounding import DeltaRounding, DeltaTally
from qft.export.error_compensation import Target, fit_layers
from qft.export.integer_rounding import IntegerGrid, find_scales, from_integers, to_integers
from qft.export.layer_rows import Block, LayerRows
from qft.files import folder_bytes, new_folder, require_disk, unfinished
from qft.lean.model_parts import layer_stacks
from qft.merging.bnb_rounding import quantized_linears
from qft.merging.merge import Progress, identity, write_config
from qft.merging.side_files import copy_files, files_bytes
from qft.merging.tensors import MergedTensors
from qft.shard_writer import MAX_SHARD_BYTES, Spec, write_shards
from qft.shards import ShardedCheckpoint, row_blocks, tensor_bytes
from qft.write_journal import WriteJournal

_HEADER_SLACK_BYTES = 4 * 2**20
_FITTED = "fitted"  # folder of the kept layers
_INTEGERS, _SCALES = 0, 1  # places in what a layer becomes


class Layout(Protocol):
    """How a format keeps rounded layers."""

    def grid(self, width: int) -> IntegerGrid:
        """How a matrix with rows of ``width`` weights is rounded."""

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What scales are stored in, where the weights were in ``dtype``."""

    def specs(self, owner: str, size: tuple[int, int], dtype: torch.dtype) -> list[Spec]:
        """What a layer becomes: its integers, its scales, and whatever else there is."""

    def stored(self, integers: Tensor) -> Tensor:
        """Some rows of int8 as they are kept."""

    def rest(self, spec: Spec, size: tuple[int, int]) -> Tensor:
        """What is neither integers nor scales."""

    def notes(self, widths: Mapping[str, int]) -> list[str]:
        """What a user should know; names of the layers → weights in a row."""

    def quantization_config(
        self, widths: Mapping[str, int], ignored: Collection[str]
    ) -> dict[str, Any]:
        """What config.json must say, so that readers open the folder as it is."""

    def metadata(
        self, layers: Mapping[str, tuple[int, torch.dtype]], others: Sequence[str]
    ) -> dict[str, str] | None:
        """The safetensors header's free text; None is the usual one.

        Args:
            layers: names of the quantized weights → weights in a row, and the model's dtype.
            others: names of all other tensors.
        """


class IntegerPlan:
    """What the folder of a source will hold; refuses before anything is written.

    Args:
        source: the model, unquantized.
        layout: the format.
        calibration: rows to fit the rounding to; None rounds each weight by itself.

    Raises:
        ModelError: transformers does not know the architecture, or the format cannot express it.
    """

    def __init__(
        self, source: MergedTensors, layout: Layout, calibration: Calibration | None = None
    ) -> None:
        self.source, self.layout, self.calibration = source, layout, calibration
        skeleton = models.build_skeleton(source.config)
        linears = quantized_linears(skeleton, quantization.unquantized_modules(skeleton))
        self._layers = LayerRows(source, linears, groups=False)
        self._weights = {  # checkpoint name of a quantized weight → its layer's name
            name: owner
            for name in source.names()
            if (owner := source.module(name).removesuffix(".weight")) in linears
            and source.module(name) != owner
        }
        _require_expressible(skeleton, linears, self._weights)
        self._ignored = {
            name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)
        } - set(self._weights.values())
        self._parents: dict[str, tuple[str, int]] = {}  # written → the source's name, which part
        self._scales: tuple[str, Tensor] | None = None  # of the layer that was written last
        self._tally = DeltaTally()
        self._fitted: dict[str, ShardedCheckpoint] = {}  # a layer's name → where it is kept
        self.specs = [spec for name in source.names() for spec in self._specs(name)]
        self.notes = layout.notes(self._widths)
        self.targets = self._targets(skeleton) if calibration is not None else {}

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor_bytes(shape, dtype) for _, shape, dtype in self.specs)

    @property
    def fitted_bytes(self) -> int:
        """Bytes of the layers that are kept beside the files while these are written."""
        return sum(target.bytes for target in self.targets.values())

    def _targets(self, skeleton: nn.Module) -> dict[str, Target]:
        """The layers that can be fitted to rows: those of the model's one stack."""
        stacks = list(layer_stacks(skeleton))
        if len(stacks) != 1:
            self.notes.append("rounded to nearest, not fitted to rows: the model has not one stack "
                              "of layers")  # fmt: skip
            return {}
        return {
            owner: Target(size, self.layout.grid(size[1]), self._scale_dtype(name))
            for name, owner in self._weights.items()
            if owner.startswith(f"{stacks[0]}.") and (size := self._layers.size(name))
        }

    def use_fitted(self, places: Sequence[Path]) -> None:
        """Takes the layers from where `qft.export.error_compensation` has kept them."""
        for place in places:
            kept = ShardedCheckpoint(place)
            ends = (name for name in kept.names() if name.endswith(".weight"))
            self._fitted |= {name.removesuffix(".weight"): kept for name in ends}
        missed = len(self.targets) - len(self._fitted)
        assert self.calibration is not None
        rows = f"{self.calibration.rows} rows of {self.calibration.name}"
        self.notes.append(f"{len(self._fitted)} layers were fitted to {rows}")
        if missed:
            self.notes.append(f"{missed} layer(s) that no row comes to were rounded to nearest")

    @property
    def _widths(self) -> dict[str, int]:
        return {owner: self._layers.size(name)[1] for name, owner in self._weights.items()}

    def quantization_config(self) -> dict[str, Any]:
        """What config.json must say, so that readers open the folder as it is."""
        return self.layout.quantization_config(self._widths, self._ignored)

    def metadata(self) -> dict[str, str] | None:
        """The safetensors header's free text; None is the usual one."""
        layers = {
            f"{owner}.weight": (self._layers.size(name)[1], self.source.dtype(name))
            for name, owner in self._weights.items()
        }
        others = [self.source.module(n) for n in self.source.names() if n not in self._weights]
        return self.layout.metadata(layers, others)

    def _specs(self, name: str) -> list[Spec]:
        """Everything one tensor of the source becomes."""
        dtype = self.source.dtype(name)
        if name in self._weights:
            specs = self.layout.specs(self._weights[name], self._layers.size(name), dtype)
        else:
            specs = [(self.source.module(name), self.source.shape(name), dtype)]
        self._parents |= {spec[0]: (name, place) for place, spec in enumerate(specs)}
        return specs

    def produce(self, written: str) -> Iterable[Tensor]:
        """One tensor of the folder in blocks of rows, in any order; their own is the cheapest."""
        name, place = self._parents[written]
        if name not in self._weights:
            return self.source.blocks(name)
        if place == _INTEGERS:
            return self._integers(name)
        if place == _SCALES:
            return [self._scales_of(name)]
        size = self._layers.size(name)
        specs = self.layout.specs(self._weights[name], size, self.source.dtype(name))
        return [self.layout.rest(specs[place], size)]

    def _integers(self, name: str) -> Iterator[Tensor]:
        found = []
        for integers, scales in self._rounded(name):
            found.append(scales)
            yield self.layout.stored(integers)
        self._scales = (name, torch.cat(found))

    def _scales_of(self, name: str) -> Tensor:
        """A layer's scales; found again where a write goes on after its integers."""
        if self._scales is None or self._scales[0] != name:
            self._scales = (name, torch.cat([scales for _, scales in self._rounded(name)]))
        return self._scales[1]

    def _rounded(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        owner = self._weights[name]
        kept = self._fitted.get(owner)
        if kept is not None:
            for part in row_blocks(self._layers.size(name)):
                places = range(part.start, part.stop)
                yield (kept.read_rows(f"{owner}.weight", places),
                       kept.read_rows(f"{owner}.weight_scale", places))  # fmt: skip
            return
        for block in self._layers.blocks(name):
            integers, scales = self._nearest(block.merged, name)
            if block.changed:
                self._count(block, name, from_integers(integers, scales))
            yield integers, scales

    def _scale_dtype(self, name: str) -> torch.dtype:
        return self.layout.scale_dtype(self.source.dtype(name))

    def _nearest(self, rows: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Integers and scales of some rows, each weight rounded by itself."""
        grid = self.layout.grid(rows.shape[1])
        try:
            scales = find_scales(rows, grid, self._scale_dtype(name))
        except ModelError as error:
            raise ModelError(error.what, where=name, found=error.found) from None
        return to_integers(rows, scales, grid), scales

    def _count(self, block: Block, name: str, stored: Tensor) -> None:
        assert block.base is not None
        plain = from_integers(*self._nearest(block.base, name))
        self._tally.add(stored, plain, block.base, block.merged)

    @property
    def fitted(self) -> list[str]:
        """What decides how the layers are fitted to rows; empty where they are not."""
        if self.calibration is None:
            return []
        return [self.calibration.fingerprint, self.calibration.device]

    def close(self) -> None:
        """Closes the kept layers' files."""
        for kept in {id(kept): kept for kept in self._fitted.values()}.values():
            kept.close()

    def delta_rounding(self) -> DeltaRounding | None:
        """What became of the adapter's change, once all was produced."""
        return self._tally.result()


def _require_expressible(
    skeleton: nn.Module, linears: dict[str, bool], weights: dict[str, str]
) -> None:
    found = type(skeleton).__name__
    if skeleton.config.is_encoder_decoder:  # type: ignore[union-attr]
        raise ModelError(
            "Encoder-decoders are not written in this format: transformers cannot open all of them "
            "(T5's layers set up weights that are packed).", found=found,
            fix="export to bnb or safetensors",
        )  # fmt: skip
    if any(linears.values()):
        raise ModelError(
            "This family's layers hold their weights transposed, for which the format has no word.",
            found=found, fix="export to gguf or safetensors",
        )  # fmt: skip
    if not weights:
        raise ModelError("This model has no linear layer to quantize.", found=found)


def write_integers(
    plan: IntegerPlan,
    out: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes the quantized model folder; a write that was killed goes on where it was.

    Raises:
        OutputExistsError: ``out`` is taken.
        SaveError: the disk is full; nothing is left behind and nothing that existed has changed.
    """
    source = plan.source
    needed = plan.bytes + plan.fitted_bytes + files_bytes(source.files) + _HEADER_SLACK_BYTES
    require_disk(out, max(0, needed - folder_bytes(unfinished(out))))
    described = plan.quantization_config()
    with new_folder(out, overwrite=overwrite, go_on=True) as folder:
        facts = {"quantized": described, "max_shard_bytes": max_shard_bytes, "fitted": plan.fitted}
        journal = WriteJournal(folder, identity(source, **facts))
        if plan.calibration is not None and plan.targets:
            plan.use_fitted(fit_layers(source, plan.targets, plan.calibration, folder / _FITTED,
                                       progress))  # fmt: skip
        write_config(source, folder, quantization_config=described)
        copy_files(source.files, folder)
        write_shards(
            folder, plan.specs, plan.produce, max_shard_bytes=max_shard_bytes,
            metadata=plan.metadata(), progress=progress, journal=journal,
        )  # fmt: skip
        plan.close()
        shutil.rmtree(folder / _FITTED, ignore_errors=True)
        journal.close()
