"""The order of devices: bounds hold for all orders, and the local search finds what swaps can find."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from partition_problems import everything, problems, with_fields

from gradwire_coordinator.costs import TravellingValue
from gradwire_coordinator.device_order import by_kinds, lower_bound, search_order
from gradwire_coordinator.interval_sums import Units
from gradwire_coordinator.partition import find_partition
from gradwire_coordinator.partition_problem import PartitionProblem


@given(problems())
@settings(max_examples=150, deadline=None)
def test_nothing_is_below_the_lower_bound(problem: PartitionProblem) -> None:
    best = min((found[0] for found in everything(problem)), default=np.inf)
    assert lower_bound(problem, Units(problem, problem.cuts)) <= best * (1 + 1e-9)


def test_a_bound_knows_of_memory() -> None:
    """Two thirds of the nodes must go to the slow device, since the fast one has no room for them."""
    problem = PartitionProblem(
        seconds=np.outer([1.0, 10.0], np.ones(90)),
        cuts=range(1, 90),
        placement=(0, 1),
        held_bytes=np.full(90, 10),
        memory_bytes=[300, 0],
    )
    assert 590 < lower_bound(problem, Units(problem, problem.cuts)) <= 600
    assert find_partition(problem).slowest == 600
    assert lower_bound(with_fields(problem, memory_bytes=[300, 300]), Units(problem, problem.cuts)) == np.inf


def test_orders_by_counts_have_as_many_states_as_counts() -> None:
    seconds = np.outer([1.0, 2.0, 1.0, 2.0, 1.0], np.ones(9))
    graph = by_kinds(PartitionProblem(seconds=seconds, cuts=range(1, 9), placement=tuple(range(5))))
    assert graph is not None
    assert graph.states == (1, 2, 3, 3, 2, 1)


def test_a_local_search_sorts_by_swaps() -> None:
    """What an order is worth falls with each pair in the right order: swaps lead to it, within their number."""
    problem = PartitionProblem(
        seconds=np.outer(np.arange(1.0, 7.0), np.ones(9)), cuts=range(1, 9), placement=tuple(range(6))
    )
    wanted = [3, 0, 5, 1, 4, 2]
    asked: list[tuple[int, ...]] = []

    def worth(order: Sequence[int], least: float) -> float:
        asked.append(tuple(order))
        place = [wanted.index(device) for device in order]
        return float(sum(a > b for a, b in itertools.combinations(place, 2)))

    assert search_order(problem, worth, 200) == wanted
    assert len(asked) == len(set(asked)) <= 200
    assert len(search_order(problem, worth, 5)) == 6


def test_a_slow_link_is_where_least_is_sent() -> None:
    """Six unlike devices, too many orders to try all: the slow link is left out, or has the narrow cut."""
    nodes, devices = 60, 6
    values = [TravellingValue(n, (n + 1,), 100, 100) for n in range(nodes - 1)]
    links = np.full((devices, devices), 1e3)
    links[0, 1] = links[1, 0] = 10.0
    problem = PartitionProblem(
        seconds=np.ones((devices, nodes)),
        cuts=range(1, nodes),
        placement=tuple(range(devices)),
        values=values,
        link_bytes_per_second=links,
    )
    found = find_partition(problem)
    assert (0, 1) not in {tuple(sorted(pair)) for pair in itertools.pairwise(found.devices)}
    assert found.slowest < 10.5
