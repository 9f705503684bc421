"""Gives the operators of the allow-list their implementations. Nothing is evaluated or imported by name.

Some stand for a safer or more general operator than the one that was exported.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from gradwire_protocol.errors import ModelError
from gradwire_protocol.operators import PYTHON_FUNCTIONS, is_allowed

_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow")},
    **{name: getattr(operator, name) for name in ("neg", "eq", "ne", "ge", "gt", "le", "lt", "and_", "or_", "not_")},
    **{name: getattr(torch, name) for name in ("sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_sum")},
    **{name: getattr(math, name) for name in ("trunc", "ceil", "floor")},
    "sym_sqrt": math.sqrt,
    "round": round,
}
PYTHON_IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    name: _IMPLEMENTATIONS[name.removeprefix("python.")] for name in PYTHON_FUNCTIONS
}

# Activations travel dense, so that a view of one may have to copy. Memory without defined contents may hold what
# belonged to another run: it is zeroed.
_SUBSTITUTES = {
    "aten.view.default": "aten.reshape.default",
    "aten.empty.memory_format": "aten.zeros.default",
    "aten.empty_like.default": "aten.zeros_like.default",
    "aten.new_empty.default": "aten.new_zeros.default",
}
# Keyword arguments that do not matter here: pinned memory is a choice of the server, and zeros take no format.
_DROPPED_KEYWORDS: dict[str, frozenset[str]] = {"aten.empty.memory_format": frozenset({"memory_format"})}
_ALWAYS_DROPPED = frozenset({"pin_memory"})


def resolve(target: str) -> Callable[..., Any]:
    """Return the function behind an allowed target. ModelError for any other."""
    if not is_allowed(target):
        raise ModelError(
            f"Operator '{target[:200]}' is not allowed in a graph",
            expected="an operator of the allow-list (gradwire_protocol/operators.py)",
            got=target[:200],
            remedy="use the same version of Gradwire for client and servers; custom operators need --operators MODULE",
        )
    if target in PYTHON_IMPLEMENTATIONS:
        return PYTHON_IMPLEMENTATIONS[target]
    _, name, overload = _SUBSTITUTES.get(target, target).split(".")
    function: Callable[..., Any] = getattr(getattr(torch.ops.aten, name), overload)
    return function


def keeps_keyword(target: str, keyword: str) -> bool:
    """Whether a keyword argument of an operator is passed on."""
    return keyword not in _ALWAYS_DROPPED and keyword not in _DROPPED_KEYWORDS.get(target, ())
