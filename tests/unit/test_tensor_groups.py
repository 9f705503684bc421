"""Servers are grouped by hosts and makes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sharded_samples import server

from gradwire_coordinator.costs import DeviceMake
from gradwire_coordinator.tensor_groups import Unit, inner_links, make_units, unit_memory
from gradwire_protocol.errors import PlanError


def numbers(units: Sequence[Unit]) -> list[list[int]]:
    return [[int(each.server.removeprefix("stage-")) for each in unit] for unit in units]


def test_without_shards_every_server_is_for_itself() -> None:
    mixed = [server(0, name="a"), server(1, name="b")]
    assert make_units(mixed, 1) == [(mixed[0],), (mixed[1],)]


def test_like_servers_of_a_host_come_together_in_the_order_of_registration() -> None:
    assert numbers(make_units([server(number) for number in range(6)], 2)) == [[0, 1], [2, 3], [4, 5]]
    hosts = ["a", "b", "a", "b"]
    turns = [server(number, host=host) for number, host in enumerate(hosts)]
    assert numbers(make_units(turns, 2)) == [[0, 2], [1, 3]]


def test_what_is_left_over_on_hosts_comes_together_if_it_is_alike() -> None:
    hosts = ["a", "b", "a", "a", "b", "b"]
    odd = [server(number, host=host) for number, host in enumerate(hosts)]
    assert numbers(make_units(odd, 2)) == [[0, 2], [1, 4], [3, 5]]
    # One host has two makes.
    makes = [server(number, name=name) for number, name in enumerate("xyyx")]
    assert numbers(make_units(makes, 2)) == [[0, 3], [1, 2]]


def test_unlike_servers_do_not_share_a_stage() -> None:
    mixed = [server(0, name="fast"), server(1, name="slow", threads=4), server(2, name="fast"), server(3, name="fast")]
    with pytest.raises(PlanError) as caught:
        make_units(mixed, 2)
    assert "stage-3" in caught.value.message
    assert "stage-1" in caught.value.message
    assert "stage-3 (fast, 1 thread)" in caught.value.got
    assert "stage-1 (slow, 4 threads)" in caught.value.got
    assert "multiples of 2" in caught.value.remedy


@given(shards=st.integers(1, 4), count=st.integers(1, 5), data=st.data())
def test_every_server_is_in_one_group_of_its_make(shards: int, count: int, data: st.DataObject) -> None:
    total = shards * count
    hosts = data.draw(st.lists(st.sampled_from("ab"), min_size=total, max_size=total))
    makes = data.draw(st.lists(st.sampled_from("xy"), min_size=total, max_size=total))
    given_ones = [server(number, host=hosts[number], name=makes[number]) for number in range(total)]
    try:
        made = make_units(given_ones, shards)
    except PlanError:
        assert any(makes.count(make) % shards for make in makes)
        return
    found = numbers(made)
    assert sorted(number for unit in found for number in unit) == list(range(total))
    assert found == sorted(found)
    assert all(unit == sorted(unit) and len(unit) == shards for unit in found)
    assert shards == 1 or all(len({DeviceMake.of(each.device) for each in unit}) == 1 for unit in made)
    for host in "ab":
        for make in "xy":
            there = list(zip(hosts, makes, strict=True)).count((host, make))
            alone = sum(all((hosts[number], makes[number]) == (host, make) for number in unit) for unit in found)
            assert alone >= there // shards


def test_of_memory_the_least_that_is_known_counts() -> None:
    assert unit_memory((server(0, memory_bytes=8), server(1), server(2, memory_bytes=4))) == 4
    assert unit_memory((server(0), server(1))) == 0


def test_the_links_within_a_group_go_around_once() -> None:
    def links(count: int) -> list[tuple[int, int]]:
        found = inner_links(tuple(server(number) for number in range(count)))
        return [(int(first[-1]), int(second[-1])) for first, second in found]

    assert links(1) == []
    assert links(2) == [(0, 1)]
    assert links(3) == [(0, 1), (1, 2), (2, 0)]
