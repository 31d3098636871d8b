"""How small a model is to become, and what must go for it: exact counts, no estimates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qft.errors import RecipeError
from qft.pruning.anatomy import Anatomy, Sizes
from qft.pruning.cut import Cut, all_layers, cannot_be_said, pruned_config, pruned_shape
from qft.shards import ShardedCheckpoint, tensor_bytes

WIDTHS = ("mlp", "heads", "hidden")
_COUNT = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}  # fmt: skip
_STEPS = 512  # shares tried where several dimensions shrink together


@dataclass(frozen=True)
class Cost:
    """What a model weighs; tied tensors count once, embeddings count."""

    parameters: int
    bytes: int


@dataclass(frozen=True)
class Target:
    """At most so many parameters, or bytes of weights; the text is how the user said it."""

    text: str
    parameters: int | None = None
    bytes: int | None = None

    def reached_by(self, cost: Cost) -> bool:
        """Whether a model is small enough."""
        few = self.parameters is None or cost.parameters <= self.parameters
        return few and (self.bytes is None or cost.bytes <= self.bytes)


class Scale:
    """Weighs what a cut would leave, from the headers alone."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        with ShardedCheckpoint(anatomy.folder) as checkpoint:
            self._tensors = [
                (piece, checkpoint.shape(piece.stored), checkpoint.dtype(piece.stored))
                for piece in anatomy.pieces
            ]

    def weigh(self, layers: tuple[int, ...], after: Sizes) -> Cost:
        """The cost of these layers in these sizes."""
        kept = set(layers)
        parameters = size = 0
        for piece, shape, dtype in self._tensors:
            if piece.layer is None or piece.layer in kept:
                left = pruned_shape(self.anatomy, piece, shape, after)
                parameters += tensor_bytes(left, dtype) // dtype.itemsize
                size += tensor_bytes(left, dtype)
        return Cost(parameters, size)

    def whole(self) -> Cost:
        """The unpruned model."""
        return self.weigh(all_layers(self.anatomy.sizes.layers), self.anatomy.sizes)

    def shapes(self, after: Sizes) -> dict[str, tuple[int, ...]]:
        """Module name → shape of every tensor, with all layers."""
        return {piece.module: pruned_shape(self.anatomy, piece, shape, after)
                for piece, shape, _ in self._tensors}  # fmt: skip


def read_target(
    whole: Cost, ratio: float | None, parameters: str | int | None, size: str | int | None
) -> Target | None:
    """The one target the user named, or None.

    Args:
        ratio: the share of all parameters that goes, in (0, 1).
        parameters: ``1.0B``, ``350M`` or a number.
        size: ``500MiB`` or a number of bytes.

    Raises:
        RecipeError: two targets, no such number, or one that the model is below already.
    """
    given = {"--ratio": ratio, "--params": parameters, "--size": size}
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) > 1:
        raise RecipeError("One target is enough.", where=", ".join(named), fix="leave one")
    if ratio is not None:
        if not 0 < ratio < 1:
            raise RecipeError("A ratio is the share of all parameters that goes.",
                              where="--ratio", found=ratio, fix="0.25, say")  # fmt: skip
        return Target(f"ratio {ratio:g}", parameters=int((1 - ratio) * whole.parameters))
    if parameters is not None:
        wanted = _number("--params", parameters, _COUNT, "1.0B, 350M or a number of parameters")
        _require_smaller("--params", wanted, whole.parameters, "parameters")
        return Target(f"{wanted:,} parameters", parameters=wanted)
    if size is not None:
        wanted = _number("--size", size, _BYTES, "500MiB, 2GB or a number of bytes")
        _require_smaller("--size", wanted, whole.bytes, "bytes")
        return Target(f"{wanted:,} bytes", bytes=wanted)
    return None


def _number(where: str, given: str | int, units: Mapping[str, int], fix: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)\s*", str(given), re.IGNORECASE)
    if not found or found[2].upper() not in units:
        raise RecipeError("This is no size.", where=where, found=given, fix=fix)
    return int(float(found[1]) * units[found[2].upper()])


