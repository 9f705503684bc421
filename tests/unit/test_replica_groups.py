"""Servers are grouped so that unlike ones are alike across replicas, and the slowest of a position counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from graph_text import plan
from hypothesis import given
from hypothesis import strategies as st

from gradwire_coordinator.boundaries import ASSUMED_LINK
from gradwire_coordinator.costs import ESTIMATED, MEASURED, NodeCosts, Rates, rows_per_micro_batch
from gradwire_coordinator.exchange_costs import Ring
from gradwire_coordinator.link_rates import LinkRate
from gradwire_coordinator.measured_costs import ActionSeconds
from gradwire_coordinator.replica_groups import (
    joint_servers,
    pipeline_plan,
    replica_groups,
    replica_shares,
    ring_neighbours,
)
from gradwire_coordinator.ways import Servers
from gradwire_protocol.errors import Unreachable

FAST, SLOW = 1e-3, 3e-3


def costs(seconds: float, source: str = MEASURED) -> NodeCosts:
    each = np.full(4, seconds)
    return NodeCosts(2, each, each, each, np.full(4, 100), source, ActionSeconds(*[seconds] * 5))


def servers(seconds: Sequence[float], links: dict[tuple[int, int], LinkRate | Unreachable] | None = None) -> Servers:
    made = {each: costs(each) for each in seconds}
    return Servers(
        rates=[Rates(1 / each, 2 / each) for each in seconds],
        memory_bytes=[0] * len(seconds),
        costs=[made[each] for each in seconds],
        links=links or {},
    )


def groups(
    stages: int, replicas: int, seconds: Sequence[float], memory: Sequence[int] = (), **changes: object
) -> object:
    asked = plan(stages, replicas=replicas, **changes)
    return replica_groups(asked, servers(seconds).costs, memory or [0] * len(seconds))


def test_like_servers_stay_in_their_order() -> None:
    assert groups(2, 3, [FAST] * 6) == ((0, 1), (2, 3), (4, 5))
    # The user who gives cuts gives them for the order of registration, and so does one replica.
    assert groups(2, 2, [FAST, SLOW, FAST, SLOW], cuts=[2]) == ((0, 1), (2, 3))
    assert groups(3, 1, [SLOW, FAST, SLOW]) == ((0, 1, 2),)


def test_unlike_servers_are_dealt_out_by_speed_and_memory() -> None:
    assert groups(2, 2, [FAST, FAST, SLOW, SLOW]) == ((0, 2), (1, 3))
    assert groups(2, 2, [SLOW, FAST, SLOW, FAST]) == ((1, 0), (3, 2))
    assert groups(2, 2, [FAST] * 4, [8, 16, 16, 8]) == ((1, 0), (2, 3))


@given(stages=st.integers(1, 4), replicas=st.integers(1, 4), data=st.data(), given_cuts=st.booleans())
def test_every_server_has_one_place(stages: int, replicas: int, data: st.DataObject, given_cuts: bool) -> None:
    seconds = data.draw(st.lists(st.sampled_from([FAST, SLOW]), min_size=stages * replicas, max_size=stages * replicas))
    found = replica_groups(
        plan(stages, replicas=replicas, cuts=[1] if given_cuts else []), servers(seconds).costs, [0] * len(seconds)
    )
    assert sorted(server for group in found for server in group) == list(range(stages * replicas))
    assert {len(group) for group in found} == {stages}


def test_a_ring_has_a_link_from_each_replica_to_the_next() -> None:
    assert ring_neighbours(((0, 1),)) == []
    assert sorted(ring_neighbours(((0, 1), (2, 3)))) == [(0, 2), (1, 3)]
    pairs = {frozenset(pair) for pair in ring_neighbours(((0,), (1,), (2,), (3,)))}
    assert pairs == {frozenset(pair) for pair in ((0, 1), (1, 2), (2, 3), (3, 0))}


def test_the_slowest_of_a_position_counts() -> None:
    """Two stages, two replicas; all links between servers of a replica or a ring were measured, but for one."""
    gone = Unreachable("The stage server at 127.0.0.1:9002 does not answer")
    known = servers(
        [FAST, SLOW, SLOW, SLOW],
        {
            (0, 1): LinkRate(8e6, 2e6, 1e-3),
            # The other way round.
            (3, 2): LinkRate(3e6, 4e6, 2e-3),
            (0, 2): LinkRate(9e6, 5e6, 4e-3),
            (1, 3): gone,
        },
    )
    joint = joint_servers(((0, 1), (2, 3)), known)
    assert [each.forward[0] for each in joint.costs] == [SLOW, SLOW]
    assert [each.action.send for each in joint.costs] == [SLOW, SLOW]
    assert [rate.bytes_per_second for rate in joint.rates] == [2 / SLOW, 2 / SLOW]
    assert joint.links == {(0, 1): LinkRate(4e6, 2e6, 2e-3)}
    assert joint.rings == [Ring(2, 5e6, 2e-3), Ring(2, ASSUMED_LINK.forward, ASSUMED_LINK.round_trip_seconds / 2)]
    # Where nothing could be measured in any replica, it is said why.
    assert joint_servers(((0, 1), (2, 3)), servers([FAST] * 4, {(0, 1): gone})).links == {(0, 1): gone}
    assert joint_servers(((0, 1),), known) is known
    turned = joint.ordered([1, 0])
    assert turned.rings == [joint.rings[1], joint.rings[0]]


def test_of_memory_the_least_that_is_known_counts() -> None:
    known = servers([FAST] * 4)
    some = Servers(rates=known.rates, memory_bytes=[16, 0, 8, 0], costs=known.costs, links={})
    assert joint_servers(((0, 1), (2, 3)), some).memory_bytes == [8, 0]


def test_costs_are_measured_where_all_are() -> None:
    made = servers([FAST, SLOW])
    mixed = Servers(rates=made.rates, memory_bytes=[0, 0], costs=[made.costs[0], costs(SLOW, ESTIMATED)], links={})
    assert joint_servers(((0,), (1,)), made).costs[0].source == MEASURED
    assert joint_servers(((0,), (1,)), mixed).costs[0].source == ESTIMATED


def test_shares_go_by_the_slowest_server_of_a_replica() -> None:
    """Stages of 1 and 3 nodes: the second server decides; device 1 of each group takes the first place."""
    made = servers([FAST, FAST, SLOW, FAST])
    found = replica_shares(((0, 1), (2, 3)), (1, 0), made.costs, (0, 1), [1], [False, False])
    assert sum(found) == pytest.approx(1)
    assert found[0] / found[1] == pytest.approx(SLOW / FAST)
    alike = servers([FAST] * 6)
    assert replica_shares(((0, 1), (2, 3), (4, 5)), (0, 1), alike.costs, (0, 1), [1], [False, False]) == [1 / 3] * 3


@given(rows=st.integers(1, 200), micro_batches=st.integers(1, 40), replicas=st.integers(1, 8))
def test_a_replica_has_its_part_of_micro_batches_with_as_many_rows(
    rows: int, micro_batches: int, replicas: int
) -> None:
    micro_batches = max(micro_batches, replicas)
    whole = plan(2, replicas=replicas, micro_batches=micro_batches, expected_rows=rows)
    made = pipeline_plan(whole)
    assert rows_per_micro_batch(made.expected_rows, made.micro_batches) == rows_per_micro_batch(rows, micro_batches)
    assert min(made.micro_batches, made.expected_rows) == -(-min(micro_batches, rows) // replicas)
    assert made.replicas == replicas
