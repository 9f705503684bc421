"""Collectives: what they give, for any members, sizes and order of progress; what they send; what they refuse."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from exchange_driver import run_members, same_bits
from hypothesis import given
from hypothesis import strategies as st

from gradwire_protocol.errors import FrameError
from gradwire_stage.exchange import collectives
from gradwire_stage.exchange.collectives import Group, Receive

MEMBERS = st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True).map(sorted)


def inputs(members: Sequence[int], size: int, kind: torch.dtype = torch.float64) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return {member: torch.randn(size, dtype=torch.float64, generator=generator).to(kind) for member in members}


@given(MEMBERS, st.integers(0, 40), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.integers(0, 9))
def test_an_all_reduce_gives_all_the_same_sum(members: list[int], size: int, kind: torch.dtype, seed: int) -> None:
    own = inputs(members, size, kind)
    found, wire = run_members(lambda group: collectives.all_reduce(group, own[group.own]), members, seed)
    assert all(same_bits(total, found[0]) for total in found)
    exact = torch.stack([tensor.double() for tensor in own.values()]).sum(dim=0)
    torch.testing.assert_close(
        found[0].double(), exact, rtol=len(members) * torch.finfo(kind).eps, atol=0.1 * (kind != torch.float64) + 1e-12
    )
    rounds = len(members) - 1
    for member in members:
        # 2 (n − 1) / n of it, but for parts that differ by an element.
        assert (
            abs(wire.bytes_of(member) - 2 * rounds * size * kind.itemsize / len(members)) <= 2 * rounds * kind.itemsize
        )


@given(MEMBERS, st.integers(0, 30), st.integers(0, 9), st.data())
def test_a_reduce_scatter_gives_each_its_part(members: list[int], size: int, seed: int, data: st.DataObject) -> None:
    own = inputs(members, size)
    ends = sorted(data.draw(st.lists(st.integers(0, size), min_size=len(members) - 1, max_size=len(members) - 1)))
    parts = {member: own[member].tensor_split(ends) for member in members}
    found, _ = run_members(lambda group: collectives.reduce_scatter(group, parts[group.own]), members, seed)
    total = torch.stack(list(own.values())).sum(dim=0).tensor_split(ends)
    for part, expected in zip(found, total, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-12)


@given(MEMBERS, st.integers(0, 9))
def test_gathering_puts_what_all_have_in_order(members: list[int], seed: int) -> None:
    own = {member: torch.full((place + 1, 2), float(member)) for place, member in enumerate(members)}
    expected = torch.cat(list(own.values()))
    each, _ = run_members(lambda group: collectives.all_gather(group, own[group.own]), members, seed)
    assert all(same_bits(torch.cat(found), expected) for found in each)
    along, _ = run_members(lambda group: collectives.all_gather_along(group, own[group.own], 0), members, seed)
    assert all(same_bits(found, expected) for found in along)
    root = members[seed % len(members)]
    gathered, _ = run_members(lambda group: collectives.gather(group, own[group.own], root, 0), members, seed)
    for member, found in zip(members, gathered, strict=True):
        assert (found is None) == (member != root)
        assert found is None or same_bits(found, expected)


@given(MEMBERS, st.integers(0, 9))
def test_what_one_has_gets_to_all(members: list[int], seed: int) -> None:
    root = members[seed % len(members)]
    tensor = torch.arange(24.0).view(4, 6)

    def own(group: Group) -> torch.Tensor | None:
        return tensor if group.own == root else None

    spread, _ = run_members(lambda group: collectives.broadcast(group, own(group), root), members, seed)
    assert all(same_bits(found, tensor) for found in spread)
    scattered, _ = run_members(lambda group: collectives.scatter(group, own(group), root, 1), members, seed)
    assert same_bits(torch.cat(scattered, 1), tensor)


@given(MEMBERS, st.integers(0, 9))
def test_nobody_leaves_a_barrier_before_all_have_come(members: list[int], seed: int) -> None:
    come: set[int] = set()

    def start(group: Group) -> collectives.Steps[int]:
        come.add(group.own)
        yield from collectives.barrier(group)
        return len(come)

    found, _ = run_members(start, members, seed)
    assert found == [len(members)] * len(members)


@given(
    MEMBERS,
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 9),
)
def test_a_direct_all_reduce_adds_up_in_the_order_of_members(
    members: list[int], shape: list[int], kind: torch.dtype, turned: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    own = {member: torch.randn(shape, dtype=torch.float64, generator=generator).to(kind) for member in members}
    if turned:
        own = {member: tensor.permute(list(reversed(range(len(shape))))) for member, tensor in own.items()}
    found, wire = run_members(lambda group: collectives.direct_all_reduce(group, own[group.own]), members, seed)
    tensors = list(own.values())
    expected = sum(tensors[1:], tensors[0])
    assert all(torch.equal(total, expected) and total.dtype == kind for total in found)
    assert not any(total.data_ptr() == tensor.data_ptr() for total in found for tensor in tensors if tensor.numel())
    assert len({name for _, _, name in wire.sent}) == (0, 1, 2)[min(len(members), 3) - 1]


@given(MEMBERS, st.integers(0, 9), st.sampled_from([torch.bool, torch.int64, torch.float32]))
def test_a_direct_all_gather_takes_one_round(members: list[int], seed: int, kind: torch.dtype) -> None:
    own = {member: torch.full((place + 1, 2), member % 2).to(kind) for place, member in enumerate(members)}
    each, wire = run_members(lambda group: collectives.direct_all_gather(group, own[group.own], "a"), members, seed)
    for found in each:
        assert all(map(torch.equal, found, own.values()))
    assert len(wire.sent) == len(members) * (len(members) - 1)


@given(MEMBERS, st.integers(0, 9))
def test_who_gathers_by_asking_gets_one_after_the_other(members: list[int], seed: int) -> None:
    own = {member: torch.full((place,), float(member)) for place, member in enumerate(members)}
    root = members[seed % len(members)]
    each, _ = run_members(lambda group: collectives.gather_when_asked(group, own[group.own], root), members, seed)
    for member, found in zip(members, each, strict=True):
        assert (found is None) == (member != root)
        assert found is None or all(map(torch.equal, found, own.values()))
    steps = collectives.gather_when_asked(Alone(), torch.zeros(2), 0)
    assert next(steps) == Receive(1, "d")  # asked for, and nothing else
    steps = collectives.gather_when_asked(Alone(), torch.zeros(2), 1)
    assert next(steps) == Receive(1, "q")


class Alone:
    own, members = 0, (0, 1)

    def send(self, member: int, name: str, tensor: torch.Tensor) -> None:
        pass


@pytest.mark.parametrize("garbage", [torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.zeros(1, 2)])
def test_a_part_that_does_not_fit_is_refused_with_its_sender(garbage: torch.Tensor) -> None:
    steps = collectives.all_reduce(Alone(), torch.zeros(4))
    assert next(steps) == Receive(1, "s0")
    with pytest.raises(FrameError, match="member 1"):
        steps.send(garbage)


@pytest.mark.parametrize("garbage", [torch.zeros(3), torch.zeros(4, dtype=torch.int64), torch.zeros(1, 4)])
def test_a_direct_sum_refuses_what_does_not_fit(garbage: torch.Tensor) -> None:
    steps = collectives.direct_all_reduce(Alone(), torch.zeros(4))
    assert next(steps) == Receive(1, "w")
    with pytest.raises(FrameError, match="member 1"):
        steps.send(garbage)


def test_a_root_without_a_tensor_is_refused() -> None:
    with pytest.raises(FrameError, match="nothing to send"):
        next(collectives.broadcast(Alone(), None, 0))
    with pytest.raises(FrameError, match="nothing to send"):
        next(collectives.scatter(Alone(), None, 0, 0))
