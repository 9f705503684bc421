"""Which operators draw random numbers, and how often: of the graph as exported, and of what eager mode makes of it.

A node of the graph is seeded once; eager mode takes it apart, such as dropout into `bernoulli_` and a product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Draw:
    """A random node of the train graph, dead ones included: eager mode draws for these too."""

    node: str
    target: str
    place: str  # in the user's code
    calls: int  # of operators that draw, in eager mode


@dataclass(frozen=True)
class _Kind:
    """When an operator draws, by the names of its arguments, and what eager mode draws with (by default, itself)."""

    probability: str = ""  # draws nothing where this is 0, or
    certain: bool = False  # where it is 1
    training: str = ""  # draws nothing where this is false
    layers: str = ""  # draws between layers, so many minus one
    eager: tuple[str, ...] = ()


_MASKS = ("bernoulli_", "native_dropout")
_DROPOUT = _Kind(probability="p", certain=True, training="train", eager=_MASKS)
_RECURRENT = _Kind(probability="dropout", certain=True, training="train", layers="num_layers", eager=_MASKS)
_RRELU = _Kind(training="training", eager=("rrelu_with_noise", "rrelu_with_noise_"))
_ATTENTION = "_scaled_dot_product"  # begins the names of the kernels that do it in one
_KINDS: dict[str, _Kind] = {
    **{
        f"{name}{in_place}": _DROPOUT
        for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
        for in_place in ("", "_")
    },
    "native_dropout": _Kind(training="train"),
    "scaled_dot_product_attention": _Kind(probability="dropout_p", certain=True, eager=(*_MASKS, _ATTENTION)),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _RECURRENT),
    **dict.fromkeys(("rrelu", "rrelu_", "rrelu_with_noise", "rrelu_with_noise_"), _RRELU),
}
_PLAIN, _FUSED_ATTENTION = _Kind(), _Kind(probability="dropout_p")


def draws(operator: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    """Return how often eager mode draws for one call; 0 for what is not random, or not with these arguments."""
    if not isinstance(operator, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in operator.tags:
        return 0
    kind = _kind(base_name(operator))
    given = _Given(operator, arguments, keywords)
    probability = given.value(kind.probability, None)
    if isinstance(probability, int | float) and (probability == 0 or (kind.certain and probability == 1)):
        return 0
    if given.value(kind.training, True) is False:
        return 0
    return int(given.value(kind.layers, 2)) - 1


def can_stand_for(operator: Any, target: str) -> bool:
    """Whether eager mode calls `operator` for a node with this target, such as "aten.dropout.default"."""
    wanted = target.split(".")[1]
    names = _kind(wanted).eager or (wanted,)
    name = base_name(operator)
    return name in names or (_ATTENTION in names and name.startswith(_ATTENTION))


def base_name(operator: Any) -> str:
    """The operator's name without namespace and overload."""
    return str(operator._schema.name).split("::")[1]


def _kind(name: str) -> _Kind:
    return _FUSED_ATTENTION if name.startswith(_ATTENTION) else _KINDS.get(name, _PLAIN)


class _Given:
    """The arguments of a call by name; what a traced graph computes counts as unknown."""

    def __init__(self, operator: torch._ops.OpOverload, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        self._values = dict(keywords)
        for position, argument in enumerate(operator._schema.arguments):
            if position < len(arguments):
                self._values[argument.name] = arguments[position]
            elif argument.has_default_value():
                self._values.setdefault(argument.name, argument.default_value)

    def value(self, name: str, default: Any) -> Any:
        found = self._values.get(name, default)
        return default if found is None or isinstance(found, fx.Node) else found
