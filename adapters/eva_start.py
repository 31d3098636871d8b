"""EVA: a LoRA begins with the directions in which each layer's inputs vary most.

PEFT's incremental SVD, fed by hooks of our own: PEFT's go by the labels, which stand at other
places (classes, a decoder's tokens), and turn in a circle for ever where an input is too short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qft.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn

_IGNORED = -100
_SEED = 42  # of the randomised SVD; PEFT's own


def require_tokens(batches: Sequence[Mapping[str, Tensor]], rank: int) -> None:
    """Refuses data that has fewer tokens than there are directions to find.

    Raises:
        RecipeError: it has.
    """
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    if tokens < rank:
        raise RecipeError(
            "EVA finds no more directions than there are tokens to look at.",
            where="strategy.initialisation",
            found=f"{tokens} tokens in the first rows, rank {rank}",
            fix=f"more or longer rows, rank: {max(1, tokens)}, or initialisation: default",
        )


def start_eva(
    model: nn.Module, layers: Mapping[str, Any], batches: Sequence[Mapping[str, Tensor]]
) -> None:
    """Sets each layer's A from the data (Paischer et al. 2024, https://arxiv.org/abs/2410.07170).

    A layer that sees fewer inputs than its rank (a pooler sees one a row) keeps the usual start.

    Args:
        layers: PEFT's LoRA layers by their names in ``model``.
    """
    import warnings

    import torch
    from peft import initialize_lora_eva_weights

    looks = {name: _Look(layer) for name, layer in layers.items()}
    hooks = [layers[name].register_forward_pre_hook(look) for name, look in looks.items()]
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                told = _apart({k: v.to(device) for k, v in batch.items()}, model)
                for look in looks.values():
                    look.masks = _masks(told)
                model(**told)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    found = {name: look.directions() for name, look in looks.items()}
    state = {name: directions for name, directions in found.items() if directions is not None}
    with warnings.catch_warnings():  # of the layers that keep the usual start
        warnings.simplefilter("ignore", UserWarning)
        initialize_lora_eva_weights(model, eva_state_dict=state)


class _Look:
    """Collects the inputs of one layer and keeps the main directions of all it has seen."""

    def __init__(self, layer: Any) -> None:
        from peft.utils.incremental_pca import IncrementalPCA

        self._rank = layer.r["default"]
        self._fits = self._rank <= layer.in_features
        self._analysis = IncrementalPCA(self._rank, lowrank=True, lowrank_seed=_SEED)
        self._waiting: list[Tensor] = []
        self.masks: list[Tensor] = []

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        import torch

        if not self._fits:
            return
        self._waiting.append(_rows(inputs[0], self.masks))
        if sum(len(rows) for rows in self._waiting) >= self._rank:
            self._analysis.partial_fit(torch.cat(self._waiting))
            self._waiting = []

    def directions(self) -> Tensor | None:
        """``[rank, in]``; None where there were too few inputs."""
        found: Tensor | None = getattr(self._analysis, "components_", None)
        return found


def _rows(states: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """A layer's inputs at the places of tokens, ``[tokens, in]`` in float32."""
    for mask in masks:
        if states.shape[:-1] == mask.shape:
            return states[mask].float()
        if states.ndim == 2 and len(states) == mask.numel() and mask.shape[1] > 1:
            return states[mask.flatten()].float()
    return states.reshape(-1, states.shape[-1]).float()  # one a row, or another's places


def _masks(batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Where the tokens are: in the encoder or the only half, and in the decoder."""
    masks = [batch["attention_mask"].bool()]
    labels = batch.get("labels")
    if labels is not None and labels.ndim == 2 and labels.shape != masks[0].shape:
        masks.append(labels != _IGNORED)
    return masks


def _apart(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """One more column of padding where an encoder-decoder's halves are equally long.

    A layer's input then tells by its shape which half it comes from.
    """
    from torch.nn.functional import pad

    halves = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if halves and batch["labels"].shape == batch["attention_mask"].shape:
        return {**batch, "labels": pad(batch["labels"], (0, 1), value=_IGNORED)}
    return batch
