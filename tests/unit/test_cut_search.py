"""Cuts for servers with several stages: against brute force where all are tried, else within their bound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from partition_problems import everything, judge, problems, with_fields

from gradwire_coordinator.costs import TravellingValue
from gradwire_coordinator.cut_search import CutSearch, Worth
from gradwire_coordinator.device_order import lower_bound
from gradwire_coordinator.interval_sums import Units
from gradwire_coordinator.partition import find_partition
from gradwire_coordinator.partition_problem import HeldTensor, PartitionProblem
from gradwire_coordinator.placement import looped, v_shaped
from gradwire_coordinator.segment_costs import stages_on
from gradwire_protocol.errors import PlanError

PLACEMENTS = [looped(2, 2), v_shaped(2), looped(1, 2), (*range(3), 0, 1)]


@given(problems(placements=PLACEMENTS))
@settings(max_examples=120, deadline=None)
def test_of_few_cuts_the_best_is_found(problem: PartitionProblem) -> None:
    all_of_them = list(everything(problem))
    if not all_of_them:
        with pytest.raises(PlanError, match="does not fit"):
            find_partition(problem)
        return
    found = find_partition(problem)
    assert judge(problem, found.devices, found.cuts) == pytest.approx(min(all_of_them), rel=1e-12)
    assert found.exact
    assert lower_bound(problem, Units(problem, problem.cuts)) <= found.slowest * (1 + 1e-9)


@given(problems(placements=PLACEMENTS))
@settings(max_examples=120, deadline=None)
def test_moves_only_make_cuts_better(problem: PartitionProblem) -> None:
    units = Units(problem, problem.cuts)
    search = CutSearch(units, problem, stages_on(problem, range(problem.servers)))
    start = [*range(problem.stages), units.count]
    ends = search.improved(start)
    assert len(ends) == len(start)
    assert ends[0] == 0
    assert ends[-1] == units.count
    assert ends == sorted(set(ends))
    assert search.worth(ends) == search.worth(start) or search.worth(ends).better_than(search.worth(start))
    judged = judge(problem, tuple(range(problem.servers)), units.ends[ends[1:-1]].tolist())
    worth = search.worth(ends)
    assert (judged is None) == (worth.excess > 0)
    if judged is not None:
        assert (worth.busiest, worth.largest, worth.sent_bytes) == pytest.approx(judged)


def layers(count: int, placement: Sequence[int], **fields: object) -> PartitionProblem:
    """Layers of ten nodes of unequal length, the values between them small, those within large."""
    nodes, devices = 10 * count, 1 + max(placement)
    seconds = np.tile([1.0, 5.0, 1.0, 1.0, 8.0, 2.0, 3.0, 3.0, 1.0, 1.0], count) * 1e-3
    values = [
        TravellingValue(n, (n + 1,), 1000 if n % 10 == 9 else 9000, 1000 if n % 10 == 9 else 9000)
        for n in range(nodes - 1)
    ]
    problem = PartitionProblem(
        seconds=np.tile(seconds, (devices, 1)),
        cuts=range(1, nodes),
        placement=tuple(placement),
        values=values,
        link_bytes_per_second=1e7,
    )
    return with_fields(problem, **fields)


@pytest.mark.parametrize("placement", [looped(2, 2), v_shaped(2), looped(4, 2), v_shaped(4), looped(4, 3)])
def test_servers_are_busy_alike(placement: tuple[int, ...]) -> None:
    problem = layers(24, placement)
    found = find_partition(problem)
    assert not found.exact
    assert 0 <= found.gap < 0.05
    assert len(found.cuts) == len(placement) - 1
    assert find_partition(problem) == found


def test_a_slow_server_gets_short_stages() -> None:
    problem = layers(24, v_shaped(2))
    found = find_partition(with_fields(problem, seconds=problem.seconds * np.array([[3.0], [1.0]])))
    assert found.gap < 0.05
    of_server = [sum(found.seconds[stage] for stage in own) for own in problem.hosted]
    assert of_server == pytest.approx(found.server_seconds)
    assert max(of_server) < 1.1 * min(of_server)


def test_memory_is_a_servers_not_a_stages() -> None:
    """A tensor that both stages of a server read is there once; unequal stages may fit where equal shares do not."""
    tensors = [HeldTensor((0, 239), 1000), *(HeldTensor((node,), 10) for node in range(240))]
    problem = layers(24, v_shaped(2), tensors=tensors, memory_bytes=[2250, 1250], values=[])
    found = find_partition(problem)
    assert [server.missing for server in found.memory] == [0, 0]
    assert found.memory[0].weights + found.memory[1].weights == 1000 + 2400


def test_worth_is_compared_part_by_part() -> None:
    assert Worth(0, 2, 2, 9).better_than(Worth(1, 1, 1, 1))
    assert Worth(0, 1, 2, 9).better_than(Worth(0, 1, 2 + 1e-9, 1))
    assert not Worth(0, 1, 2, 9).better_than(Worth(0, 1, 2 + 1e-15, 9))
