"""Group operators do on shards what torch does on the whole, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shard_threads import ThreadShards, run_shards, scope_of

from gradwire_protocol.errors import FrameError
from gradwire_stage.group import operators
from gradwire_stage.group.parts import joined, own_part
from gradwire_stage.group.tensor_group import LoneGroup

SIZES = [2, 3, 4]


def tensor(*shape: int, seed: int = 0, wanted: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(wanted)


def leaf(value: torch.Tensor) -> torch.Tensor:
    return value.detach().clone().requires_grad_(value.requires_grad)


def part(value: torch.Tensor, group: Any, dim: int, sections: list[int] | None = None) -> torch.Tensor:
    """Return the own part, as a leaf."""
    return leaf(own_part(value, dim, sections or [value.shape[dim]], shards=group.size, shard=group.own))


def close(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_a_pair_of_products_by_columns_and_rows(size: int) -> None:
    x, up, bias, down, out = tensor(5, 6), tensor(12, 6, seed=1), tensor(12, seed=2), tensor(4, 12, seed=3), tensor(4)
    reference = [leaf(value) for value in (x, up, bias, down, out)]
    expected = F.linear(F.gelu(F.linear(*reference[:3])), reference[3], reference[4])
    expected.square().sum().backward()

    def work(group: ThreadShards) -> list[torch.Tensor]:
        scope = scope_of(group)
        own = [leaf(x), part(up, group, 0), part(bias, group, 0), part(down, group, 1), leaf(out)]
        hidden = F.gelu(F.linear(operators.copy(scope, "copy", own[0]), *own[1:3]))
        made = operators.add_up(scope, "sum", F.linear(hidden, own[3])) + own[4]
        made.square().sum().backward()
        return [made.detach(), *(value.grad for value in own if value.grad is not None)]

    found, table = run_shards(size, work)
    for shard, (made, *gradients) in enumerate(found):
        close(made, expected.detach())
        assert torch.equal(made, found[0][0])
        whole = [value.grad for value in reference]
        for place, (gradient, dim) in enumerate(zip(gradients, [None, 0, 0, 1, None], strict=True)):
            split = whole[place]
            assert split is not None
            if dim is not None:
                split = own_part(split, dim, [12], shards=size, shard=shard)
            close(gradient, split)
    assert table.names == {"sum", "copy/gradient"}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dim", "sections"), [(0, [12]), (1, [12, 24]), (1, [12, 12, 12])])
def test_splitting_and_gathering_are_each_others_inverse(size: int, dim: int, sections: list[int]) -> None:
    x = tensor(12, 36, 2)
    weight = tensor(12, 36, 2, seed=4, wanted=False)

    def work(group: ThreadShards) -> tuple[torch.Tensor, ...]:
        scope, own = scope_of(group), leaf(x)
        made = operators.split(scope, "split", own, dim, sections)
        half = made * 2
        half.retain_grad()
        whole = operators.gather(scope, "gather", half, dim, sections)
        (whole * weight).sum().backward()
        assert own.grad is not None
        assert half.grad is not None
        return made.detach(), whole.detach(), own.grad, half.grad

    found, table = run_shards(size, work)
    for shard, (made, whole, gradient, of_half) in enumerate(found):
        assert torch.equal(made, own_part(x, dim, sections, shards=size, shard=shard))
        assert torch.equal(whole, 2 * x)
        assert torch.equal(gradient, 2 * weight)
        assert torch.equal(of_half, own_part(weight, dim, sections, shards=size, shard=shard))
    assert table.names == {"gather", "split/gradient"}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16])
def test_parts_of_any_type_are_gathered(dtype: torch.dtype) -> None:
    x = torch.arange(12).reshape(4, 3).to(dtype)
    found, _ = run_shards(
        2, lambda group: operators.gather(scope_of(group), "g", part(x, group, 0).t().contiguous().t(), 0, [4])
    )
    assert all(torch.equal(whole, x) and not whole.requires_grad for whole in found)


@pytest.mark.parametrize("padding", [-1, 0, 7])
@pytest.mark.parametrize("size", SIZES)
def test_rows_are_looked_up_where_they_are(size: int, padding: int) -> None:
    table, weight = tensor(12, 5), tensor(4, 6, 5, seed=1, wanted=False)
    indices = torch.randint(12, (4, 6), generator=torch.Generator().manual_seed(0))
    indices[0, :2] = torch.tensor([0, 7])
    reference = leaf(table)
    expected = torch.ops.aten.embedding.default(reference, indices, padding)
    (expected * weight).sum().backward()

    def work(group: ThreadShards) -> tuple[torch.Tensor, torch.Tensor]:
        scope, own = scope_of(group), part(table, group, 0)
        made = operators.add_up(scope, "sum", operators.embedding(scope, "rows", own, indices, padding))
        (made * weight).sum().backward()
        assert own.grad is not None
        return made.detach(), own.grad

    found, _ = run_shards(size, work)
    assert all(torch.equal(made, expected.detach()) for made, _ in found)
    close(torch.cat([gradient for _, gradient in found]), reference.grad)


def test_what_is_not_in_a_table_is_refused_by_all() -> None:
    with pytest.raises(RuntimeError, match="not in the table"):
        run_shards(2, lambda group: operators.embedding(scope_of(group), "rows", tensor(3, 2), torch.tensor([6])))


@pytest.mark.parametrize("writes", [False, True])
def test_a_segment_may_write_to_what_was_exchanged(writes: bool) -> None:
    """Sent tensors stay as they were, which the table checks, and gradients are right."""
    x = tensor(4, 6)

    def work(group: ThreadShards) -> torch.Tensor:
        scope, own = scope_of(group, writes=writes), leaf(x)
        mine = own * 1.0
        for number in range(2):
            total = operators.add_up(scope, f"sum{number}", mine)
            mine = mine.mul_(2.0) if writes else mine * 2.0
        copied = operators.copy(scope, "copy", total)
        copied = copied.add_(1.0) if writes else copied + 1.0
        half = operators.split(scope, "split", copied, 1, [6])
        half = half.mul_(3.0) if writes else half * 3.0
        half.square().sum().backward()
        assert own.grad is not None
        return own.grad

    found, _ = run_shards(2, work)
    # total is 4 x, of which each shard has a gradient of its own part; both are added up.
    expected = 2 * 2 * 9 * (4 * x.detach() + 1)
    for gradient in found:
        close(gradient, expected * 2)


def test_what_does_not_divide_is_refused() -> None:
    x = tensor(4, 6)
    with pytest.raises(FrameError, match="cannot be shared so"):
        own_part(x, 1, [3, 3], shards=2, shard=0)
    with pytest.raises(FrameError, match="cannot be shared so"):
        own_part(x, 2, [6], shards=2, shard=0)
    with pytest.raises(FrameError, match="cannot be shared so"):
        joined([x, x], 1, [6])
    with pytest.raises(FrameError, match="shard 1 does not fit"):
        joined([x, tensor(4, 5)], 1, [12])


def test_one_server_alone_makes_up_what_others_have() -> None:
    scope = scope_of(LoneGroup(4))
    x = tensor(3, 8)
    assert torch.equal(operators.add_up(scope, "a", operators.copy(scope, "b", x)), x)
    assert operators.gather(scope, "c", x, 1, [32]).shape == (3, 32)
    assert operators.split(scope, "d", x, 1, [8]).shape == (3, 2)
    assert operators.embedding(scope, "e", tensor(5, 2), torch.tensor([[4]])).shape == (1, 1, 2)
    assert operators.dropout(scope, "f", x, 0.5, True, 1, [32]).shape == (3, 8)
    loss = operators.cross_entropy(scope, "g", x, torch.tensor([0, 7, 3]))
    loss.backward()
    close(loss, F.cross_entropy(x, torch.tensor([0, 7, 3])))
    heads = tensor(2, 3, 5, 4)
    assert operators.attention(scope, "h", heads, heads, heads, dropout_p=0.5).shape == heads.shape
