"""The ways to prune, by name. A method says what stays; `qft.pruning.prune` does all the rest.

To add one: a function from a `qft.pruning.plan.Job` to a `Plan`, and its line in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qft.errors import RecipeError
from qft.pruning import depth, width, width_scores, zeros
from qft.pruning.plan import Job, Plan, Settings


def _no_pattern(settings: Settings) -> None:
    if settings.pattern is not None:
        raise RecipeError(f"The method {settings.method!r} knows no pattern of zeros.",
                          where="--pattern", found=settings.pattern,
                          fix="--method magnitude, wanda or sparsegpt")  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One way to prune.

    Attributes:
        summary: one sentence.
        plan: decides what stays.
        importance: what ``--importance`` may say; the first is the default.
        needs_rows: whether these settings score on rows.
        check: refuses settings that say nothing to it, before anything is opened.
    """

    summary: str
    plan: Callable[[Job], Plan]
    importance: tuple[str, ...] = ()
    needs_rows: Callable[[Settings], bool] = field(default=lambda settings: True)
    check: Callable[[Settings], None] = _no_pattern


METHODS: Mapping[str, Method] = {
    "depth": Method(
        "whole layers go", depth.plan_depth, depth.IMPORTANCE,
        lambda settings: settings.layers is None,
    ),
    "width": Method("every layer becomes narrower", width.plan_width, width_scores.IMPORTANCE),
    "magnitude": Method("the smallest weights become zero", zeros.plan_magnitude,
                        needs_rows=lambda settings: False, check=zeros.check_zeros),
    "wanda": Method("the weights that say least on your rows become zero", zeros.plan_wanda,
                    check=zeros.check_zeros),
    "sparsegpt": Method("weights become zero and the rest makes up for them",
                        zeros.plan_sparsegpt, check=zeros.check_zeros),
}  # fmt: skip


def method_of(settings: Settings) -> Method:
    """The method the user named.

    Raises:
        RecipeError: there is none, or it knows no such importance.
    """
    method = METHODS.get(settings.method)
    if method is None:
        raise RecipeError("No such method.", where="--method", found=settings.method,
                          fix=", ".join(METHODS))  # fmt: skip
    if settings.importance is not None and settings.importance not in method.importance:
        raise RecipeError(f"The method {settings.method!r} has no such importance.",
                          where="--importance", found=settings.importance,
                          fix=", ".join(method.importance) or "leave it out")  # fmt: skip
    method.check(settings)
    return method
