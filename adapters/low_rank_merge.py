"""Folds low-rank updates, and what was trained beside them, into a base, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from adapters.edited_rows import EditedRows
from adapters.low_rank_update import Fold, Update, Weight
from qft.errors import AdapterError
from qft.strategy import BaseTensors, LowRank, Rows

if TYPE_CHECKING:
    from torch import Tensor

    from qft.shards import StoredTensor

# what PEFT saves whole where words were added
_VOCABULARY = ("embed_tokens", "lm_head", "wte", "shared", "word_embeddings")
_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Parts:
    """A low-rank adapter's tensors, sorted by what they do.

    Attributes:
        updates: by the weight's name.
        replaced: biases, heads and whatever else was trained whole.
        rows: by the embedding's name: which rows, and their new values.
        heads: names of modules that may be new or of another width than the base's.
        shifts: by the bias's name: what is added to it, and how many times.
        ties: whether tensors that the base ties share what is trained.
    """

    updates: Mapping[str, Update]
    replaced: Mapping[str, StoredTensor]
    rows: Mapping[str, tuple[Sequence[int], StoredTensor]] = field(default_factory=dict)
    heads: frozenset[str] = frozenset()
    shifts: Mapping[str, tuple[StoredTensor, float]] = field(default_factory=dict)
    ties: bool = False


class LowRankMerge:
    """Adds each update to its weight; replaces biases, heads and embeddings' rows."""

    def __init__(
        self, parts: Parts, base: BaseTensors, folder: Path, *, keep_zeros: bool = False
    ) -> None:
        self._parts, self._base, self._folder = parts, base, folder
        self._fold: Fold | None = None  # of the weight whose blocks are being merged
        self._keep_zeros = keep_zeros
        self._shapes = {name: base.shape(name) for name in base.names()}
        for name, tensor in parts.replaced.items():
            self._check_replaced(name, tuple(tensor.shape))
        for name, update in parts.updates.items():
            shape = (update.up.shape[0], update.down.shape[1])
            self._require(name, shape[::-1] if self._transposed(name, update) else shape)
        for name, (shift, _) in parts.shifts.items():
            self._require_bias(name, tuple(shift.shape))
        for name, (places, rows) in parts.rows.items():
            found = self.shape(name) if name in self._shapes else ()
            fits = len(found) == 2 and tuple(rows.shape) == (len(places), found[1])
            if not fits or not all(0 <= place < found[0] for place in places):
                raise self._another_base(name, tuple(rows.shape))

    def _check_replaced(self, name: str, shape: tuple[int, ...]) -> None:
        if "lora_" in name:
            raise AdapterError("The adapter holds half an update.", where=self._folder, found=name)
        found = self._shapes.get(name, ())
        places = name.split(".")
        resized = len(places) > 1 and places[-2] in _VOCABULARY and found[1:] == shape[1:]
        new = bool(self._parts.heads & set(places))
        if not (resized or new) and found != shape:
            raise self._another_base(name, shape)

    def _require_bias(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._shapes:
            raise AdapterError(
                "The adapter adds to a bias that the layer has not, and no tensor of the merged "
                "model could hold the sum.",
                where=f"{self._folder}: {name}",
                found="lora_bias",
                fix="use base and adapter unmerged, or train without lora_bias",
            )
        self._require(name, shape)

    def _require(self, name: str, shape: tuple[int, ...]) -> None:
        found = self.shape(name) if name in self._shapes else None
        if found != shape:
            raise self._another_base(name, shape)

    def _another_base(self, name: str, shape: tuple[int, ...]) -> AdapterError:
        return AdapterError(
            "The adapter was made for another base model.",
            where=f"{self._folder}: {name}",
            found=f"adapter {shape}, base {self._shapes.get(name) or 'has no such tensor'}",
            fix="name the base model it was trained on",
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a merged tensor."""
        replaced = self._part(self._parts.replaced, name, self._parts.ties)
        return self._shapes[name] if replaced is None else tuple(replaced.shape)

    def edit(self, name: str, rows: Tensor, start: int = 0) -> Tensor:
        """``rows`` themselves, or the merged ones in float32."""
        replaced = self._part(self._parts.replaced, name, self._parts.ties)
        if replaced is not None:
            rows = replaced[start : start + len(rows)]
        return self._edit(name, rows, start)

    def _edit(self, name: str, rows: Tensor, start: int) -> Tensor:
        """What is done to some rows of the base, or of what took its place."""
        own = self._part(self._parts.rows, name, True)
        if own is not None:
            rows = _with_own_rows(own, rows, start)
        if name in self._parts.shifts:
            shift, scale = self._parts.shifts[name]
            return rows.float() + shift[start : start + len(rows)].float() * scale
        update = self._part(self._parts.updates, name, self._parts.ties)
        if update is None:
            return rows
        if self._fold is None or self._fold.name != name:
            self._fold = None  # frees the weight before
            weight = self._weight(name, self._transposed(name, update))
            self._fold = Fold(name, update, weight, keep_zeros=self._keep_zeros)
        return self._fold.edit(rows, start)

    def _part(self, parts: Mapping[str, _Part], name: str, ties: bool) -> _Part | None:
        """What a part of the adapter holds for a tensor, or for one that it is tied to."""
        if name in parts or not ties:
            return parts.get(name)
        return next((parts[n] for n in self._base.shared(name) if n in parts), None)

    def _transposed(self, name: str, update: Update) -> bool:
        return update.lookup or self._base.transposed(name)

    def _weight(self, name: str, transposed: bool) -> Weight:
        replaced = self._part(self._parts.replaced, name, self._parts.ties)
        if replaced is not None:
            return Weight(tuple(replaced.shape), replaced.read, replaced.columns, transposed)
        return Weight(
            self._shapes[name],
            partial(self._base.read, name),
            partial(self._base.read_columns, name),
            transposed,
        )

    def added(self) -> Mapping[str, Rows]:
        """A trained head, trained biases, a vocabulary with more words."""
        return {
            name: EditedRows(tensor, partial(self._edit, name))
            if self._part(self._parts.updates, name, self._parts.ties)
            or self._part(self._parts.rows, name, True)
            or name in self._parts.shifts
            else tensor
            for name, tensor in self._parts.replaced.items()
        }

    def factors(self) -> Mapping[str, LowRank]:
        """See :class:`qft.strategy.Factored`."""
        parts, updates = self._parts, self._parts.updates.values()
        beside = [n for n, t in parts.replaced.items() if not self._is_the_bases(n, t)]
        beside += parts.shifts
        problems = {
            "DoRA's magnitudes": any(update.magnitude for update in updates),
            "an update of embeddings": any(update.lookup for update in updates),
            "trained token rows": bool(parts.rows),
            f"tensors trained whole: {', '.join(beside[:3])}{' …' * (len(beside) > 3)}": beside,
            "keep_zeros": self._keep_zeros,
            "a start that changed the base": any(update.start for update in updates),
        }
        found = [text for text, there in problems.items() if there]
        if found:
            raise AdapterError(
                "This adapter is more than low-rank updates of layers, and cannot stand apart from "
                "its base in this format.",
                where=self._folder,
                found="; ".join(found),
                fix="export base and adapter as one model: --format gguf:q8_0",
            )
        kept = {name: update.apart(self._transposed(name, update))
                for name, update in parts.updates.items()}  # fmt: skip
        return {name: update for name, update in kept.items() if update.rank}

    def _is_the_bases(self, name: str, tensor: StoredTensor) -> bool:
        """Whether it is a copy of the base's own, as PEFT saves a head beside an update of it."""
        import torch

        from qft.shards import row_blocks

        if self._shapes.get(name) != tuple(tensor.shape):
            return False
        return all(
            torch.equal(self._base.read_rows(name, range(part.start, part.stop)), tensor[part])
            for part in row_blocks(tensor.shape)
        )

    def config_changes(self) -> Mapping[str, Any]:
        """None: what a larger vocabulary needs is told by its shape."""
        return {}


def _with_own_rows(own: tuple[Sequence[int], StoredTensor], rows: Tensor, start: int) -> Tensor:
    places, values = own
    here = [(at, place - start) for at, place in enumerate(places)
            if start <= place < start + rows.shape[0]]  # fmt: skip
    if not here:
        return rows
    changed = rows.float()
    changed = changed.clone() if changed is rows else changed
    for at, place in here:
        changed[place] = values[at : at + 1][0].float()
    return changed
