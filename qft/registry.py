"""Where strategies come from: a table of the built-in names, and the entry points of others.

Third parties register in their own pyproject.toml, and are imported only when a recipe or a flag
names them (an installed package is not yet a trusted one):

    [project.entry-points."qft.strategies"]
    my-method = "my_package.my_module:MyStrategy"
"""

from __future__ import annotations

import difflib
import importlib
import json
import reprlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qft.errors import AdapterError, QftError, RecipeError
from qft.strategy import PARTS, Strategy

ENTRY_POINT_GROUP = "qft.strategies"

# A bare checkout has no entry points; these are the names that must work there as well.
BUILT_IN = {
    "lora": "adapters.lora:LoRA",
    "adalora": "adapters.adalora:AdaLoRA",
    "ia3": "adapters.ia3:IA3",
    "prefix": "adapters.prefix:Prefix",
    "prompt": "adapters.soft_prompt:Prompt",
    "p-tuning": "adapters.soft_prompt:PTuning",
    "bitfit": "adapters.bitfit:BitFit",
    "layers": "adapters.layers:Layers",
    "head": "adapters.head:Head",
    "full": "adapters.full:Full",
    "stack": "adapters.stack:Stack",
    "distill": "adapters.distill:Distill",
}


def strategy_names() -> list[str]:
    """Every name a recipe may use, the built-in ones first; nothing is imported."""
    others = sorted({p.name for p in _entry_points()} - set(BUILT_IN))
    return [*BUILT_IN, *others]


def strategy_class(name: str) -> type[Strategy]:
    """The strategy called ``name``.

    Raises:
        RecipeError: no such strategy; the nearest names are suggested.
        QftError: its package cannot be imported.
    """
    target = BUILT_IN.get(name)
    if target is None:
        found = [point for point in _entry_points() if point.name == name]
        if not found:
            raise RecipeError(
                f"There is no strategy {name!r}.",
                where="strategy.name",
                fix=suggestion(name, strategy_names()),
            )
        target = found[0].value
    return _import_strategy(name, target)


def build_strategy(settings: Mapping[str, Any]) -> Strategy:
    """A strategy from its recipe entry, ``{"name": "lora", "rank": 16}``.

    Raises:
        RecipeError: no name, an unknown name, or settings it refuses (all are listed).
    """
    strategy, problems = check_strategy(settings)
    if strategy is None:
        count = len(problems)
        lines = [f"  {'.'.join(place)}: {text}" for place, text in problems]
        raise RecipeError(
            "\n".join([f"The strategy has {count} problem{'s' * (count != 1)}.", *lines]),
            where=f"strategy: {settings.get('name')}",
        )
    return strategy


Problems = list[tuple[tuple[str, ...], str]]  # the setting's place in the entry, and what is wrong


def check_strategy(settings: Mapping[str, Any]) -> tuple[Strategy | None, Problems]:
    """The strategy of a recipe entry, or everything that is wrong with the entry."""
    values = {str(key): value for key, value in settings.items()}
    name = values.pop("name", None)
    if not isinstance(name, str):
        return None, [(("name",), f"is missing; name one of: {', '.join(strategy_names())}")]
    if name not in strategy_names():
        hint = suggestion(name, strategy_names())
        return None, [(("name",), f"there is no strategy {name!r}; {hint}")]
    cls = strategy_class(name)
    values, problems = _with_parts(cls, values)
    if problems:
        return None, problems
    try:
        return cls(**values), []
    except ValidationError as error:
        return None, [_explain(problem, cls) for problem in error.errors()]


def _with_parts(cls: type[Strategy], values: dict[str, Any]) -> tuple[dict[str, Any], Problems]:
    """Builds the strategies that a strategy is made of, from their own entries."""
    problems: Problems = []
    for key in _part_fields(cls) & set(values):
        built = []
        several = isinstance(values[key], (list, tuple))
        entries = values[key] if several else [values[key]]
        for number, entry in enumerate(entries):
            entry = {"name": entry} if isinstance(entry, str) else entry
            if not isinstance(entry, Mapping):
                built.append(entry)
                continue
            part, found = check_strategy(entry)
            numbered = (str(number),) if several else ()
            problems += [((key, *numbered, *place), text) for place, text in found]
            built.append(part)
        one = cls.model_fields[key].annotation is Strategy
        values = {**values, key: built[0] if one and not several else tuple(built)}
    return values, problems


