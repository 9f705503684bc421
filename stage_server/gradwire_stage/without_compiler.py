"""Keeps torch's compiler out of a server that compiles nothing: it costs as much time and memory as the rest of torch.

torch.optim and custom operators import torch._dynamo only to tell it to leave them alone. A server puts a module in its
place that has just that, and that makes way for the real one as soon as anything else is asked of it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch

_NAME = "torch._dynamo"
# What imports and searches look at, and does not mean that the compiler is wanted.
_HARMLESS = frozenset({"__file__", "__wrapped__", "__warningregistry__"})

Function = TypeVar("Function", bound=Callable[..., Any])


class _StandIn(ModuleType):
    """torch._dynamo, as long as nothing is to be compiled."""

    __file__ = None

    def disable(self, function: Function, *_: object, **__: object) -> Function:
        """Return a function that is not compiled: as nothing is, the function itself."""
        return function

    def graph_break(self, *_: object, **__: object) -> None:
        """End a graph that is traced: there is none."""

    def __getattr__(self, name: str) -> Any:
        if name in _HARMLESS:
            raise AttributeError(name)
        if sys.modules.get(_NAME) is self:
            del sys.modules[_NAME]
        real = importlib.import_module(_NAME)
        setattr(torch, "_dynamo", real)  # noqa: B010  # torch declares no such attribute
        return getattr(real, name)


def leave_compiler_out() -> None:
    """Put the stand-in in its place, unless the compiler is there already."""
    if _NAME not in sys.modules:
        stand_in = _StandIn(_NAME)
        sys.modules[_NAME] = stand_in
        setattr(torch, "_dynamo", stand_in)  # noqa: B010
