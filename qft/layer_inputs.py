"""What reaches the linear layers of one streamed layer: the inputs at positions that are text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from qft.layer_stream import StreamedLayer

Hook = Callable[..., None]


def run_watched(
    layer: StreamedLayer,
    watched: Mapping[str, nn.Module],
    watch: Callable[[str], Hook],
    *,
    propagate: bool = False,
) -> None:
    """Runs a layer over all batches with a hook before each watched module.

    Args:
        watched: parts of the layer, by name.
        watch: name → a hook as ``register_forward_pre_hook`` takes it.
        propagate: see :meth:`qft.layer_stream.StreamedLayer.run`.
    """
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in watched.items()]
    try:
        layer.run(propagate=propagate)
    finally:
        for hook in hooks:
            hook.remove()


def observe_inputs(
    layer: StreamedLayer,
    watched: Mapping[str, nn.Module],
    observe: Callable[[str, Tensor], None],
    *,
    propagate: bool = False,
) -> None:
    """Runs a layer over all batches and shows what is given to each watched module.

    Args:
        observe: called with the module's name and ``[tokens, in]``, a row of a batch at a time.
        propagate: see :meth:`qft.layer_stream.StreamedLayer.run`.
    """

    def watch(name: str) -> Hook:
        def before(module: Any, arguments: tuple[Tensor, ...]) -> None:
            for text in text_rows(arguments[0], layer.tokens):
                observe(name, text)

        return before

    run_watched(layer, watched, watch, propagate=propagate)


def text_rows(x: Tensor, tokens: Tensor) -> Iterator[Tensor]:
    """The inputs at positions that are text, ``[tokens, in]``, a row at a time.

    An expert is given some tokens of a batch, which may be padding or not.

    Args:
        tokens: which positions of the batch are text, bool ``[batch, length]``.
    """
    if x.numel() // x.shape[-1] != tokens.numel():
        yield x.reshape(-1, x.shape[-1])
        return
    for row, text in zip(x.reshape(*tokens.shape, -1), tokens, strict=True):
        yield row if bool(text.all()) else row[text]
