"""How much an error in each column of a weight weighs: what the user's own rows send through it.

A linear layer's output moves by ``error · input``, so on average over the rows the squared error
of column ``c`` counts as the mean of ``input[c]²``. That is what llama.cpp calls an importance
matrix (https://github.com/ggml-org/llama.cpp/tree/master/tools/imatrix); here it is taken from
base and adapter themselves, a layer at a time, before anything is written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qft.calibration import Calibration
from qft.gguf.file import Value
from qft.layer_inputs import observe_inputs, text_rows
from qft.layer_stream import Stream
from qft.lean.model_parts import output_embeddings
from qft.merging.tensors import MergedTensors


@dataclass(frozen=True)
class Importance:
    """The importance of every column of a model's matrices.

    Attributes:
        columns: tensor of the checkpoint → ``[width]``, float32; of the output head too, where it
            is a tensor of its own. Embeddings, which are looked up, have none.
        dataset: of where the rows come from, without folders.
        rows: how many there were.
    """

    columns: Mapping[str, Tensor]
    dataset: str
    rows: int

    def metadata(self) -> dict[str, Value]:
        """What the file says of it, as llama.cpp's quantizer does."""
        return {
            "quantize.imatrix.dataset": self.dataset,
            "quantize.imatrix.entries_count": len(self.columns),
            "quantize.imatrix.chunks_count": self.rows,
        }

    def text(self) -> str:
        """A sentence for the user."""
        return (f"rounded where it matters on {self.rows} rows of {self.dataset}: "
                f"{len(self.columns)} matrices")  # fmt: skip


class _Squares:
    """Sums of squared inputs, a matrix by the name it has among the modules."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, text: Tensor) -> None:
        """Adds inputs ``[tokens, width]``."""
        found = text.float().square().sum(0, dtype=torch.float64).cpu()
        self.sums[name] = self.sums[name] + found if name in self.sums else found
        self.counts[name] = self.counts.get(name, 0) + len(text)

    def mean(self, name: str) -> Tensor:
        """``[width]``, float32."""
        return (self.sums[name] / self.counts[name]).float()


def importance_of(source: MergedTensors, calibration: Calibration) -> Importance:
    """Runs the rows through a source and measures what reaches each matrix.

    In memory: one layer's weights, the hidden states of all rows, and the sums. Padding is left
    out.

    Raises:
        ModelError: the model has not one stack of layers.
    """
    stream = calibration.stream(source)
    squares = _Squares()
    for layer in stream.layers():
        parts = {
            f"{layer.name}.{name}.weight": module
            for name, module in layer.module.named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        }
        observe_inputs(layer, parts, squares.add, propagate=True)
    named = {source.module(name): name for name in source.names()}
    _add_head(stream, squares, named)
    met = {named[name]: squares.mean(name) for name in squares.sums if name in named}
    return Importance(met, calibration.name, calibration.rows)


def _add_head(stream: Stream, squares: _Squares, stored: Collection[str]) -> None:
    """What the head is given. One that is tied is an embedding in the file, and is passed over.

    Args:
        stored: names, as modules have them, of the tensors there are.
    """
    head = output_embeddings(stream.model)
    name = next((n for n, module in stream.model.named_modules() if module is head), "")
    if head is None or f"{name}.weight" not in stored:
        return
    stream.open_top()
    try:
        for number in range(stream.batches):
            given = stream.head_input(number)
            for text in text_rows(given, stream.tokens(number).to(given.device)):
                squares.add(f"{name}.weight", text)
    finally:
        stream.close_top()
