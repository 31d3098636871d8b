"""Linear layers rounded to integers so that the later weights of a row make up for the earlier.

What a layer's inputs look like is seen on calibration rows; the matrix is then rounded column by
column, and the columns behind move to where the output changes least (`qft.column_sweep`). A
group's scales are searched when its first column is reached, on the weights as they are by then,
and a column's squared error counts by the mean square of its input. The next layer sees what the
rounded ones below it make.

Source: Frantar et al. 2022, "GPTQ", https://arxiv.org/abs/2210.17323.

In memory: what the stream holds (one layer in float32, the hidden states of all rows), one Hessian
and one matrix. A layer that is done lies on the disk with its hashes; a later try takes it from
there and only runs it, so that the rest comes out the same, to the byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qft.calibration import Calibration
from qft.column_sweep import sweep_
from qft.errors import ModelError
from qft.export.integer_rounding import IntegerGrid, find_scales, from_integers
from qft.files import manifest_problem, new_folder, write_manifest
from qft.input_groups import input_groups
from qft.input_hessian import Factor, factorise_
from qft.layer_stream import StreamedLayer
from qft.merging.merge import Progress
from qft.merging.tensors import MergedTensors
from qft.shard_writer import write_shards
from qft.shards import ShardedCheckpoint, tensor_bytes

_BLOCK = 128  # columns between two updates of the rest; groups of scales lie within one


@dataclass(frozen=True)
class Target:
    """How one matrix is rounded.

    Attributes:
        size: ``(out, in)``.
        grid: of its integers.
        dtype: of its scales.
    """

    size: tuple[int, int]
    grid: IntegerGrid
    dtype: torch.dtype

    @property
    def specs(self) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and dtype of what a layer is kept as, by the end of its name."""
        height, width = self.size
        return {
            "weight": (self.size, torch.int8),
            "weight_scale": ((height, self.grid.groups(width)), self.dtype),
        }

    @property
    def bytes(self) -> int:
        """Of what a layer is kept as."""
        return sum(tensor_bytes(shape, dtype) for shape, dtype in self.specs.values())


def fit_layers(
    source: MergedTensors,
    targets: Mapping[str, Target],
    calibration: Calibration,
    folder: Path,
    progress: Progress | None = None,
) -> list[Path]:
    """Rounds layer after layer into ``folder``; those that are there already are not done again.

    Args:
        targets: name of a linear layer in the model's stack → how it is rounded.
        progress: called with the bytes just kept.

    Returns:
        Each layer's folder: int8 ``NAME.weight`` and ``NAME.weight_scale`` of every target that the
        rows came to.

    Raises:
        ModelError: the model cannot be streamed, or is not finite on the rows.
        SaveError: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = []
    for layer in calibration.stream(source).layers():
        prefix = f"{layer.name}."
        own = {name: target for name, target in targets.items() if name.startswith(prefix)}
        linears: dict[str, nn.Linear] = {
            name: layer.module.get_submodule(name.removeprefix(prefix))  # type: ignore[misc]
            for name in own
        }
        place = folder / f"layer-{layer.index:05d}"
        if manifest_problem(place) is None:
            _put_kept(place, linears)
        else:
            _keep(place, own, fit_layer(layer, linears, own))
        places.append(place)
        if progress is not None:
            progress(sum(target.bytes for target in own.values()))
    return places


def _keep(place: Path, own: Mapping[str, Target], found: Mapping[str, Tensor]) -> None:
    specs = [
        (f"{name}.{end}", shape, dtype)
        for name, target in own.items()
        for end, (shape, dtype) in target.specs.items()
        if f"{name}.{end}" in found
    ]
    with new_folder(place, overwrite=True) as unfinished:
        write_shards(unfinished, specs, lambda name: [found[name]])
        write_manifest(unfinished)


def _put_kept(place: Path, linears: Mapping[str, nn.Linear]) -> None:
    with ShardedCheckpoint(place) as kept:
        for name in set(linears) & {held.removesuffix(".weight") for held in kept.names()}:
            integers = kept.read(f"{name}.weight")
            scales = kept.read(f"{name}.weight_scale").float()
            linears[name].weight.data.copy_(from_integers(integers, scales))


@torch.no_grad()
def fit_layer(
    layer: StreamedLayer, linears: Mapping[str, nn.Linear], targets: Mapping[str, Target]
) -> dict[str, Tensor]:
    """Rounds a layer's matrices, here and in the layer; what no row comes to is left alone.

    Returns:
        On the CPU: int8 ``NAME.weight``, ``NAME.weight_scale``.
    """
    found: dict[str, Tensor] = {}
    for group in input_groups(layer, linears):
        hessian = group.taken()
        counts = hessian.diagonal().flip(0).clone()
        factor = factorise_(hessian, group.names[0], instead="--no-calibrate")
        for name in group.names:
            weight, target = linears[name].weight.data, targets[name]
            try:
                integers, scales = fit_matrix_(weight, factor, counts, target)
            except ModelError as error:
                raise ModelError(error.what, where=name, found=error.found,
                                 fix="--no-calibrate") from None  # fmt: skip
            found |= {f"{name}.weight": integers.cpu(), f"{name}.weight_scale": scales.cpu()}
        del factor, hessian  # before the next group's is gathered
    return found


def fit_matrix_(
    weight: Tensor, factor: Factor, importance: Tensor, target: Target
) -> tuple[Tensor, Tensor]:
    """Rounds one matrix in place.

    Args:
        weight: ``[out, in]``, float32.
        factor: of the Hessian of its inputs.
        importance: ``[in]``: the Hessian's diagonal.

    Returns:
        int8 ``[out, in]``, and scales ``[out, groups]`` in the target's dtype.
    """
    rounded = _Rounded(weight, importance, target)
    sweep_(weight, factor, _BLOCK, rounded)
    return rounded.integers.t().contiguous(), torch.cat(rounded.scales, 1)


class _Rounded:
    """What becomes of a column, as :func:`qft.column_sweep.sweep_` asks for it."""

    def __init__(self, weight: Tensor, importance: Tensor, target: Target) -> None:
        self._importance, self._target = importance, target
        self.integers = torch.empty(weight.shape[::-1], dtype=torch.int8, device=weight.device)
        self.scales: list[Tensor] = []
        self._group = target.grid.group or weight.shape[1]
        if self._group > _BLOCK:  # a whole row's scale, before anything has moved
            self._search(weight, slice(0, self._group))

    def _search(self, rows: Tensor, part: slice) -> None:
        grid = IntegerGrid(self._target.grid.bits)
        found = find_scales(rows, grid, self._target.dtype, self._importance[part])
        self.scales.append(found)

    def __call__(self, begin: int, at: int, columns: Tensor, pivots: Tensor) -> Tensor:
        column = begin + at
        if self._group <= _BLOCK and column % self._group == 0:
            rows = columns[at : at + self._group].t()
            self._search(rows, slice(column, column + self._group))
        scales = self.scales[-1][:, 0].float()
        grid = self._target.grid
        integers = (columns[at] / scales).round_().clamp_(grid.least, grid.most)
        self.integers[column] = integers.to(torch.int8)
        return integers.mul_(scales)
