"""Replacing a module's ``forward`` on that one instance, and taking it back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

_PLAIN = "_qft_plain_forward"


@dataclass(frozen=True)
class PlainForward:
    """A module's forward as its class has it.

    A bound method would be pickled by its name, which on loading is the one that replaced it.
    """

    module: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own."""
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def signature(self) -> inspect.Signature:
        """The arguments without ``self``."""
        found = inspect.signature(type(self.module).forward)
        return found.replace(parameters=list(found.parameters.values())[1:])


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """A module's forward before anything replaces it here."""
    own: Callable[..., Any] | None = module.__dict__.get("forward")
    return PlainForward(module) if own is None else own


def replace_forward(
    module: nn.Module, make: Callable[[Callable[..., Any]], Any], *, again: bool = False
) -> None:
    """Sets ``module.forward`` to ``make(the forward it had)``.

    What was set on the instance before (by another library, or by a strategy) is what is called
    through, and what comes back.

    Args:
        again: it may have been replaced already; each replacement is undone by itself.
    """
    if _PLAIN in module.__dict__ and not again:
        raise RuntimeError("this module's forward is replaced already")
    plain = plain_forward(module)
    formers: list[Any] = module.__dict__.setdefault(_PLAIN, [])
    formers.append(module.__dict__.get("forward"))
    module.forward = make(plain)


def restore_forward(module: nn.Module) -> None:
    """Undoes the last `replace_forward`; nothing happens to a module that was not replaced."""
    if _PLAIN not in module.__dict__:
        return
    own = module.__dict__[_PLAIN].pop()
    if not module.__dict__[_PLAIN]:
        del module.__dict__[_PLAIN]
    del module.__dict__["forward"]
    if own is not None:
        module.forward = own


def is_replaced(module: nn.Module) -> bool:
    """Whether `replace_forward` was called on the module."""
    return _PLAIN in module.__dict__
