"""Finds several adapters of one base and makes them one: on the weights, or on their factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qft import models
from qft.adapter_folder import AdapterFolder, locate_adapter
from qft.card import write_card
from qft.errors import AdapterError, RecipeError
from qft.files import new_folder, require_apart
from qft.lean.combining import Combination
from qft.merging.merge import require_mergeable
from qft.merging.several import Several
from qft.merging.side_files import copy_files, tokenizer_files
from qft.progress import QUIET, Reporter
from qft.registry import settings_of, strategy_from_folder

SPACES = ("weights", "factors")
_SAME = ("labels", "labels_are", "pooling")  # of the cards, where there are some


def combination(count: int, settings: Mapping[str, Any]) -> Combination:
    """The settings of a combination of ``count`` adapters, as a user gives them.

    Args:
        settings: keys of :class:`qft.lean.combining.Combination`; without weights every adapter's
            is 1.

    Raises:
        RecipeError: an unknown or impossible setting.
    """
    known = [field.name for field in fields(Combination)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise RecipeError("No such setting of a combination.", where=unknown[0],
                          fix=", ".join([*known, "space"]))  # fmt: skip
    given = {key: value for key, value in settings.items() if value is not None}
    weights = tuple(float(weight) for weight in given.pop("weights", [1] * count))
    if len(weights) != count:
        raise RecipeError(
            "Every adapter needs one weight.",
            where="weights",
            found=f"{len(weights)} for {count} adapters",
            fix="--weights 1,-0.5",
        )
    return Combination(weights, **given)


def locate_several(
    sources: Sequence[str | Path], *, base: str | None = None, strategy: str | None = None
) -> list[AdapterFolder]:
    """The adapters that are named, all of one base and one task.

    Raises:
        AdapterError: one is not there, or they do not belong together.
    """
    found = [locate_adapter(source, base=base, strategy=strategy) for source in sources]
    _require_same("base", [(one.folder, models.fingerprint(one.base)) for one in found])
    _require_same("task", [(one.folder, one.task) for one in found])
    for key in _SAME:
        _require_same(key, [(one.folder, one.card.get(key)) for one in found if one.card])
    return found


def _require_same(what: str, held: Sequence[tuple[Path, Any]]) -> None:
    for folder, value in held[1:]:
        if value != held[0][1]:
            raise AdapterError(
                "These adapters do not belong together: they were made for another "
                f"{what.replace('_', ' ')}.",
                where=folder,
                found=f"{value}, and {held[0][1]} in {held[0][0]}",
                fix="combine adapters of one base model (--base names it) and one task",
            )


Sources = str | Path | Sequence[str | Path]


def listed(sources: Sources) -> list[str | Path]:
    """What one or several sources are, as a list."""
    return [sources] if isinstance(sources, (str, Path)) else list(sources)


@contextmanager
def located(
    sources: Sources,
    out: str | Path,
    settings: Mapping[str, Any],
    *,
    base: str | None = None,
    strategy: str | None = None,
) -> Iterator[AdapterFolder]:
    """The adapter that is named, or several as one, for whatever takes one.

    Args:
        settings: of a combination, see :func:`combination`; and ``space``: ``weights`` (the usual)
            combines the updates of the base's weights; ``factors`` makes the adapter that
            :func:`combine_folders` writes, beside ``out``, for as long as this lasts.

    Raises:
        AdapterError: the adapters do not belong together, or cannot be combined like this.
        RecipeError: the settings make no sense.
    """
    several = listed(sources)
    if len(several) == 1 and not settings:
        yield locate_adapter(several[0], base=base, strategy=strategy)
        return
    own = dict(settings)
    space = own.pop("space", None) or "weights"
    how = combination(len(several), own)
    found = locate_several(several, base=base, strategy=strategy)
    require_apart(Path(out), *map(Path, several))
    with _together(found, how, space, Path(out)) as one:
        yield one


def combine_folders(
    sources: Sources,
    out: str | Path,
    settings: Mapping[str, Any],
    *,
    base: str | None = None,
    strategy: str | None = None,
    overwrite: bool = False,
    reporter: Reporter = QUIET,
) -> dict[str, Any]:
    """Writes one adapter folder that does what several do together.

    Args:
        settings: see :func:`combination`; without a method it is ``cat``, the exact sum.

    Returns:
        Where it is and how it was made.

    Raises:
        AdapterError: these adapters, or this method, cannot.
        OutputExistsError: ``out`` is taken.
    """
    several = listed(sources)
    own = dict(settings)
    if own.pop("space", None) == "weights":
        raise RecipeError("An adapter holds factors; combined weights are a model.",
                          where="space", found="weights", fix="leave out --space, or "
                          "--adapter-only")  # fmt: skip
    own["method"] = own.get("method") or "cat"
    how = combination(len(several), own)
    found = locate_several(several, base=base, strategy=strategy)
    require_apart(Path(out), *map(Path, several))
    write_combined(found, how, Path(out), overwrite=overwrite)
    reporter.say(f"combined: {len(found)} adapters by {how.method} in {out}")
    return {"out": str(out), "adapters": len(found), "method": how.method,
            "weights": list(how.weights)}  # fmt: skip


@contextmanager
def _together(
    found: Sequence[AdapterFolder], how: Combination, space: str, out: Path
) -> Iterator[AdapterFolder]:
    if space not in SPACES:
        raise RecipeError("There is no such space.", where="space", found=space,
                          fix=" or ".join(SPACES))  # fmt: skip
    if how.svd and space == "weights" and how.sparse:
        raise RecipeError(
            "A decomposition makes factors, and the weights need none.",
            where="method",
            found=how.method,
            fix=f"{how.plain}, or space factors",
        )
    for one in found:
        require_mergeable(one.strategy, one.folder)
    if space == "weights" and not how.svd:
        yield replace(
            found[0],
            strategy=Several(
                parts=tuple(one.strategy for one in found),
                folders=tuple(one.folder for one in found),
                how=how,
            ),
            card=_on_the_original(_card(found)),
        )
        return
    # a truncated sum is an adapter of that rank, whichever way it is looked at
    with TemporaryDirectory(prefix=".combining-", dir=_existing(out.absolute().parent)) as name:
        folder = Path(name) / "adapter"
        write_combined(found, how, folder)
        strategy = strategy_from_folder(folder)
        yield replace(found[0], folder=folder, strategy=strategy, card=_card(found))


def _existing(folder: Path) -> Path:
    while not folder.is_dir():
        folder = folder.parent
    return folder


def write_combined(
    found: Sequence[AdapterFolder], how: Combination, out: Path, *, overwrite: bool = False
) -> None:
    """Writes one adapter folder that does what several do together.

    Raises:
        AdapterError: this kind of adapter, or this method, cannot.
        OutputExistsError: ``out`` is taken.
    """
    first = found[0].strategy
    kinds = {one.strategy.name for one in found}
    if len(kinds) > 1:
        raise AdapterError(
            "Adapters of different kinds cannot become one adapter.",
            where=out,
            found=", ".join(sorted(kinds)),
            fix="merge them into the base's weights: --space weights",
        )
    with new_folder(out, overwrite=overwrite) as folder:
        first.combine([one.folder for one in found], how, folder)
        copy_files(tokenizer_files(found[0].folder), folder)
        card = _card(found)
        if card is not None:
            strategy = settings_of(strategy_from_folder(folder))
            write_card(folder, {**card, "strategy": strategy})


def _card(found: Sequence[AdapterFolder]) -> dict[str, Any] | None:
    """The first adapter's card; the base is the original one where training saw different ones."""
    cards = [one.card for one in found if one.card is not None]
    if not cards:
        return None
    same = len({card["quantize"] for card in cards}) == 1
    return {
        **cards[0],
        "quantize": cards[0]["quantize"] if same else "none",
        "max_length": max(card.get("max_length", 0) for card in cards),
    }


def _on_the_original(card: dict[str, Any] | None) -> dict[str, Any] | None:
    """The card of what no training has seen: it belongs to the original base."""
    return None if card is None else {**card, "quantize": "none"}
