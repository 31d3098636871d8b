"""Wanda and SparseGPT on a whole model, layer by layer: what a layer sees was pruned below it.

A layer is loaded, asked for what its inputs look like, pruned, kept on the disk, and run once more
so that the next layer sees its outputs. A kept layer carries its hashes; a later try takes it from
the disk and only runs it, so that the rest comes out the same, to the byte.

In memory: what the stream holds (`qft.pruning.layer_stream`), and of SparseGPT the Hessian of one
group of linear layers that read the same tensor, with one of their weights in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qft.errors import ModelError
from qft.files import manifest_problem, new_folder, write_manifest
from qft.input_groups import input_groups
from qft.input_hessian import factorise_
from qft.layer_inputs import observe_inputs
from qft.layer_stream import StreamedLayer
from qft.progress import QUIET, Reporter
from qft.pruning.anatomy import Anatomy, Piece
from qft.pruning.layer_stream import stream_layers
from qft.pruning.smallest import prune_by_wanda_
from qft.pruning.sparsegpt import prune_by_sparsegpt_
from qft.pruning.sparsity import Sparsity
from qft.shard_writer import write_shards
from qft.shards import ShardedCheckpoint


class LayerWeights:
    """The matrices of one layer that get zeros, in the dtype they are stored in.

    Where the layer computes in another dtype, each is read once more, pruned as it is stored, and
    put into the layer rounded.
    """

    def __init__(
        self, layer: StreamedLayer, pieces: Sequence[Piece], checkpoint: ShardedCheckpoint
    ) -> None:
        self._checkpoint = checkpoint
        self.linears: dict[str, nn.Linear] = {}  # by checkpoint name
        for piece in pieces:
            owner = piece.within.rpartition(".")[0]
            self.linears[piece.stored] = layer.module.get_submodule(owner)  # type: ignore[assignment]
        self._read: dict[str, Tensor] = {}

    def specs(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype as stored."""
        of = self._checkpoint
        return [(name, of.shape(name), of.dtype(name)) for name in self.linears]

    def change(self, name: str, prune: Callable[[Tensor], None]) -> None:
        """Prunes one matrix in place, here and in the layer."""
        held = self.linears[name].weight.data
        if held.dtype == self._checkpoint.dtype(name):
            prune(held)
            return
        stored = self._checkpoint.read(name).to(held.device)
        prune(stored)
        self.put(name, stored)
        self._read[name] = stored.cpu()

    def put(self, name: str, tensor: Tensor) -> None:
        """Sets a matrix of the layer."""
        self.linears[name].weight.data.copy_(tensor)

    def stored(self, name: str) -> Tensor:
        """A matrix as it will be stored, on the CPU."""
        return self._read.get(name, self.linears[name].weight.data).cpu()

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The same as the writer of shards wants it: in one block."""
        yield self.stored(name)


PruneLayer = Callable[[StreamedLayer, LayerWeights, Sparsity], None]


def prune_layers(
    anatomy: Anatomy,
    targets: Mapping[str, Piece],
    batches: Sequence[Mapping[str, Tensor]],
    prune_layer: PruneLayer,
    sparsity: Sparsity,
    folder: Path,
    reporter: Reporter = QUIET,
) -> list[Path]:
    """Prunes layer after layer into ``folder``; those that are there already are not done again.

    Args:
        targets: from `qft.pruning.sparse_targets`.
        batches: what the model is calibrated on, as its task collates them.
        prune_layer: `by_wanda` or `by_sparsegpt`.
        folder: holds, when all is done, a small checkpoint a layer.

    Returns:
        Each layer's folder.

    Raises:
        ModelError: the model cannot be streamed, or its inputs say nothing about a weight.
        SaveError: the disk is full; the layers that are done stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = []
    with (
        ShardedCheckpoint(anatomy.folder) as checkpoint,
        reporter.bar("prune layers", anatomy.sizes.layers) as bar,
    ):
        for layer in stream_layers(anatomy.folder, anatomy.spec, batches):
            pieces = [piece for piece in targets.values() if piece.layer == layer.index]
            weights = LayerWeights(layer, pieces, checkpoint)
            place = folder / f"layer-{layer.index:05d}"
            if manifest_problem(place) is None:
                with ShardedCheckpoint(place) as kept:
                    for name in weights.linears:
                        weights.put(name, kept.read(name))
            else:
                prune_layer(layer, weights, sparsity)
                with new_folder(place, overwrite=True) as unfinished:
                    write_shards(unfinished, weights.specs(), weights.blocks)
                    write_manifest(unfinished)
            places.append(place)
            bar.advance()
    return places


@torch.no_grad()
def by_wanda(layer: StreamedLayer, weights: LayerWeights, sparsity: Sparsity) -> None:
    """One pass for the lengths of all inputs of the layer, as the paper has it."""
    squares: dict[str, Tensor] = {}

    def add(name: str, text: Tensor) -> None:
        length = torch.linalg.vector_norm(text, dim=0, dtype=torch.float32)
        squares[name] = squares.get(name, 0) + length.double().square()

    observe_inputs(layer, weights.linears, add)
    for name in weights.linears:
        if name not in squares:
            raise _never_used(name)
        norms = squares[name].sqrt()
        if not bool(torch.isfinite(norms).all()):
            raise ModelError(
                "The layer's inputs are not finite on the calibration data, so nothing can be "
                "told about its weights.",
                where=name,
                fix="check the model: it gives NaN or infinity on these rows",
            )
        weights.change(name, partial(prune_by_wanda_, norms=norms, sparsity=sparsity))


@torch.no_grad()
def by_sparsegpt(layer: StreamedLayer, weights: LayerWeights, sparsity: Sparsity) -> None:
    """A pass a group of linear layers with the same input; see `qft.input_groups`."""
    never_used = dict.fromkeys(weights.linears)
    for group in input_groups(layer, weights.linears):
        factor = factorise_(group.taken(), group.names[0])
        for name in group.names:
            prune = partial(prune_by_sparsegpt_, factor=factor, sparsity=sparsity, name=name)
            weights.change(name, prune)
            del never_used[name]
        del factor  # before the next group's Hessian is gathered
    for name in never_used:
        raise _never_used(name)


def _never_used(name: str) -> ModelError:
    return ModelError(
        "The calibration rows never come to a weight, so nothing can be told about it.",
        where=name,
        fix="more rows, or --method magnitude, which needs none",
    )