def _require_smaller(where: str, wanted: int, there: int, what: str) -> None:
    if wanted >= there:
        raise RecipeError(
            "The model is that small already.",
            where=where,
            found=f"it has {there:,} {what}, and {wanted:,} were asked for",
            fix="a smaller target",
        )


def layers_to_remove(scale: Scale, target: Target) -> int:
    """The least number of layers without which the target is reached.

    Layers of one model are taken to be alike, as ordinary families' are; the first layers stand
    for all. See `require_reached` for the check of the real choice.

    Raises:
        RecipeError: not even one layer alone is small enough.
    """
    sizes = scale.anatomy.sizes
    for count in range(1, sizes.layers):
        if target.reached_by(scale.weigh(all_layers(sizes.layers - count), sizes)):
            return count
    raise _impossible(target, scale.weigh((0,), sizes), "one layer is left",
                      "a larger target, or --method width on the result of this one")  # fmt: skip


def require_reached(scale: Scale, target: Target | None, cost: Cost) -> None:
    """Refuses a cut that leaves more than was asked for.

    Raises:
        RecipeError: this model's layers are not alike, and those that go are small ones.
    """
    if target is not None and not target.reached_by(cost):
        raise RecipeError(
            "The layers that would go are too small to reach the target.",
            where=target.text,
            found=f"{cost.parameters:,} parameters and {cost.bytes:,} bytes would be left",
            fix="a larger ratio, or name the layers: --layers 10-15",
        )


def parse_width(width: str | None) -> dict[str, int | None]:
    """``mlp=512,heads`` as dimension → size, or None where the target decides.

    Raises:
        RecipeError: no such dimension, or a size that is none.
    """
    wanted: dict[str, int | None] = {}
    for part in (width or "mlp").split(","):
        name, equals, number = part.strip().partition("=")
        if name not in WIDTHS or (equals and not number.isdigit()) or name in wanted:
            raise RecipeError(
                "Width is which dimensions shrink, each with its new size or without.",
                where="--width",
                found=width,
                fix="mlp, heads or hidden, such as mlp,heads or mlp=512",
            )
        wanted[name] = int(number) if equals else None
    return wanted


def widths_for(
    scale: Scale, wanted: Mapping[str, int | None], target: Target | None, multiple: int
) -> Sizes:
    """The largest sizes that reach the target: the same share of every free dimension.

    Of several free dimensions MLP neurons, whose steps are finest, then get back what the others'
    coarser steps leave over. ``heads`` counts query heads, which go in whole groups.

    Args:
        wanted: from `parse_width`.
        target: None where every size is given.
        multiple: MLP and hidden sizes are multiples of it.

    Raises:
        RecipeError: a size that does not fit the model, or a target out of reach.
    """
    fixed = _fixed(scale.anatomy.sizes, wanted)
    free = [name for name, size in wanted.items() if size is None]
    if not free:
        return fixed
    if target is None:
        raise RecipeError("How much is to go?", where="--width",
                          fix="--ratio 0.25, --params 1.0B, --size 500MiB, or "
                          f"{free[0]}=NUMBER")  # fmt: skip
    before, layers = scale.anatomy.sizes, all_layers(scale.anatomy.sizes.layers)
    smallest = fixed
    reasons: set[str] = set()
    for sizes in _shrinking(fixed, free, multiple):
        if sizes == before:
            continue
        smallest = sizes
        if not target.reached_by(scale.weigh(layers, sizes)):
            continue
        reason = _unsayable(scale, sizes)
        if reason is None:
            return _refilled(scale, sizes, before, target, multiple, free)
        reasons.add(reason)
    if reasons:
        raise RecipeError(
            "No size that this family's config can describe reaches the target.",
            where=target.text, found=sorted(reasons)[0], fix="--width mlp, or --method depth",
        )  # fmt: skip
    raise _impossible(
        target, scale.weigh(layers, smallest), f"{' and '.join(free)} can shrink no further",
        "a larger target, more dimensions (--width mlp,heads), or --method depth",
    )  # fmt: skip


