"""Several strategies at once: a prefix and LoRA, biases and LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from adapters.edited_rows import EditedRows
from adapters.peft_backed import PeftStrategy
from qft.errors import AdapterError
from qft.strategy import PARTS, BaseTensors, Context, Merge, Needs, Rows, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn


class Stack(Strategy):
    """Trains what each of its parts trains; each part has a folder of its own."""

    name: ClassVar[str] = "stack"

    of: tuple[Strategy, ...] = Field(
        min_length=1,
        description="the parts, each as a strategy's entry: [{name: prefix}, {name: lora}]",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [part.name for part in self.of]
        wrapping = [part.name for part in self.of if isinstance(part, PeftStrategy)]
        if len(set(names)) < len(names):
            raise ValueError("a strategy is named twice")
        if len(wrapping) > 1:
            raise ValueError(f"{' and '.join(wrapping)} both wrap the model; only one of them may")
        if "stack" in names:
            raise ValueError("a stack holds no stack")
        if any(part.objective.kind != "task" for part in self.of):
            raise ValueError("a teacher is the whole stack's: {name: distill, student: "
                             "{name: stack, of: […]}}")  # fmt: skip
        return self

    @property
    def mergeable(self) -> bool:
        """If all parts are."""
        return all(part.mergeable for part in self.of)

    @property
    def advice(self) -> str:
        """Of the first part that cannot be merged."""
        return next((part.advice for part in self.of if not part.mergeable), "")

    @property
    def tasks(self) -> frozenset[str]:
        """Those that every part can train."""
        return frozenset.intersection(super().tasks, *(part.tasks for part in self.of))

    def needs(self, skeleton: nn.Module) -> Needs:
        """What all parts together need."""
        found = [part.needs(skeleton) for part in self.of]
        return Needs(
            full_precision=tuple(dict.fromkeys(n for needs in found for n in needs.full_precision)),
            original_weights=any(needs.original_weights for needs in found),
            calibration_batches=max((needs.calibration_batches for needs in found), default=0),
            lowest_trainable_layer=min((n.lowest_trainable_layer for n in found), default=0),
            extra_positions=sum(needs.extra_positions for needs in found),
            decomposes=any(needs.decomposes for needs in found),
            keeps_start=any(needs.keeps_start for needs in found),
            extends_sequence=any(needs.extends_sequence for needs in found),
        )

    def attach(self, model: nn.Module, context: Context) -> nn.Module:
        """Attaches the part that wraps the model first, the others within it."""
        trained: list[nn.Parameter] = []
        for part in sorted(self.of, key=lambda part: not isinstance(part, PeftStrategy)):
            if isinstance(part, PeftStrategy):
                model = part.attach(model, context)
            else:
                part.attach(_inner(model), context)
            trained += [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:  # each part froze the others'
            parameter.requires_grad_(True)
        return model

    def after_step(self, model: nn.Module, step: int) -> None:
        """Each part's."""
        for part in self.of:
            part.after_step(_seen_by(part, model), step)

    def penalty(self, model: nn.Module) -> Tensor | None:
        """The parts' together."""
        found = [part.penalty(_seen_by(part, model)) for part in self.of]
        terms = [term for term in found if term is not None]
        return sum(terms[1:], terms[0]) if terms else None

    def state(self, model: nn.Module) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Each part's, under its name."""
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        for part in self.of:
            own, values[part.name] = part.state(_seen_by(part, model))
            tensors |= {f"{part.name}:{name}": tensor for name, tensor in own.items()}
        return tensors, values

    def load_state(
        self, model: nn.Module, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Restores each part's."""
        for part in self.of:
            start = f"{part.name}:"
            own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            part.load_state(_seen_by(part, model), own, values[part.name])

    def save(self, model: nn.Module, folder: Path) -> None:
        """One folder a part."""
        import json

        for part in self.of:
            (folder / part.name).mkdir()
            part.save(_seen_by(part, model), folder / part.name)
        names = [part.name for part in self.of]
        (folder / PARTS).write_text(json.dumps({"format": 1, "parts": names}), encoding="utf-8")

    def load(self, model: nn.Module, folder: Path) -> None:
        """Loads every part, exactly."""
        for part in self.of:
            part.load(_seen_by(part, model), folder / part.name)

    def open_merge(self, folder: Path, base: BaseTensors) -> Merge:
        """The parts' edits, one after the other."""
        return StackMerge([part.open_merge(folder / part.name, base) for part in self.of], folder)


class StackMerge:
    """Every part's edits to each block, over what a part puts in its place.

    A part's tensors replace the base's: what the others add to a weight, they were trained to add
    to the replaced one.
    """

    def __init__(self, merges: Sequence[Merge], folder: Path) -> None:
        self._merges = list(merges)
        self._replaced: dict[str, Rows] = {}
        for merge in self._merges:
            for name, tensor in merge.added().items():
                if not _same(tensor, self._replaced.setdefault(name, tensor)):
                    raise AdapterError(
                        "Two parts of the stack hold other values of the same tensor.",
                        where=folder,
                        found=name,
                        fix="merge the folder that one training has saved, with all its parts",
                    )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a merged tensor."""
        if name in self._replaced:
            return tuple(self._replaced[name].shape)
        return self._merges[0].shape(name)

    def edit(self, name: str, rows: Tensor, start: int = 0) -> Tensor:
        """``rows`` themselves, or what the parts make of them."""
        replaced = self._replaced.get(name)
        rows = rows if replaced is None else replaced[start : start + len(rows)]
        return self.edit_others(name, rows, start)

    def edit_others(self, name: str, rows: Tensor, start: int) -> Tensor:
        """What the parts that do not replace a tensor make of its rows."""
        for merge in self._merges:
            if name not in merge.added():
                rows = merge.edit(name, rows, start)
        return rows

    def added(self) -> Mapping[str, Rows]:
        """All parts' together, each edited by the others when it is asked for."""
        return {
            name: EditedRows(rows, partial(self.edit_others, name))
            for name, rows in self._replaced.items()
        }

    def config_changes(self) -> Mapping[str, Any]:
        """All parts' together."""
        return {key: v for merge in self._merges for key, v in merge.config_changes().items()}


def _same(one: Rows, other: Rows) -> bool:
    """Two parts that free one parameter both save it."""
    if one is other or tuple(one.shape) != tuple(other.shape):
        return one is other
    from qft.shards import row_blocks

    return all(bool((one[part] == other[part]).all()) for part in row_blocks(one.shape))


def _seen_by(part: Strategy, model: nn.Module) -> nn.Module:
    return model if isinstance(part, PeftStrategy) else _inner(model)


def _inner(model: Any) -> nn.Module:
    """The transformers model below PEFT's wrapper."""
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner
