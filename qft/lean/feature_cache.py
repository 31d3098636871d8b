"""What lies below everything that trains is computed once a sample, and recalled ever after.

A model is cut at one place: behind the last layer below which nothing trains, or, where only a
task's head trains, before that head (`qft.lean.cut_finding` finds it). While a `Recall` is
installed, the modules below the cut compute nothing: they return a shape without content, and at
the cut stand the stored rows of the samples that the `DropoutClock` was told of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qft.lean.dropout import DropoutClock, Moment
from qft.lean.patching import replace_forward, restore_forward

# the rows of some samples, one after another: [tokens, width], or [samples, width]
Read = Callable[[Sequence[int]], Tensor]


class _ReachedError(Exception):
    """Ends a forward pass at the cut: what lies above it is not wanted."""


@dataclass(frozen=True)
class Outline:
    """What a module returned, without its content.

    Attributes:
        output: of a batch, its tensors on the meta device.
        rows: of that batch.
    """

    output: Any
    rows: int

    def filled(self, moment: Moment, device: torch.device) -> Any:
        """The like for the batch at hand; every tensor is one zero, seen many times."""
        rows = len(moment.packed or moment.samples)

        def zeros(value: Any) -> Any:
            if isinstance(value, Tensor):
                shape = list(value.shape)
                if shape and shape[0] == self.rows:
                    shape[0] = rows
                if len(shape) > 2:
                    shape[1] = moment.width
                return torch.zeros((), dtype=value.dtype, device=device).expand(shape)
            return None  # a cache of keys and values, say

        if isinstance(self.output, Mapping):
            return type(self.output)(**{k: zeros(v) for k, v in self.output.items()})
        if isinstance(self.output, tuple):
            return tuple(zeros(value) for value in self.output)
        return zeros(self.output)


@dataclass(frozen=True)
class Cut:
    """A place to cut a model at.

    Attributes:
        name: of the place, for people and fingerprints.
        layers: the stack's layers below it, the lowest first; empty for a cut before a head.
        answers: how many values a layer returns in a tuple, the hidden states first; 0 is no tuple.
        head: the module before which it is, or None.
        others: further modules below it that need not run, with what they return.
        pooled: a sample is one row, not one a token.
        width: numbers a row.
        dtype: of the rows.
    """

    name: str
    layers: tuple[nn.Module, ...]
    answers: int
    head: nn.Module | None
    others: tuple[tuple[nn.Module, Outline], ...]
    pooled: bool
    width: int
    dtype: torch.dtype

    @property
    def trunk(self) -> list[nn.Module]:
        """All that need not run; none lies within another."""
        return [*(module for module, _ in self.others), *self.layers]

    def answer(self, hidden: Tensor) -> Any:
        """A layer's answer with these hidden states."""
        return (hidden, *[None] * (self.answers - 1)) if self.answers else hidden

    def observe(self, run: Callable[[], Any]) -> Tensor:
        """What reaches the cut when ``run`` runs the model; what lies above does not run.

        Returns:
            ``[rows, length, width]`` or, pooled, ``[rows, width]``.
        """
        seen: list[Tensor] = []

        def before_head(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0])
            raise _ReachedError

        def after_layer(module: nn.Module, arguments: Any, output: Any) -> None:
            seen.append(output[0] if self.answers else output)
            raise _ReachedError

        if self.head is not None:
            handle = self.head.register_forward_pre_hook(before_head, prepend=True)
        else:
            handle = self.layers[-1].register_forward_hook(after_layer)
        try:
            run()
        except _ReachedError:
            pass
        finally:
            handle.remove()
        return seen[0].detach()


@dataclass
class Recall:
    """A cut that is on.

    Attributes:
        clock: is told which samples a batch holds.
        device: the model's.
        read: gives the rows of samples by their numbers; may be exchanged at any time.
    """

    cut: Cut
    clock: DropoutClock
    device: torch.device
    read: Read
    _handles: list[RemovableHandle] = field(default_factory=list)

    def install(self) -> None:
        """From now on the model computes from the stored rows alone."""
        for module, outline in self.cut.others:
            replace_forward(module, _instead(_Silent(self, outline)), again=True)
        for layer in self.cut.layers[:-1]:
            replace_forward(layer, _instead(self._pass_on), again=True)
        if self.cut.head is None:
            replace_forward(self.cut.layers[-1], _instead(self._last_layer), again=True)
        else:
            hook = self.cut.head.register_forward_pre_hook(self._before_head, prepend=True)
            self._handles.append(hook)

    def remove(self) -> None:
        """The model computes everything itself again."""
        for module in self.cut.trunk:
            restore_forward(module)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def moment(self) -> Moment:
        """The samples at hand.

        Raises:
            RuntimeError: nobody has announced any.
        """
        if self.clock.moment is None:
            raise RuntimeError(
                "the model computes from cached features, and nobody said which samples these are"
            )
        return self.clock.moment

    def rows(self) -> Tensor:
        """The stored rows of the samples at hand, padded with zeros to the batch's width."""
        moment = self.moment()
        if moment.packed:
            samples = [sample for row in moment.packed for sample, _ in row]
            lengths = [sum(length for _, length in row) for row in moment.packed]
        else:
            samples, lengths = list(moment.samples), list(moment.lengths)
        flat = self.read(samples).to(self.device, non_blocking=True)
        if self.cut.pooled:
            return flat
        if sum(lengths) != len(flat):
            raise RuntimeError(f"{len(flat)} cached rows for {sum(lengths)} tokens")
        shape = (len(lengths), moment.width, self.cut.width)
        if len(flat) == shape[0] * shape[1]:
            return flat.view(shape)
        padded = flat.new_zeros(shape)
        places = torch.arange(shape[1], device=self.device)
        padded[places < torch.tensor(lengths, device=self.device)[:, None]] = flat
        return padded

    def _pass_on(self, *arguments: Any, **named: Any) -> Any:
        return self.cut.answer(arguments[0] if arguments else named["hidden_states"])

    def _last_layer(self, *arguments: Any, **named: Any) -> Any:
        return self.cut.answer(self.rows())

    def _before_head(self, head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.rows(), *arguments[1:])


@dataclass(frozen=True)
class _Silent:
    """The ``forward`` of a module below the cut whose answer nobody looks into."""

    recall: Recall
    outline: Outline

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.outline.filled(self.recall.moment(), self.recall.device)


def _instead(forward: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Takes the place of a plain forward that is not called any more."""
    return lambda plain: forward
