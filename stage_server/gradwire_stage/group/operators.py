"""The operators that tensor-parallel servers of a stage run together (gradwire_protocol.group_operators).

Generated code calls them with the scope of the pass and the name of the node, which names what is exchanged; then come
the node's arguments. The pairs of forward and backward are those of Megatron-LM (Shoeybi et al., 2019). Leaves to
others: the loss (`cross_entropy.py`), what draws random numbers (`dropout.py`), how parts travel (`tensor_group.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import Function

from gradwire_protocol import group_operators as names
from gradwire_protocol.errors import ModelError
from gradwire_stage.group.cross_entropy import cross_entropy
from gradwire_stage.group.dropout import attention, dropout
from gradwire_stage.group.parts import joined, own_part
from gradwire_stage.group.tensor_group import Shards
from gradwire_stage.regions import Scope


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, group: Shards, name: str, x: torch.Tensor) -> torch.Tensor:
        ctx.group, ctx.name = group, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        return None, None, ctx.group.all_reduce(f"{ctx.name}/gradient", gradient)


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, group: Shards, name: str, x: torch.Tensor) -> torch.Tensor:
        return group.all_reduce(name, x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        return None, None, gradient


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, group: Shards, name: str, x: torch.Tensor, dim: int, sections: Sequence[int]) -> torch.Tensor:
        ctx.group, ctx.name, ctx.dim, ctx.sections = group, name, dim, sections
        return own_part(x, dim, sections, shards=group.size, shard=group.own)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, torch.Tensor, None, None]:
        parts = ctx.group.all_gather(f"{ctx.name}/gradient", gradient)
        return None, None, joined(parts, ctx.dim, ctx.sections), None, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, group: Shards, name: str, x: torch.Tensor, dim: int, sections: Sequence[int]) -> torch.Tensor:
        ctx.group, ctx.dim, ctx.sections = group, dim, sections
        return joined(group.all_gather(name, x), dim, sections)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, torch.Tensor, None, None]:
        part = own_part(gradient, ctx.dim, ctx.sections, shards=ctx.group.size, shard=ctx.group.own)
        return None, None, part, None, None


def copy(scope: Scope, name: str, x: torch.Tensor) -> torch.Tensor:
    """Return the same; the gradients of all servers are added up."""
    return _unlinked(scope, _apply(_Copy, scope, name, x))


def add_up(scope: Scope, name: str, x: torch.Tensor) -> torch.Tensor:
    """Return the sum of what all servers have, whose gradient each of them has."""
    return _apply(_Sum, scope, name, _kept(scope, x))


def split(scope: Scope, name: str, x: torch.Tensor, dim: int, sections: Sequence[int]) -> torch.Tensor:
    """Return the own part of a value that all have; the gradients of the parts are brought together."""
    return _unlinked(scope, _apply(_Split, scope, name, x, dim, list(sections)))


def gather(scope: Scope, name: str, x: torch.Tensor, dim: int, sections: Sequence[int]) -> torch.Tensor:
    """Return the whole of a value of which each has a part."""
    return _apply(_Gather, scope, name, _kept(scope, x), dim, list(sections))


def embedding(
    scope: Scope, name: str, table: torch.Tensor, indices: torch.Tensor, padding_idx: int = -1
) -> torch.Tensor:
    """Return the rows that are in the own part of a table; zeros for the others, which other servers have."""
    group = scope.group
    rows = table.shape[0]
    local = indices - group.own * rows
    inside = (local >= 0) & (local < rows)
    torch._assert_async(((indices >= 0) & (indices < rows * group.size)).all(), "an index is not in the table")
    padding = padding_idx - group.own * rows
    found: torch.Tensor = torch.ops.aten.embedding.default(
        table, local.masked_fill(~inside, 0), padding if padding_idx >= 0 and 0 <= padding < rows else -1
    )
    return found.masked_fill(~inside.unsqueeze(-1), 0)


OPERATORS: Mapping[str, Callable[..., Any]] = {
    names.COPY: copy,
    names.SUM: add_up,
    names.SPLIT: split,
    names.GATHER: gather,
    names.EMBEDDING: embedding,
    names.CROSS_ENTROPY: cross_entropy,
    names.DROPOUT: dropout,
    names.ATTENTION: attention,
}

if OPERATORS.keys() != names.GROUP_OPERATORS:
    raise RuntimeError(
        "every operator of gradwire_protocol.group_operators needs an implementation in gradwire_stage.group"
    )


def check_size(shards: int, target: str) -> None:
    """Refuse a group operator in a segment of one server. ModelError."""
    if shards < 2:
        raise ModelError(
            f"Operator '{target}' is for tensor-parallel servers",
            expected="several of them for the stage",
            got="one",
        )


def _apply(function: type[Function], scope: Scope, name: str, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    made: torch.Tensor = function.apply(scope.group, name, x, *arguments)  # type: ignore[no-untyped-call]
    return made


def _kept(scope: Scope, x: torch.Tensor) -> torch.Tensor:
    """Return what can be sent: nobody may write to it, which other nodes of the segment might do."""
    return x.clone() if scope.writes else x


def _unlinked(scope: Scope, made: torch.Tensor) -> torch.Tensor:
    """Return what other nodes can write to: autograd forbids that where a function's result is a view of its input."""
    return made.clone() if scope.writes else made
