"""What draws random numbers for a part of a value draws what it would for the whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shard_threads import scope_of

from gradwire_stage.group.dropout import attention, dropout
from gradwire_stage.group.parts import joined, own_part
from gradwire_stage.group.tensor_group import LoneGroup


class Shard(LoneGroup):
    """One that needs nothing of the others."""

    def __init__(self, own: int, size: int) -> None:
        super().__init__(size)
        self.own = own  # type: ignore[misc]


def each(size: int, work: Callable[[Any], torch.Tensor]) -> list[torch.Tensor]:
    """Return what shards make, each with the generator as it was seeded."""
    found = []
    for own in range(size):
        torch.manual_seed(5)
        found.append(work(scope_of(Shard(own, size))))
    return found


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize(("dim", "sections"), [(0, [8]), (1, [4, 8]), (2, [4])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_own_part_of_a_dropout(order: tuple[int, ...], dim: int, sections: list[int], dtype: torch.dtype) -> None:
    x = torch.randn(8, 12, 4, dtype=dtype).permute(order).contiguous()
    x = x.permute([order.index(place) for place in range(3)])  # (8, 12, 4), in another order in memory
    torch.manual_seed(5)
    expected = torch.ops.aten.dropout.default(x, 0.3, True)

    def work(scope: Any) -> torch.Tensor:
        # A part that was made as one has the order of the whole.
        own = own_part(x, dim, sections, shards=4, shard=scope.group.own)
        mine = own.permute(order).contiguous().permute([order.index(place) for place in range(3)])
        return dropout(scope, "d", mine, 0.3, True, dim, sections)

    parts = each(4, work)
    assert torch.equal(joined(parts, dim, sections), expected)
    assert dropout(scope_of(Shard(1, 4)), "d", x, 0.3, False, dim, sections) is x


def heads(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


MASKS = {
    "none": None,
    "all": torch.ones(3, 3, dtype=torch.bool).tril(),
    # Not evenly spaced: a softmax does not see what all scores of a row have more.
    "heads": heads((4, 3, 3), 8, torch.float64),
    "any head": heads((2, 1, 3, 3), 9, torch.float64),
}


OPTIONS: list[dict[str, Any]] = [{}, {"scale": 0.7}, {"scale": -0.7}, {"enable_gqa": True}]


@pytest.mark.parametrize(
    ("mask", "options"), [*itertools.product(MASKS, OPTIONS), ("none", {"is_causal": True})], ids=str
)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_own_heads_of_an_attention(mask: str, options: dict[str, Any], p: float) -> None:
    few = 2 if options.get("enable_gqa") else 4
    given = [heads((2, count, 3, 5), seed, torch.float64) for seed, count in enumerate((4, few, few))]
    whole = [value.clone().requires_grad_() for value in given]
    torch.manual_seed(5)
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    causal = options.get("is_causal", False)
    rest = {name: value for name, value in options.items() if name != "is_causal"}
    expected = sdpa(*whole, MASKS[mask], p, causal, **rest)
    expected.square().sum().backward()
    gradients = []

    def work(scope: Any) -> torch.Tensor:
        own = [
            own_part(value, 1, [value.shape[1]], shards=2, shard=scope.group.own).clone().requires_grad_()
            for value in given
        ]
        of_all = MASKS[mask]
        own_mask = own_part(of_all, 0, [4], shards=2, shard=scope.group.own) if mask == "heads" else of_all
        made = attention(scope, "a", *own, own_mask, p, causal, **rest)
        made.square().sum().backward()
        gradients.append([value.grad for value in own])
        return made.detach()

    found = each(2, work)
    torch.testing.assert_close(torch.cat(found, 1), expected.detach(), rtol=1e-12, atol=1e-12)
    for place, value in enumerate(whole):
        made = torch.cat([own[place] for own in gradients if own[place] is not None], 1)
        torch.testing.assert_close(made, value.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_an_attention_under_autocast_is_that_of_torch(autocast: bool) -> None:
    kind = torch.float32 if autocast else torch.bfloat16
    given = [heads((2, 4, 3, 8), seed, kind) for seed in range(3)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(5)
        expected = torch.ops.aten.scaled_dot_product_attention.default(*given, None, 0.4)
        found = each(
            2,
            lambda scope: attention(
                scope, "a", *(own_part(value, 1, [4], shards=2, shard=scope.group.own) for value in given), None, 0.4
            ),
        )
    assert expected.dtype == found[0].dtype == torch.bfloat16
    assert torch.equal(torch.cat(found, 1), expected)
