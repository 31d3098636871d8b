"""Several adapters as one merge: their updates are combined block by block, on the weights.

An adapter's update of some rows is what its own merge makes of them, less the rows. So every kind
of adapter that can be merged can be combined with every other, and whatever works on a merge works
on this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qft.errors import AdapterError
from qft.lean.combining import Combination, combined_rows
from qft.lean.magnitudes import smallest_kept
from qft.lean.model_parts import transposed_weights
from qft.shards import BLOCK_NUMBERS, row_blocks
from qft.strategy import BaseTensors, Context, Merge, Needs, Rows, Strategy


class SeveralMerge:
    """A :class:`qft.strategy.Merge` made of merges.

    Args:
        merges: of one base, opened.
        how: its method must be one that needs no factors.
        base: the tensors the merges were opened on.

    Raises:
        AdapterError: they add tensors that do not fit together.
    """

    def __init__(self, merges: Sequence[Merge], how: Combination, base: BaseTensors) -> None:
        self._merges, self._how, self._base = list(merges), how, base
        self._shapes = {name: base.shape(name) for name in base.names()}
        self._own = [merge.added() for merge in merges]
        self._thresholds: dict[str, list[float]] = {}  # by tensor; a number an adapter
        # what has no counterpart in the base has no update either
        names = [name for own in self._own for name in own]
        self._new = {name: self._mean(name) for name in dict.fromkeys(names) if self._is_new(name)}
        self._changes = _agreed([merge.config_changes() for merge in merges])

    def _is_new(self, name: str) -> bool:
        shapes = {tuple(own[name].shape) for own in self._own if name in own}
        return shapes != {self._shapes.get(name)}

    def _mean(self, name: str) -> Rows:
        """A tensor the base has not, or not in this shape: the weighted mean of the adapters'."""
        held = [(weight, own[name])
                for weight, own in zip(self._how.weights, self._own, strict=True)
                if name in own]  # fmt: skip
        if len(held) == 1:
            return held[0][1]
        shapes = sorted({tuple(rows.shape) for _, rows in held})
        total = sum(weight for weight, _ in held)
        if len(shapes) > 1 or total <= 0:
            raise AdapterError(
                "A tensor that the base has not cannot be made of the adapters' own.",
                where=name,
                found=" and ".join(map(str, shapes)) if len(shapes) > 1
                else f"weights that add up to {total:g}: there is no mean of them",
                fix="merge adapters of the same classes, with weights that add up to more than 0",
            )  # fmt: skip
        return _Mean(tuple((weight / total, rows) for weight, rows in held))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a merged tensor."""
        return tuple(self._new[name].shape) if name in self._new else self._shapes[name]

    def edit(self, name: str, rows: Tensor, start: int = 0) -> Tensor:
        """The rows with the combined update, float32; themselves where no adapter changes them."""
        if not rows.shape:
            parts = {n: part[None] for n, part in self._parts(name, rows, start).items()}
            return rows.float() + self._combined(name, parts, 0)[0] if parts else rows
        result = rows
        for block in self._blocks(rows.shape):
            parts = self._parts(name, rows[block], start + block.start)
            if not parts:
                continue
            if result is rows:
                result = torch.empty_like(rows, dtype=torch.float32).copy_(rows)
            result[block] += self._combined(name, parts, start + block.start)
        return result

    def _combined(self, name: str, parts: Mapping[int, Tensor], start: int) -> Tensor:
        thresholds = self._kept(name)
        return combined_rows(parts, self._how, name, start=start, thresholds=thresholds)

    def _blocks(self, shape: Sequence[int]) -> Iterator[slice]:
        """Small enough that the updates and what is made of them take about two blocks."""
        return row_blocks(shape, BLOCK_NUMBERS // (2 * len(self._merges)))

    def _parts(self, name: str, rows: Tensor, start: int) -> dict[int, Tensor]:
        """By number, the updates of some rows by the adapters that change them."""
        parts, before = {}, rows.float()
        for number, (merge, own) in enumerate(zip(self._merges, self._own, strict=True)):
            if name in own:
                edited = own[name][start : start + len(rows)] if rows.shape else own[name][:]
            else:
                edited = merge.edit(name, rows, start)
            if edited is not rows:
                parts[number] = edited.float() - before
        return parts

    def _kept(self, name: str) -> Sequence[float]:
        """By number, the smallest magnitude that is kept of each adapter's update of a tensor."""
        if not self._how.by_magnitude:
            return ()
        if name not in self._thresholds:
            shape = self._shapes[name]
            size = torch.Size(shape).numel()
            kept = int((self._how.density or 1.0) * size)
            self._thresholds[name] = smallest_kept(
                lambda: self._pass(name), len(self._merges), kept
            )
        return self._thresholds[name]

    def _pass(self, name: str) -> Iterator[Mapping[int, Tensor]]:
        """The updates of one tensor from its first row to its last."""
        shape = self._shapes[name]
        if not shape:
            yield self._parts(name, self._base.read(name), 0)
            return
        for block in self._blocks(shape):
            rows = self._base.read_rows(name, range(block.start, block.stop))
            yield self._parts(name, rows, block.start)

    def added(self) -> Mapping[str, Rows]:
        """Trained heads of which the base has none, or none of this width."""
        return self._new

    def config_changes(self) -> Mapping[str, Any]:
        """What any of them sets."""
        return self._changes


