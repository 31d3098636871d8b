"""qft: fine-tune language models that almost do not fit, and prove that the result works.

Everything the command line does is one call here; nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qft import export
    from qft.checking import check
    from qft.distillation.teach import teach
    from qft.errors import QftError
    from qft.export.delivery import merge
    from qft.healing import heal
    from qft.opening import open_any
    from qft.planning.plan import plan
    from qft.preparation import prepare, unprepare
    from qft.pruning.prune import prune
    from qft.recipe import Recipe, build_recipe, load_recipe
    from qft.scoring import evaluate
    from qft.training import train
    from qft.verification.proof import verify

_HOMES = {
    "QftError": "qft.errors",
    "Recipe": "qft.recipe",
    "build_recipe": "qft.recipe",
    "check": "qft.checking",
    "evaluate": "qft.scoring",
    "heal": "qft.healing",
    "load_recipe": "qft.recipe",
    "merge": "qft.export.delivery",
    "open_any": "qft.opening",
    "plan": "qft.planning.plan",
    "prepare": "qft.preparation",
    "prune": "qft.pruning.prune",
    "teach": "qft.distillation.teach",
    "train": "qft.training",
    "unprepare": "qft.preparation",
    "verify": "qft.verification.proof",
}

__all__ = [
    "QftError",
    "Recipe",
    "build_recipe",
    "check",
    "evaluate",
    "export",
    "heal",
    "load_recipe",
    "merge",
    "open_any",
    "plan",
    "prepare",
    "prune",
    "teach",
    "train",
    "unprepare",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "export":  # a package that can be called
        return importlib.import_module("qft.export")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qft' has no attribute {name!r}")
