"""Partitions against brute force: cuts and devices, under memory, with tied weights, over unlike links."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import event, given, settings
from partition_problems import everything, judge, memory_bytes, problems

from gradwire_coordinator.costs import TravellingValue
from gradwire_coordinator.partition import check_cuts, find_partition
from gradwire_coordinator.partition_problem import HeldTensor, PartitionProblem
from gradwire_protocol.errors import PlanError


@given(problems())
@settings(max_examples=250, deadline=None)
def test_a_partition_equals_the_best_of_all(problem: PartitionProblem) -> None:
    all_of_them = list(everything(problem))
    if not all_of_them:
        event("does not fit")
        with pytest.raises(PlanError, match="does not fit"):
            find_partition(problem)
        return
    found = find_partition(problem)
    # Ascending, allowed, and one fewer than stages: no node is dropped or done twice.
    assert list(found.cuts) == sorted(set(found.cuts))
    assert set(found.cuts) <= set(problem.cuts)
    assert len(found.cuts) == problem.stages - 1
    assert len(set(found.devices)) == len(found.devices) == problem.servers
    judged = judge(problem, found.devices, found.cuts)
    assert judged is not None
    best = min((busiest, sent) for busiest, _, sent in all_of_them)
    assert (judged[0], judged[2]) == pytest.approx(best, rel=1e-12)
    assert found.slowest == pytest.approx(judged[0], rel=1e-12)
    assert found.exact
    assert found.gap == 0
    ends = [0, *found.cuts, problem.seconds.shape[1]]
    for server, held in enumerate(found.memory):
        assert held.total == memory_bytes(problem, server, ends)
        assert held.missing == 0


def chain(nodes: int, devices: int, **fields: object) -> PartitionProblem:
    """Nodes of a second each, of which each reads the one before."""
    values = [TravellingValue(node, (node + 1,), 10, 10) for node in range(nodes - 1)]
    given = {
        "seconds": np.ones((devices, nodes)),
        "cuts": range(1, nodes),
        "placement": tuple(range(devices)),
        "values": values,
        "link_bytes_per_second": 100.0,
    }
    return PartitionProblem(**{**given, **fields})  # type: ignore[arg-type]


def test_equal_nodes_are_shared_equally() -> None:
    found = find_partition(chain(12, 4))
    assert found.cuts == (3, 6, 9)
    assert found.devices == (0, 1, 2, 3)
    assert found.seconds == pytest.approx((3.1, 3.2, 3.2, 3.1))


def test_a_slow_device_gets_less_and_goes_where_it_sends_least() -> None:
    slow_first = np.stack([np.full(9, 2.0), np.ones(9)])
    assert find_partition(chain(9, 2, seconds=slow_first)).cuts == (3,)
    # In the middle of three it would send both ways.
    slow_in_the_middle = np.outer([1.0, 3.0, 1.0], np.ones(6))
    found = find_partition(chain(6, 3, seconds=slow_in_the_middle, link_bytes_per_second=5.0))
    assert found.devices in ((1, 0, 2), (0, 2, 1))
    assert found.slowest == pytest.approx(6.0)


def test_like_devices_stay_in_the_given_order() -> None:
    """All orders are equal here: no device moves. With memory for the middle only in one, two of three do."""
    assert find_partition(chain(8, 4, seconds=np.ones((4, 8)), memory_bytes=[99, 98, 99, 98])).devices == (0, 1, 2, 3)
    held = np.array([1, 1, 1, 9, 9, 9, 1, 1, 1])
    found = find_partition(chain(9, 3, held_bytes=held, memory_bytes=[30, 20, 20], values=[]))
    assert found.devices == (1, 0, 2)
    assert [server.activations for server in found.memory] == [3, 27, 3]


def test_of_many_devices_the_fastest_are_taken() -> None:
    seconds = np.outer([3.0, 1.0, 2.0, 1.0], np.ones(6))
    found = find_partition(chain(6, 4, seconds=seconds, placement=(0, 1)))
    assert (found.devices, found.cuts) == ((1, 3), (3,))


def test_among_equals_the_narrow_boundary_wins() -> None:
    """Nodes of no weight around the middle: the cut goes where fewer bytes are live."""
    seconds = np.array([[1.0, 0.0, 0.0, 1.0]] * 2)
    values = [TravellingValue(0, (1,), 800, 0), TravellingValue(1, (2,), 8, 0), TravellingValue(2, (3,), 800, 0)]
    assert find_partition(chain(4, 2, seconds=seconds, values=values, link_bytes_per_second=1e30)).cuts == (2,)


def test_a_tied_tensor_is_held_by_each_server_that_reads_it_and_once_by_one() -> None:
    tied = [HeldTensor((0, 3), 100, 100, 200)]
    found = find_partition(chain(4, 2, tensors=tied))
    assert [(server.weights, server.gradients, server.optimizer) for server in found.memory] == [(100, 100, 200)] * 2
    both_ends = find_partition(chain(4, 2, tensors=tied, placement=(0, 1, 0), seconds=np.ones((2, 4))))
    assert [server.weights for server in both_ends.memory] == [100, 0]


def test_early_stages_hold_more_micro_batches() -> None:
    """With 1F1B the first of two holds two; so with little memory it gets fewer nodes."""
    plain = chain(12, 2, held_bytes=np.full(12, 10), live=[2, 1])
    assert find_partition(plain).cuts == (6,)
    limited = chain(12, 2, held_bytes=np.full(12, 10), live=[2, 1], memory_bytes=[110, 110])
    # 20 a node, and 10 a node with 10 for what comes in.
    assert find_partition(limited).cuts in ((2,), (3,), (4,), (5,))
    assert find_partition(limited).memory[0].activations <= 110


@pytest.mark.parametrize("kinds", [1, 2, 16])
def test_a_large_graph_is_cut_close_to_the_bound(kinds: int) -> None:
    nodes, devices = 2000, 16
    random = np.random.default_rng(0)
    seconds = np.outer(np.resize(np.linspace(1, 3, kinds), devices), random.uniform(0.1, 1.0, nodes))
    problem = chain(nodes, devices, seconds=seconds, link_bytes_per_second=1e4, order_is_fixed=False)
    found = find_partition(problem)
    ends = [0, *found.cuts, nodes]
    assert all(a < b for a, b in itertools.pairwise(ends))
    assert sorted(found.devices) == list(range(devices))
    assert found.gap < 0.03
    assert found.lower_bound <= found.slowest
    judged = judge(problem, found.devices, found.cuts)
    assert judged is not None
    assert judged[0] == pytest.approx(found.slowest)
    # The same costs give the same plan.
    assert find_partition(problem) == found


def test_work_without_end_falls_back_to_a_part_of_the_cuts() -> None:
    """One node is so heavy that everywhere else anything goes: not all cuts are weighed, and the gap is told."""
    nodes = 3000
    seconds = np.ones((24, nodes)) * 1e-3
    seconds[:, nodes // 2] = 10.0
    found = find_partition(chain(nodes, 24, seconds=seconds, link_bytes_per_second=1e3))
    assert found.gap < 0.01
    assert len(found.cuts) == 23


def test_more_stages_than_pieces_names_both_numbers() -> None:
    with pytest.raises(PlanError) as caught:
        find_partition(chain(4, 5, cuts=[1, 3]))
    assert "at most 3 stages" in caught.value.expected
    assert caught.value.got == "5 stages"
    assert "3 or less" in caught.value.remedy


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"live": [1]}, "live micro-batches of 3"),
        ({"memory_bytes": [1]}, "memory of 3"),
        ({"cuts": [2, 1]}, "ascending"),
        ({"cuts": [0]}, "between 0 and 4"),
        ({"recomputes": [True] * 3}, "forward_seconds"),
        ({"placement": (0, 1, 2, 3)}, "4 devices"),
        ({"seconds": np.full((3, 4), np.nan)}, "0 or more"),
        ({"link_bytes_per_second": 0.0}, "faster"),
    ],
)
def test_costs_that_do_not_fit_together_are_refused(fields: dict[str, object], part: str) -> None:
    with pytest.raises(PlanError, match="do not fit the plan") as caught:
        chain(4, 3, **fields)
    assert part in caught.value.expected


@pytest.mark.parametrize(
    ("chosen", "part"),
    [((1,), "2 cuts for 3 stages"), ((3, 1), "ascend"), ((1, 1), "ascend"), ((1, 2), "nearest allowed: 1 and 3")],
)
def test_a_users_cuts_are_checked(chosen: tuple[int, ...], part: str) -> None:
    with pytest.raises(PlanError) as caught:
        check_cuts(chosen, 3, [1, 3, 5])
    assert part in str(caught.value)


def test_a_users_good_cuts_are_taken() -> None:
    assert check_cuts([1, 5], 3, [1, 3, 5]) == (1, 5)
