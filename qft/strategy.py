"""The strategy contract: which parameters train, and towards what.

A strategy is a frozen, validated settings object: its class *is* its recipe entry. What changes
while training hangs on the model, never on the strategy. Only `name` and `attach` must be written;
everything else has a default. `adapters/lora.py` is the example to read next to this page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

from pydantic import BaseModel, ConfigDict

from qft.errors import AdapterError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qft.lean.combining import Combination

PARTS = "parts.json"  # in an adapter folder whose sub-folders are a stack's parts
ALL_TASKS = frozenset({"text", "instruct", "chat", "seq2seq", "classify", "extract", "token"})


@dataclass(frozen=True)
class Needs:
    """What a strategy wants before the model is loaded."""

    full_precision: tuple[str, ...] = ()  # names of modules that must not be quantized
    original_weights: bool = False  # will call `context.original_weight`
    calibration_batches: int = 0  # how many collated training batches it wants in the context
    lowest_trainable_layer: int = 0  # nothing below this decoder or encoder layer trains
    extra_positions: int = 0  # before the first token, of those the model has
    extends_sequence: bool = False  # puts tokens of its own before each row
    decomposes: bool = False  # takes the singular values of each target's weight as it attaches
    keeps_start: bool = False  # holds, and saves, the trained tensors' first values beside them


@dataclass(frozen=True)
class Context:
    """What the run tells a strategy when it attaches; on a meta skeleton, all may be absent."""

    task: str = "text"
    total_steps: int | None = None
    seed: int = 0
    quantized: bool | None = None  # whether the base's weights are or will be; None is unknown
    calibration: Sequence[Mapping[str, Tensor]] = ()  # on a meta skeleton: to count, not to run
    original_weight: Callable[[str], Tensor] | None = None  # by parameter name, unquantized
    tokenize: Callable[[str], list[int]] | None = None  # a text's tokens, without special ones


@dataclass(frozen=True)
class Objective:
    """What the training minimises. `qft.distillation` executes every kind but the task's own.

    Attributes:
        whole_model: whether layers below all that trains must run all the same.
    """

    kind: str = "task"
    whole_model: bool = False


class BaseTensors(Protocol):
    """The base model's tensors under *module* names, read one at a time from its files."""

    @property
    def rounded(self) -> bool:
        """Whether quantized layers read as training saw them; else they are the original ones."""

    def names(self) -> Sequence[str]:
        """Every tensor's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""

    def read(self, name: str) -> Tensor:
        """The tensor itself."""

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some of its rows, in the order asked for."""

    def read_columns(self, name: str, columns: range) -> Tensor:
        """Some neighbouring columns of a matrix, ``[rows, len(columns)]``."""

    def transposed(self, name: str) -> bool:
        """Whether a layer's weight is stored ``[in, out]``, as GPT-2's Conv1D does."""

    def shared(self, name: str) -> Sequence[str]:
        """The other names of a tensor that the base ties to them."""


class Rows(Protocol):
    """A tensor whose rows are had by slicing: a torch tensor, or one that lies in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """All of it."""

    @property
    def dtype(self) -> torch.dtype:
        """Of every slice."""

    def __getitem__(self, rows: slice) -> Tensor:
        """The rows of a slice without a step."""


class Merge(Protocol):
    """A saved adapter, opened without a model, ready to change the base block by block of rows.

    A block is as many whole rows as fit into a few MiB, so that no tensor is too large to merge.
    """

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a merged tensor, added ones included."""

    def edit(self, name: str, rows: Tensor, start: int = 0) -> Tensor:
        """The merged value of the rows of base tensor `name` that begin with row `start`.

        Where nothing changes in them, the very same object. What is computed is float32. A tensor
        that the base ties is asked for by each of its names: where they are no longer the same,
        the merged model is untied.
        """

    def added(self) -> Mapping[str, Rows]:
        """Tensors the base does not have (a trained head); they may also replace one it has."""

    def config_changes(self) -> Mapping[str, Any]:
        """Keys to set in the merged model's config.json."""


@dataclass(frozen=True)
class LowRank:
    """An update of one weight, ``scale · up @ down``, read when it is wanted.

    Attributes:
        shape: of the update, ``(out, in)``.
        rank: how many columns ``up`` has, and rows ``down``.
        transposed: whether the base stores the weight ``[in, out]``.
        up: some rows of it, float32 ``[rows, rank]``.
        down: all of it, float32 ``[rank, in]``.
    """

    shape: tuple[int, int]
    rank: int
    scale: float
    transposed: bool
    up: Callable[[slice], Tensor]
    down: Callable[[], Tensor]


@runtime_checkable
class Factored(Protocol):
    """A :class:`Merge` that may be nothing but low-rank updates: what a runtime can add itself."""

    def factors(self) -> Mapping[str, LowRank]:
        """The whole change, by the weight's name.

        Raises:
            AdapterError: it is more than that; says what.
        """


class Strategy(BaseModel):
    """One way to fine-tune: subclass it, set `name`, write `attach`, register it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    name: ClassVar[str]
    paper: ClassVar[str] = ""

    @property
    def mergeable(self) -> bool:
        """Whether the result can be folded into the base's own tensors."""
        return False

    @property
    def advice(self) -> str:
        """Where it is not mergeable: what to do instead."""
        return "keep it as an adapter beside its base, or train {name: lora}"

    @property
    def tasks(self) -> frozenset[str]:
        """The tasks it can train."""
        return ALL_TASKS

    @property
    def handed_over(self) -> Strategy:
        """Whose folder `save` writes; a wrapper's is what it wraps."""
        return self

    @property
    def objective(self) -> Objective:
        """What is minimised: the task's own loss unless said otherwise."""
        return Objective()

    def needs(self, skeleton: nn.Module) -> Needs:
        """Asked on a model on the meta device, before any weight is loaded."""
        return Needs()

    def attach(self, model: nn.Module, context: Context) -> nn.Module:
        """Freezes everything, then adds or frees what trains.

        Raises:
            RecipeError: nothing in this model matches the settings.
        """
        raise NotImplementedError

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after each optimizer step (`step` counts from 1), gradients still in place."""

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A scalar added once to each optimizer step's loss, or None."""
        return None

    def state(self, model: nn.Module) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """What a checkpoint must hold beside the adapter: tensors, and JSON."""
        return {}, {}

    def load_state(
        self, model: nn.Module, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Restores what `state` returned, exactly."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes the adapter into the empty `folder`, in PEFT's format where it has one."""
        raise NotImplementedError

    def load(self, model: nn.Module, folder: Path) -> None:
        """Loads a saved adapter, exactly, into a model this strategy is attached to."""
        raise NotImplementedError

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """Rebuilds the settings from an adapter folder, or None where it is another's."""
        return None

    def open_merge(self, folder: Path, base: BaseTensors) -> Merge:
        """Opens a saved adapter for the streamed merge, checked against the base's shapes.

        Raises:
            AdapterError: the adapter belongs to another base.
        """
        raise NotImplementedError

    def files(self, folder: Path) -> Sequence[Path]:
        """The files that `open_merge` reads; a merge that was cut off goes on if none changed."""
        return sorted(path for path in folder.rglob("*") if path.is_file())

    def combine(self, folders: Sequence[Path], how: Combination, out: Path) -> None:
        """Writes into the empty `out` one adapter that does what several of this kind do.

        Raises:
            AdapterError: their parts cannot be combined, or not by this method.
        """
        raise AdapterError(
            f"Several adapters of the strategy {self.name!r} cannot become one adapter.",
            where=out,
            fix="merge them into the base's weights: --space weights",
        )
