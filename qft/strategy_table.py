"""The strategies there are, with their facts; on a model, what share of it each would train."""

from __future__ import annotations

from typing import Any

from qft.errors import RecipeError
from qft.registry import BUILT_IN, strategy_class, strategy_names
from qft.strategy import Context, Strategy

_STEPS = 1000  # any number will do to count what trains


def strategy_table(model: str | None = None, task: str | None = None) -> list[dict[str, Any]]:
    """A row a strategy; a third party's code is not imported, so its row is but a name.

    Args:
        model: folder or hub id to count on, with each strategy's default settings.
        task: what the model is to do; else what it was made for (an encoder: to classify).

    Raises:
        ModelError: the model cannot be opened.
    """
    names = strategy_names()
    rows = [_facts(name) for name in names if name in BUILT_IN]
    if model is not None:
        for row in rows:
            if not row.get("depends_on"):
                row |= _share(strategy_class(row["name"])(), model, task)
    others: list[dict[str, Any]] = [{"name": n, "summary": "(another package's)"}
                                    for n in names if n not in BUILT_IN]  # fmt: skip
    return [*rows, *others]


def _facts(name: str) -> dict[str, Any]:
    cls = strategy_class(name)
    required = [key for key, field in cls.model_fields.items() if field.is_required()]
    # a stack is nothing without its parts: what it can follows from theirs
    facts = {"depends_on": required} if required else _default_facts(cls())
    return {
        "name": name,
        "summary": (cls.__doc__ or "").strip().splitlines()[0],
        "paper": cls.paper,
        **facts,
        "settings": {
            key: {"default": _default(field), "description": field.description}
            for key, field in cls.model_fields.items()
        },
    }


def _default_facts(strategy: Strategy) -> dict[str, Any]:
    return {
        "mergeable": strategy.mergeable,
        **({} if strategy.mergeable else {"instead_of_merging": strategy.advice}),
        "tasks": sorted(strategy.tasks),
    }


def _default(field: Any) -> Any:
    return None if field.is_required() else field.get_default(call_default_factory=True)


def _share(strategy: Strategy, source: str, task: str | None) -> dict[str, Any]:
    """Parameters that train, and their share of the model's; or why it cannot."""
    from qft import models

    folder = models.resolve_folder(source)
    task = task or models.task_to_train(models.read_config(folder))
    if task not in strategy.tasks:
        return {"refused": f"not for the task {task}"}
    labels = ("no", "yes") if task in ("classify", "token") else None
    skeleton = models.open_skeleton(folder, models.ModelSpec(source, task, labels))
    whole = sum(p.numel() for p in skeleton.parameters())
    try:
        attached = strategy.attach(skeleton, Context(task=task, total_steps=_STEPS))
    except RecipeError as error:
        return {"refused": error.what}
    trained = sum(p.numel() for p in attached.parameters() if p.requires_grad)
    return {"task": task, "trained_parameters": trained, "trained_share": trained / whole}
