"""Rows run through a model layer by layer, with one layer's weights in memory at a time.

The model is built on the meta device. Its own forward runs once a batch with every layer replaced
by a recorder, so that each layer's own arguments (masks, sliding windows, position embeddings) and
the first hidden states are known before any layer is loaded; a module beside the layers is loaded
when it is first called, of embeddings only the rows that are looked up. Then a layer after the
other is read from the files, run, and dropped. At the most there are in memory: one layer, the
hidden states of all rows, and what one batch needs within one layer.

After the last layer the model's forward can run once more, now with the hidden states that the
layers made, for what it answers: then its head is in memory too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qft.errors import ModelError
from qft.layer_weights import LayerWeights
from qft.lean.model_parts import layer_stacks, output_embeddings

Observer = Callable[[Tensor, Tensor, Tensor], None]

_ANSWERS = ("labels", "start_positions", "end_positions")


class StreamedLayer:
    """One layer with its weights in memory, until `finish` or the stream goes on to the next.

    The caller may hang hooks on parts of `module` (and takes them off again), call `run` as often
    as it likes, and change the weights in place.

    Attributes:
        index: the layer's number in its stack.
        name: its module name, such as ``model.layers.3``.
        stack: its stack's module name.
        module: in eval mode; its parameters need no gradient.
        tokens: while `run` is at it: which positions of the batch are text, bool
            ``[batch, length]``.
    """

    def __init__(
        self,
        index: int,
        stack: str,
        module: nn.Module,
        rows: Sequence[_Batch],
        device: str,
        drop: Callable[[], None],
    ) -> None:
        self.index, self.stack, self.name = index, stack, f"{stack}.{index}"
        self.module = module
        self.tokens = torch.empty(0, 0, dtype=torch.bool)
        self.went_on = False
        self._rows, self._device, self._drop = rows, device, drop

    @torch.no_grad()
    def run(self, observe: Observer | None = None, *, propagate: bool = False) -> None:
        """Runs the layer over all batches.

        Args:
            observe: called a batch with the layer's input and output ``[batch, length, hidden]``
                and which positions are text ``[batch, length]``.
            propagate: the outputs become the next layer's inputs, for which the stream then needs
                no pass of its own; the last thing to do with a layer.
        """
        for batch in self._rows:
            given = batch.hidden.to(self._device)
            self.tokens = batch.tokens.to(self._device)
            arguments, named = _moved(batch.arguments[self.index], self._device)
            made = self.module(given, *arguments, **named)
            batch.in_tuple = isinstance(made, tuple)
            output: Tensor = made[0] if isinstance(made, tuple) else made
            if observe is not None:
                observe(given, output, self.tokens)
            if propagate:
                batch.hidden = output.to(batch.hidden.device)
        self.went_on = self.went_on or propagate

    def finish(self) -> None:
        """Takes the weights out now; the stream goes on all the same."""
        if not self.went_on:
            self.run(propagate=True)
        self._drop()


class Stream:
    """Batches on their way through a model's layers.

    Args:
        weights: of a model of one stack of layers, in eval mode.
        batches: as a task collates them; what a model should answer is not looked at.
        where: what errors call the model.

    Raises:
        ModelError: the model has not one stack of layers, or does not run them one after another.
    """

    def __init__(
        self, weights: LayerWeights, batches: Sequence[Mapping[str, Tensor]], where: object
    ) -> None:
        if not batches:
            raise ValueError("no batches to run")
        self.model, self.device = weights.skeleton, weights.device
        self.stack_name, self.stack = only_stack(self.model, where)
        self._weights, self._batches = weights, batches
        self._hooks: list[Any] = []
        self._rows = self._record()

    def layers(self, *, original: bool = False) -> Iterator[StreamedLayer]:
        """Each layer in turn, loaded, with the inputs that the layers below made.

        Args:
            original: the next layer sees what a layer makes with its original weights, which are
                then read once more, whatever the caller has changed.
        """
        for index, module in enumerate(self.stack):
            self._weights.load(module)
            layer = StreamedLayer(
                index, self.stack_name, module, self._rows, self.device, self._weights.drop
            )
            yield layer
            if original and not layer.went_on:
                self._weights.drop()
                self._weights.load(module)
            layer.finish()
            for batch in self._rows:
                batch.arguments[index] = ((), {})

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return len(self._rows)

    def hidden(self, batch: int) -> Tensor:
        """A batch's hidden states where it is now, ``[batch, length, hidden]``, on the host."""
        return self._rows[batch].hidden

    def tokens(self, batch: int) -> Tensor:
        """Which of its positions are text, bool ``[batch, length]``."""
        return self._rows[batch].tokens

    def _record(self) -> list[_Batch]:
        """Runs the model's own forward on every batch, without its layers."""
        base: Any = getattr(self.model, "base_model", self.model)
        seen: list[_Batch] = []
        for number, layer in enumerate(self.stack):
            layer.forward = _recorder(seen, number, len(self.stack))
        hooks = self._weights.load_when_called(self.stack_name)
        try:
            for batch in self._batches:
                mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
                seen.append(_Batch(torch.empty(0), mask.bool(), []))
                try:
                    with torch.no_grad():
                        base(**self._inputs(batch, base))
                except _AllRecordedError:
                    continue
                raise ModelError("This model does not run its layers one after another.",
                                 found=type(self.model).__name__)  # fmt: skip
        finally:
            for hook in hooks:
                hook.remove()
            self._plain_layers()
            self._weights.drop()
        return seen

    def _inputs(self, batch: Mapping[str, Tensor], model: Any) -> dict[str, Any]:
        options = {"use_cache": False} if "use_cache" in _parameters(model) else {}
        return {**{k: v.to(self.device) for k, v in batch.items() if k not in _ANSWERS}, **options}

    def _plain_layers(self) -> None:
        for layer in self.stack:
            layer.__dict__.pop("forward", None)

    def open_top(self) -> None:
        """After the last layer: what is beside the layers is loaded as it is called, and stays."""
        self._hooks = self._weights.load_when_called(self.stack_name)

    def close_top(self) -> None:
        """Drops it again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._plain_layers()
        self._weights.drop()

    @torch.no_grad()
    def output(self, number: int) -> Any:
        """What the model answers to a batch; between `open_top` and `close_top`."""
        row = self._rows[number]
        for layer in self.stack:
            layer.forward = _finished(row, self.device)
        return self.model(**self._inputs(self._batches[number], type(self.model)))

    def head_input(self, number: int) -> Tensor:
        """What a language model's head is given for a batch, ``[batch, length, hidden]``.

        As `output`, but the head itself need not come into memory.
        """
        head = output_embeddings(self.model)
        assert head is not None
        hook = head.register_forward_pre_hook(_stop_at_head, prepend=True)
        try:
            self.output(number)
        except _HeadReachedError as reached:
            return reached.given
        finally:
            hook.remove()
        raise ModelError("This model does not call its head.", found=type(self.model).__name__)

    def logits(self, number: int, places: Tensor) -> Tensor:
        """A language model's logits at some places of a batch; the head sees no others.

        Args:
            places: ``[positions, 2]``: row and position.

        Returns:
            ``[positions, vocabulary]``.
        """
        head = output_embeddings(self.model)
        assert head is not None
        rows, columns = places.to(self.device).unbind(1)
        hook = head.register_forward_pre_hook(lambda _, given: (given[0][rows, columns][None],))
        try:
            found: Tensor = self.output(number).logits
        finally:
            hook.remove()
        return found[0]


def only_stack(model: nn.Module, where: object) -> tuple[str, nn.ModuleList]:
    """The name and the layers of a model's one stack.

    Raises:
        ModelError: it has none or, as encoder-decoders do, several.
    """
    stacks = layer_stacks(model)
    if len(stacks) != 1:
        raise ModelError(
            "Going layer by layer needs a model of one stack of layers.",
            where=where,
            found=f"{type(model).__name__}: {', '.join(stacks) or 'no stack'}",
            fix="a decoder such as Llama, Qwen or Mistral, or an encoder such as BERT",
        )
    return next(iter(stacks.items()))


@dataclass
class _Batch:
    """One batch on its way: hidden states on the host, and every layer's other arguments."""

    hidden: Tensor
    tokens: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    in_tuple: bool = False  # whether the layers give their output in a tuple


class _AllRecordedError(Exception):
    """The last layer was reached; what lies above it need not run."""


class _HeadReachedError(Exception):
    """The head was reached; what it would make of its input need not run."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given = given


def _stop_at_head(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    raise _HeadReachedError(arguments[0])


def _recorder(seen: list[_Batch], number: int, count: int) -> Callable[..., Any]:
    def record(hidden_states: Tensor, *arguments: Any, **named: Any) -> Tensor:
        if len(seen[-1].arguments) != number:
            raise ModelError("This model does not run its layers one after another.")
        if number == 0:
            seen[-1].hidden = hidden_states.to("cpu")
        seen[-1].arguments.append((arguments, named))
        if number == count - 1:
            raise _AllRecordedError
        return hidden_states

    return record


def _finished(row: _Batch, device: str) -> Callable[..., Any]:
    """A layer that gives what the layers made, whatever it is given."""

    def forward(*given: Any, **named: Any) -> Any:
        hidden = row.hidden.to(device)
        return (hidden,) if row.in_tuple else hidden

    return forward


def _moved(
    given: tuple[tuple[Any, ...], dict[str, Any]], device: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    found: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(
        Tensor, lambda tensor: tensor.to(device), given
    )
    return found


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters
