"""Replacing a module's ``forward`` on that one instance, and taking it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_PLAIN = "_qft_plain_forward"


def replace_forward(module: nn.Module, make: Callable[[Callable[..., Any]], Any]) -> None:
    """Sets ``module.forward`` to ``make(the forward it had)``; once a module.

    What was set on the instance before (by another library, or by a strategy) is what is called
    through, and what comes back.
    """
    if _PLAIN in module.__dict__:
        raise RuntimeError("this module's forward is replaced already")
    own = module.__dict__.get("forward")
    module.__dict__[_PLAIN] = own
    module.forward = make(module.forward)


def restore_forward(module: nn.Module) -> None:
    """Undoes `replace_forward`; nothing happens to a module that was not replaced."""
    if _PLAIN not in module.__dict__:
        return
    own = module.__dict__.pop(_PLAIN)
    del module.__dict__["forward"]
    if own is not None:
        module.forward = own


def is_replaced(module: nn.Module) -> bool:
    """Whether `replace_forward` was called on the module."""
    return _PLAIN in module.__dict__