def _fixed(before: Sizes, wanted: Mapping[str, int | None]) -> Sizes:
    sizes = before
    per_group = before.heads // max(before.groups, 1)
    for name, size in wanted.items():
        there = {"mlp": before.neurons, "heads": before.heads, "hidden": before.hidden}[name]
        if not there:
            raise RecipeError("This family's config names no such size.", where=f"--width {name}")
        if size is None:
            continue
        if not 0 < size <= there or (name == "heads" and size % per_group):
            raise RecipeError(
                "This size does not fit the model.",
                where=f"--width {name}={size}",
                found=f"the model has {there}"
                + (f", in groups of {per_group}" if name == "heads" else ""),
                fix=f"1 to {there}" + (f", a multiple of {per_group}" if name == "heads" else ""),
            )
        sizes = _with(sizes, name, size // per_group if name == "heads" else size)
    return sizes


def _with(sizes: Sizes, name: str, size: int) -> Sizes:
    if name == "mlp":
        return replace(sizes, neurons=size)
    if name == "hidden":
        return replace(sizes, hidden=size)
    return replace(sizes, groups=size, heads=size * (sizes.heads // sizes.groups))


def _shrinking(sizes: Sizes, free: list[str], multiple: int) -> Iterator[Sizes]:
    """Sizes of a falling share of every free dimension, each once."""
    seen: set[Sizes] = set()
    for step in range(_STEPS, 0, -1):
        share = step / _STEPS
        made = sizes
        for name in free:
            whole = {"mlp": sizes.neurons, "heads": sizes.groups, "hidden": sizes.hidden}[name]
            grain = 1 if name == "heads" else min(multiple, whole)
            rounded = round(share * whole) if name == "heads" else int(share * whole)
            made = _with(made, name, max(rounded // grain * grain, grain))
        if made not in seen:
            seen.add(made)
            yield made


def _refilled(
    scale: Scale, sizes: Sizes, before: Sizes, target: Target, multiple: int, free: list[str]
) -> Sizes:
    """With as many MLP neurons as the target allows beside the other dimensions."""
    if "mlp" not in free:
        return sizes
    layers = all_layers(before.layers)
    best = sizes
    low, high = sizes.neurons // multiple, before.neurons // multiple
    while low < high:  # the largest number of multiples that still reaches the target
        middle = (low + high + 1) // 2
        more = replace(sizes, neurons=middle * multiple)
        if target.reached_by(scale.weigh(layers, more)):
            low, best = middle, more
        else:
            high = middle - 1
    return best


def _unsayable(scale: Scale, sizes: Sizes) -> str | None:
    """Why the family's config cannot describe these sizes; None where it can."""
    config = pruned_config(scale.anatomy, cut_of(scale.anatomy.sizes, sizes))
    return cannot_be_said(scale.anatomy, config, scale.shapes(sizes))


def cut_of(before: Sizes, after: Sizes) -> Cut:
    """Any cut of these sizes: the first parts of every kind."""
    layers = all_layers(before.layers)
    neurons: dict[int, Any] = {}
    groups: dict[int, Any] = {}
    if after.neurons < before.neurons:
        neurons = {layer: tuple(range(after.neurons)) for layer in layers}
    if after.groups < before.groups:
        groups = {layer: tuple(range(after.groups)) for layer in layers}
    hidden = tuple(range(after.hidden)) if after.hidden < before.hidden else None
    return Cut(layers, neurons, groups, hidden)


def _impossible(target: Target, least: Cost, why: str, fix: str) -> RecipeError:
    return RecipeError(
        "The target cannot be reached this way.",
        where=target.text,
        found=f"{least.parameters:,} parameters, {least.bytes:,} bytes where {why}",
        fix=fix,
    )
