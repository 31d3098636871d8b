"""Whether a config describes the merged model: what is tied in it, and of which shapes it is.

What the adapter model computes is what the merged model must compute. An adapter may change the
head alone, or the embedding alone: then the merged model is untied, both tensors are written, and
its config says that they are two. An adapter may hold a vocabulary with more words, or a head with
other labels than the base's: its config must say that too. Where it cannot, nothing is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qft.errors import AdapterError
from qft.lean.model_parts import head_names
from qft.merging.rounded_base import BaseCheckpoint
from qft.merging.tensors import ModuleTensors, tied_names
from qft.shards import row_blocks
from qft.strategy import Merge

_TIE = "tie_word_embeddings"
# these compute something else when they are untied, not only with another tensor
_SCALED_WHEN_TIED = ("t5", "mt5", "umt5", "switch_transformers", "udop", "longt5")


def tied_as_stored(
    skeleton: nn.Module, names: Mapping[str, str], checkpoint: BaseCheckpoint
) -> dict[str, str]:
    """:func:`qft.merging.tensors.tied_names`, less the pairs that the checkpoint stores apart.

    transformers ties two tensors that a checkpoint holds both only if they are equal; a T5 with a
    head of its own says that it is tied all the same.
    """
    stored = {module: name for name, module in names.items()}
    tied = tied_names(skeleton, names)
    return {
        absent: present
        for absent, present in tied.items()
        if absent not in stored or _equal(checkpoint, stored[absent], stored[present])
    }


def _equal(checkpoint: BaseCheckpoint, one: str, other: str) -> bool:
    if checkpoint.shape(one) != checkpoint.shape(other):
        return False
    for part in row_blocks(checkpoint.shape(one)):
        rows = range(part.start, part.stop)
        if not torch.equal(checkpoint.read_rows(one, rows), checkpoint.read_rows(other, rows)):
            return False
    return True


def fit_config(
    config: Mapping[str, Any],
    skeleton: nn.Module,
    names: Mapping[str, str],
    tied: Mapping[str, str],
    merge: Merge,
    base: ModuleTensors,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The merged model's config.json, and what is tied in it.

    Args:
        config: so far.
        names: checkpoint name → module name.
        tied: of the base, from :func:`tied_as_stored`.

    Raises:
        AdapterError: no config of this family describes the merged model.
    """
    apart = [pair for pair in tied.items() if _differ(merge, base, *pair)]
    changes = _changes(skeleton, merge) | ({_TIE: False} if apart else {})
    if not changes:
        _require_shapes(skeleton, merge, {*names.values(), *tied, *merge.added()})
        return dict(config), dict(tied)
    if apart and config.get("model_type") in _SCALED_WHEN_TIED:
        raise _inexpressible(apart[0], config)
    fitted = rebuilt(skeleton, changes)
    _require_shapes(fitted, merge, {*names.values(), *tied, *merge.added()})
    still = tied_names(fitted, names)
    kept = {absent: present for absent, present in tied.items() if still.get(absent) == present}
    for pair in apart:
        if pair[0] in kept:
            raise _inexpressible(pair, config)
    return {**config, **changes}, kept


def _require_shapes(fitted: nn.Module, merge: Merge, names: set[str]) -> None:
    for name, tensor in fitted.state_dict().items():
        if name in names and tuple(merge.shape(name)) != tuple(tensor.shape):
            raise AdapterError(
                "The merged model holds a tensor of a shape that no config of this model gives it.",
                where=name,
                found=f"merged {tuple(merge.shape(name))}, model {tuple(tensor.shape)}",
                fix="name the base model it was trained on, or train heads and embeddings together",
            )


def require_complete(
    skeleton: nn.Module, names: Mapping[str, str], tied: Mapping[str, str], merge: Merge
) -> None:
    """Refuses to write a model that would open with random values in some of its tensors.

    Raises:
        AdapterError: neither base nor adapter holds one that the model needs.
    """
    held = {*names.values(), *tied, *merge.added()}
    optional = [*(getattr(skeleton, "_keys_to_ignore_on_load_missing", None) or ())]
    needed = [name for name, _ in skeleton.named_parameters(remove_duplicate=False)]
    lost = [name for name in needed
            if name not in held and not any(re.search(key, name) for key in optional)]  # fmt: skip
    if lost:
        raise AdapterError(
            "Neither the base nor the adapter holds all of the merged model's tensors; the rest "
            "would be random.",
            where=type(skeleton).__name__,
            found=f"{len(lost)} missing, first {lost[0]}",
            fix="train these too (PEFT: modules_to_save), or name a base that has them",
        )


def _inexpressible(pair: tuple[str, str], config: Mapping[str, Any]) -> AdapterError:
    return AdapterError(
        "The adapter changes one of two tied tensors, and this family's config cannot say that "
        "they are two.",
        where=pair[0],
        found=f"{config.get('model_type')} ties it to {pair[1]}",
        fix="use base and adapter unmerged, or train without this target",
    )


def _changes(skeleton: nn.Module, merge: Merge) -> dict[str, Any]:
    """What a config must say of tensors that have other shapes than the base's."""
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    other = {
        name: tuple(tensor.shape)
        for name, tensor in merge.added().items()
        if name in shapes and tuple(tensor.shape) != shapes[name]
    }
    changes: dict[str, Any] = {}
    heads = tuple(f"{name}." for name in head_names(skeleton))
    for name, shape in other.items():
        if name == _input_embeddings(skeleton):
            changes["vocab_size"] = shape[0]
        elif heads and name.startswith(heads):
            labels = {number: f"LABEL_{number}" for number in range(shape[0])}
            changes["id2label"] = {str(number): label for number, label in labels.items()}
            changes["label2id"] = {label: number for number, label in labels.items()}
    return changes


def _input_embeddings(skeleton: nn.Module) -> str | None:
    getter: Any = getattr(skeleton, "get_input_embeddings", None)
    found = getter() if getter is not None else None
    return next((f"{n}.weight" for n, m in skeleton.named_modules() if m is found), None)


def rebuilt(skeleton: Any, changes: Mapping[str, Any]) -> nn.Module:
    """The model on the meta device as transformers makes it of a changed config."""
    kind = type(skeleton.config)
    config = kind.from_dict({**skeleton.config.to_dict(), **changes})
    with torch.device("meta"):
        model: Any = type(skeleton)(config)
    model.tie_weights()
    return model  # type: ignore[no-any-return]


def _differ(merge: Merge, base: ModuleTensors, one: str, other: str) -> bool:
    """Whether a merge makes two tensors of one that the base has tied."""
    if merge.shape(one) != merge.shape(other):
        return True
    added = merge.added()
    for part in row_blocks(merge.shape(one)):
        rows = range(part.start, min(part.stop, base.shape(one)[0]))
        held = base.read_rows(one, rows)
        first, second = (
            added[name][part] if name in added else merge.edit(name, held, part.start)
            for name in (one, other)
        )
        if first is not second and not torch.equal(first.float(), second.float()):
            return True
    return False