def _part_fields(cls: type[Strategy]) -> set[str]:
    """The settings that are strategies themselves."""
    return {
        key
        for key, field in cls.model_fields.items()
        if field.annotation is Strategy or Strategy in getattr(field.annotation, "__args__", ())
    }


def _explain(problem: Any, cls: type[Strategy]) -> tuple[tuple[str, ...], str]:
    place = tuple(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return place, f"no such setting; {suggestion(place[-1], list(cls.model_fields))}"
    message = f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
    return place, f"{message}, found {brief(problem.get('input'))}"


def brief(value: Any) -> str:
    """A value as an error shows it; short, whatever a recipe from elsewhere holds."""
    return _Brief().repr(value)


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxstring = self.maxother = 120


def settings_of(strategy: Strategy) -> dict[str, Any]:
    """The recipe entry that rebuilds ``strategy``."""
    parts = _part_fields(type(strategy))
    values = strategy.model_dump(mode="json", exclude=parts)
    nested: dict[str, Any] = {}
    for key in sorted(parts):
        held = getattr(strategy, key)
        nested[key] = (
            settings_of(held)
            if isinstance(held, Strategy)
            else [settings_of(part) for part in held]
        )
    return {"name": strategy.name, **values, **nested}


def strategy_from_folder(folder: Path, *, named: str | None = None) -> Strategy:
    """The strategy that wrote an adapter folder, its settings rebuilt.

    Args:
        folder: an adapter folder, qft's own or PEFT's.
        named: a third party's strategy the user named; others' code is never asked unnamed.

    Raises:
        AdapterError: no strategy recognises the folder.
    """
    if not folder.is_dir():
        raise AdapterError("The adapter folder does not exist.", where=folder)
    if (folder / PARTS).is_file():
        return _stack_in(folder, named)
    for name in [named] if named else list(BUILT_IN):
        try:
            strategy = strategy_class(name).from_folder(folder)
        except (ValueError, KeyError, TypeError) as error:
            raise AdapterError(
                f"The adapter folder says it is {name}, and its settings make no sense.",
                where=folder,
                found=f"{type(error).__name__}: {brief(str(error))}",
            ) from error
        if strategy is not None:
            return strategy
    held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise AdapterError(
        "No strategy recognises this adapter folder.",
        where=folder,
        found=held,
        fix="name the folder of a qft run or a PEFT adapter; for a third party's strategy add "
        "--strategy NAME",
    )


def _stack_in(folder: Path, named: str | None) -> Strategy:
    """A stack is one sub-folder a part."""
    try:
        names = json.loads((folder / PARTS).read_text(encoding="utf-8"))["parts"]
        if not names or not all(isinstance(n, str) and n == Path(n).name for n in names):
            raise ValueError("no list of folder names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            "The stack's parts cannot be read.", where=folder / PARTS, found=error
        ) from None
    parts = [strategy_from_folder(folder / n, named=named) for n in names]
    return strategy_class("stack")(of=tuple(parts))  # type: ignore[call-arg]


def _entry_points() -> list[metadata.EntryPoint]:
    return list(metadata.entry_points(group=ENTRY_POINT_GROUP))


def _import_strategy(name: str, target: str) -> type[Strategy]:
    module_name, _, attribute = target.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        shadow = "adapters" in module_name and name in BUILT_IN
        raise QftError(
            f"The strategy {name!r} could not be imported.",
            where=target,
            found=f"{type(error).__name__}: {error}",
            fix="another package called `adapters` (AdapterHub's) hides qft's own; use a separate "
            "virtual environment"
            if shadow
            else "reinstall the package that brings it",
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Strategy)):
        raise QftError(
            f"The strategy {name!r} is not a subclass of qft.strategy.Strategy.", where=target
        )
    return cls


def suggestion(name: str, choices: list[str]) -> str:
    """What a user may have meant, and what there is."""
    near = difflib.get_close_matches(name, choices, n=1)
    listed = ", ".join(choices) or "none"
    return f"did you mean {near[0]!r}? there are: {listed}" if near else f"there are: {listed}"
