"""How much each MLP neuron, head and hidden channel says, over the calibration rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qft import models
from qft.data.tasks import Example
from qft.errors import ModelError
from qft.layer_stream import StreamedLayer
from qft.progress import QUIET, Reporter
from qft.pruning.anatomy import Anatomy
from qft.pruning.calibration import CalibrationRows
from qft.pruning.layer_stream import stream_layers

IMPORTANCE = ("activation", "activation-mean", "taylor")

_NEURONS_OUT = re.compile(r"mlp\.down_proj|output\.dense")
_HEADS_OUT = re.compile(r"self_attn\.o_proj|attention\.output\.dense")
_NORMS = re.compile(r"\w*layernorm")


@dataclass(frozen=True)
class WidthScores:
    """A score a part; the higher, the longer it stays.

    Attributes:
        neurons: ``[layers, neurons]``.
        heads: ``[layers, heads]``, query heads.
        hidden: ``[hidden]``.
    """

    neurons: Tensor
    heads: Tensor
    hidden: Tensor


def score_width(
    anatomy: Anatomy, rows: CalibrationRows, importance: str, reporter: Reporter = QUIET
) -> WidthScores:
    """Scores of every neuron, head and hidden channel.

    ``activation`` is the root mean square of a neuron's output over all tokens, a head's being the
    sum over its channels, a hidden channel's the same after every norm, summed; ``activation-mean``
    is the mean absolute value instead (both from Muralidharan et al. 2024, Minitron,
    https://arxiv.org/abs/2407.14679). These hold one layer in memory. ``taylor`` is the first-order
    change of the loss, ``|Σ activation · gradient|`` a row, averaged (Molchanov et al. 2019,
    https://arxiv.org/abs/1906.10771): it holds the whole model and a row's activations.
    """
    tally = _Tally(anatomy, importance)
    if importance == "taylor":
        _taylor(anatomy, rows, tally, reporter)
    else:
        with reporter.bar("score layers", anatomy.sizes.layers) as bar:
            for layer in stream_layers(anatomy.folder, anatomy.spec, rows.batches()):
                hooks = tally.watch(layer)
                layer.run(propagate=True)
                for hook in hooks:
                    hook.remove()
                bar.advance()
    return tally.result()


class _Tally:
    """Sums over tokens of what comes into a layer's two output projections and out of its norms."""

    def __init__(self, anatomy: Anatomy, importance: str) -> None:
        sizes = anatomy.sizes
        self._importance, self._sizes, self._folder = importance, sizes, anatomy.folder
        self.neurons = torch.zeros(sizes.layers, sizes.neurons, dtype=torch.float64)
        self.channels = torch.zeros(sizes.layers, sizes.heads * sizes.head_size,
                                    dtype=torch.float64)  # fmt: skip
        self.hidden = torch.zeros(sizes.hidden, dtype=torch.float64)
        self.count = 0  # tokens, or rows for taylor

    def watch(self, layer: StreamedLayer) -> list[Any]:
        """Hooks on one layer's parts."""
        hooks = []
        for name, module in layer.module.named_modules():
            into = self.place(name, layer.index)
            if into is None:
                continue
            self.require(module, into, name)
            if isinstance(module, nn.Linear):
                hooks.append(module.register_forward_pre_hook(self._before(layer, into)))
            else:
                hooks.append(module.register_forward_hook(self._after(layer)))
        if layer.index == 0:
            count = layer.module.register_forward_hook(lambda *_: self._count(layer))
            hooks.append(count)
        return hooks

    def place(self, name: str, layer: int) -> Tensor | None:
        """Where a module's values are summed up; None where it is none of those of interest."""
        if _HEADS_OUT.fullmatch(name):
            return self.channels[layer]
        if _NEURONS_OUT.fullmatch(name):
            return self.neurons[layer]
        return self.hidden if _NORMS.fullmatch(name) else None

    def require(self, module: nn.Module, into: Tensor, name: str) -> None:
        """Refuses a family whose projections are not what their names say here."""
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.shape[-1] != into.numel():
            raise ModelError(
                "Width pruning does not know this family's tensors.",
                where=self._folder,
                found=f"{name}.weight {list(weight.shape)}",
                fix="--method depth, which takes whole layers",
            )

    def _count(self, layer: StreamedLayer) -> None:
        self.count += int(layer.tokens.sum())

    def _before(self, layer: StreamedLayer, into: Tensor) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Tensor]) -> None:
            into.add_(self._summed(arguments[0], layer.tokens).to(into.device))

        return hook

    def _after(self, layer: StreamedLayer) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, made: Tensor) -> None:
            self.hidden.add_(self._summed(made, layer.tokens).to(self.hidden.device))

        return hook

    def _summed(self, values: Tensor, tokens: Tensor) -> Tensor:
        """Over the text of a batch: ``[channels]``."""
        text = values[tokens].double()
        return text.square().sum(0) if self._importance == "activation" else text.abs().sum(0)

    def result(self) -> WidthScores:
        """The means, heads summed over their channels."""
        sums = [self.neurons, self.channels, self.hidden]
        neurons, channels, hidden = (total / max(self.count, 1) for total in sums)
        if self._importance == "activation":
            neurons, channels, hidden = neurons.sqrt(), channels.sqrt(), hidden.sqrt()
        heads = channels.unflatten(1, (self._sizes.heads, -1)).sum(-1)
        return WidthScores(neurons, heads, hidden)


