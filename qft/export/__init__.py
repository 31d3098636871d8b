"""A model, or a base with an adapter on it, in the format its users run: one file a format.

`qft.export` is this package and, called, :func:`qft.export.delivery.export`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """Lets `qft.export(run, out, format=…)` stand beside `import qft.verification.verify`."""

    def __call__(self, *arguments: Any, **settings: Any) -> dict[str, Any]:
        from qft.export.delivery import export

        return export(*arguments, **settings)


sys.modules[__name__].__class__ = _CallablePackage
