"""Operators that draw random numbers, for a part of a value: they draw for the whole, and take what is of the part.

The generator has been seeded for the node, so that all servers draw the same, and what one process would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gradwire_stage.group.parts import own_part
from gradwire_stage.group.tensor_group import Shards
from gradwire_stage.regions import Scope, autocast_type

_ACCUMULATED = (torch.bfloat16, torch.float16)


def dropout(
    scope: Scope, name: str, x: torch.Tensor, p: float, train: bool, dim: int, sections: Sequence[int]
) -> torch.Tensor:
    """Return aten.dropout of the whole, of the own part."""
    return _dropped(scope.group, x, p, dim, sections) if train and p else x


def attention(
    scope: Scope,
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Return aten.scaled_dot_product_attention of all heads, of the own ones.

    query, key, value: (..., own heads, positions, features). attn_mask: of the own heads, or one for all. With dropout
    it is what torch calls the math implementation, which is its only one on CPUs then.
    """
    group = scope.group
    if not dropout_p:
        found: torch.Tensor = torch.ops.aten.scaled_dot_product_attention.default(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return found
    lower = autocast_type(query.device)
    if lower is not None:
        query, key, value = (_cast(tensor, lower) for tensor in (query, key, value))
        attn_mask = None if attn_mask is None else _cast(attn_mask, lower)
    with torch.autocast(query.device.type, enabled=False):
        return _attention(group, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _attention(
    group: Shards,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    given = query.dtype
    if given in _ACCUMULATED:
        query, key, value = query.float(), key.float(), value.float()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    factor = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    # Both factors are scaled, for stability.
    root = math.sqrt(abs(factor))
    scores = (query * math.copysign(root, factor)) @ (key.transpose(-2, -1) * root)  # (..., heads, queries, keys)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -math.inf)
        scores = scores + mask
    weights = torch.ops.aten._safe_softmax.default(scores, -1)
    heads = query.shape[-3] * group.size
    kept = _dropped(group, weights, p, weights.dim() - 3, [heads])
    made: torch.Tensor = (kept @ value).to(given)
    return made


def _dropped(group: Shards, x: torch.Tensor, p: float, dim: int, sections: Sequence[int]) -> torch.Tensor:
    # As the whole lies in memory, on which the order in which numbers are drawn may depend.
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda each: (-strides[each], x.shape[each] == 1))
    sizes = [sum(sections) if each == dim else x.shape[each] for each in order]
    ones = x.new_ones(sizes).permute([order.index(each) for each in range(x.dim())])
    drawn = torch.ops.aten.dropout.default(ones, p, True)
    return x * own_part(drawn, dim, sections, shards=group.size, shard=group.own)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what autocast makes of an operand."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