@dataclass(frozen=True)
class _Mean:
    """The weighted mean of tensors, computed where it is read."""

    held: tuple[tuple[float, Rows], ...]  # the weights add up to 1

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.held[0][1].shape)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def __getitem__(self, rows: slice) -> Tensor:
        parts = [tensor[rows].float() * weight for weight, tensor in self.held]
        return torch.stack(parts).sum(0)


def _agreed(changes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    agreed: dict[str, Any] = {}
    for change in changes:
        for key, value in change.items():
            if agreed.setdefault(key, value) != value:
                raise AdapterError("The adapters want different settings of the merged model.",
                                   where=key, found=f"{agreed[key]} and {value}")  # fmt: skip
    return agreed


class Several(Strategy):
    """Several adapters that act as one; made by :func:`qft.merging.together.located`, in no recipe.

    Attributes:
        parts: their strategies.
        folders: where they are.
        how: they are combined.
    """

    name: ClassVar[str] = "several"

    parts: tuple[Strategy, ...]
    folders: tuple[Path, ...]
    how: Combination

    @property
    def mergeable(self) -> bool:
        """Whether all of them are."""
        return all(part.mergeable for part in self.parts)

    @property
    def advice(self) -> str:
        """Of the first that is not mergeable."""
        return next((p.advice for p in self.parts if not p.mergeable), super().advice)

    def needs(self, skeleton: nn.Module) -> Needs:
        """What any of them wants in full precision."""
        names = (name for part in self.parts for name in part.needs(skeleton).full_precision)
        return Needs(full_precision=tuple(dict.fromkeys(names)))

    def open_merge(self, folder: Path, base: BaseTensors) -> Merge:
        """Opens all of them; ``folder`` is the first one's."""
        merges = [part.open_merge(one, base)
                  for part, one in zip(self.parts, self.folders, strict=True)]  # fmt: skip
        return SeveralMerge(merges, self.how, base)

    def files(self, folder: Path) -> list[Path]:
        """All of them; the settings of the combination are this strategy's own."""
        pairs = zip(self.parts, self.folders, strict=True)
        return [path for part, one in pairs for path in part.files(one)]

    def attach(self, model: nn.Module, context: Context) -> nn.Module:
        """Freezes the model; nothing of these adapters trains."""
        return model.requires_grad_(False)

    def load(self, model: nn.Module, folder: Path) -> None:
        """Merges them into a model in memory: the reference a merged one on disk is judged by.

        Raises:
            AdapterError: the model's weights are quantized, or lack what the adapters bring.
        """
        held = model.state_dict()
        before = {name: tensor.cpu().clone() for name, tensor in held.items()}
        merge = self.open_merge(folder, _HeldTensors(model, before))
        new = merge.added()
        missing = [n for n, rows in new.items() if n not in held or held[n].shape != rows.shape]
        if missing:
            raise AdapterError("The model has no place for what the adapters bring.",
                               where=folder, found=missing[0])  # fmt: skip
        for name, tensor in held.items():
            merged = new[name][:] if name in new else merge.edit(name, before[name])
            if merged is before[name]:
                continue
            if any(name != other and held[other].data_ptr() == tensor.data_ptr() for other in held):
                tensor = _untied(model, name)
            with torch.no_grad():
                tensor.copy_(merged)


def _untied(model: nn.Module, name: str) -> Tensor:
    """A parameter's own memory, where it shared another's: their merged values may differ."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    own = nn.Parameter(getattr(module, leaf).detach().clone(), requires_grad=False)
    module.register_parameter(leaf, own)
    return own


@dataclass(frozen=True)
class _HeldTensors:
    """A model's own tensors, as strategies see a base."""

    model: nn.Module
    held: Mapping[str, Tensor]

    @property
    def rounded(self) -> bool:
        return False

    def transposed(self, name: str) -> bool:
        return name in transposed_weights(self.model)

    def shared(self, name: str) -> list[str]:
        own = self.model.state_dict()
        place = own[name].data_ptr()
        return [other for other in own if other != name and own[other].data_ptr() == place]

    def names(self) -> list[str]:
        return list(self.held)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.held[name].shape)

    def read(self, name: str) -> Tensor:
        return self.held[name].cpu()

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        return self.held[name][list(rows)].cpu()

    def read_columns(self, name: str, columns: range) -> Tensor:
        return self.held[name][:, columns.start : columns.stop].cpu()