def _taylor(anatomy: Anatomy, rows: CalibrationRows, tally: _Tally, reporter: Reporter) -> None:
    model: Any = models.open_model(anatomy.folder, anatomy.spec)
    model.requires_grad_(False)
    model.enable_input_require_grads()  # so that gradients flow, and no weight needs its own
    inside = re.compile(rf"{re.escape(anatomy.stack)}\.(\d+)\.(.+)")
    held: list[tuple[Tensor, Tensor]] = []  # a row's values, and where they are summed up
    for name, module in model.named_modules():
        found = inside.fullmatch(name)
        into = tally.place(found[2], int(found[1])) if found else None
        if into is None:
            continue
        tally.require(module, into, name)
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda m, given, into=into: _hold(held, given[0], into)
            )
        else:
            module.register_forward_hook(lambda m, g, made, into=into: _hold(held, made, into))
    with reporter.bar("score gradients", len(rows.scored)) as bar:
        for example in rows.scored:
            held.clear()
            _backward(model, example, rows, anatomy)
            for values, into in held:
                if values.grad is not None:
                    by_channel = (values.detach() * values.grad).flatten(0, -2).double().sum(0)
                    into.add_(by_channel.abs().to(into.device))
            tally.count += 1
            bar.advance()
    held.clear()


def _hold(held: list[tuple[Tensor, Tensor]], values: Tensor, into: Tensor) -> None:
    values.retain_grad()
    held.append((values, into))


def _backward(model: Any, example: Example, rows: CalibrationRows, anatomy: Anatomy) -> None:
    batch = rows.task.collate([example], rows.pad_token_id)
    device = next(model.parameters()).device
    with torch.enable_grad():
        loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
    if loss is None or not loss.requires_grad:
        raise ModelError("The model gives no loss to take gradients of.", where=anatomy.folder,
                         fix="--importance activation")  # fmt: skip
    loss.backward()


def strongest(scores: Tensor, count: int) -> tuple[int, ...]:
    """The positions of the ``count`` highest scores, in order; of two alike the earlier stays."""
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return tuple(sorted(order.tolist()))


def groups_of(scores: WidthScores, groups: int) -> Tensor:
    """Key-value groups' scores ``[layers, groups]``: the sums over their query heads."""
    by_group: Tensor = scores.heads.unflatten(1, (groups, -1)).sum(-1)
    return by_group


def kept_by_layer(
    scores: Tensor, count: int, layers: Sequence[int]
) -> Mapping[int, tuple[int, ...]]:
    """Of every layer the ``count`` strongest parts."""
    return {layer: strongest(scores[layer], count) for layer in layers}
