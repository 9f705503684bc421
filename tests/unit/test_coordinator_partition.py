"""Partition against brute force, and its errors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwire_coordinator.costs import TravellingValue
from gradwire_coordinator.partition import check_cuts, partition
from gradwire_protocol.errors import PlanError

LINK = 100.0


def sent_forward(values: list[TravellingValue], start: int, end: int) -> int:
    return sum(value.size_bytes for value in values if start <= value.made < end <= value.read[-1])


def stage_seconds(seconds: np.ndarray, values: list[TravellingValue], stage: int, start: int, end: int) -> float:
    returned = sum(
        value.gradient_bytes
        for value in values
        if value.made < start and any(start <= position < end for position in value.read)
    )
    return float(seconds[stage, start:end].sum()) + (sent_forward(values, start, end) + returned) / LINK


def judge(seconds: np.ndarray, values: list[TravellingValue], cuts: tuple[int, ...]) -> tuple[float, int]:
    """Return (seconds of the slowest stage, bytes of values sent forward), from the definition."""
    ends = [0, *cuts, seconds.shape[1]]
    pairs = list(itertools.pairwise(ends))
    return (
        max(stage_seconds(seconds, values, stage, *pair) for stage, pair in enumerate(pairs)),
        sum(sent_forward(values, *pair) for pair in pairs),
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, list[TravellingValue], list[int], int]:
    nodes = draw(st.integers(1, 8))
    cuts = draw(st.lists(st.sampled_from(range(1, nodes)), unique=True).map(sorted)) if nodes > 1 else []
    stages = draw(st.integers(1, len(cuts) + 1))
    # Quarters add up exactly, so that equal sums are equal numbers.
    quarters = st.lists(st.integers(0, 12), min_size=nodes, max_size=nodes)
    equal_devices = draw(st.booleans())
    rows = [draw(quarters)] * stages if equal_devices else [draw(quarters) for _ in range(stages)]
    values = []
    for made in range(nodes - 1):
        read = draw(st.lists(st.sampled_from(range(made + 1, nodes)), unique=True, max_size=3).map(sorted))
        if read:
            size = draw(st.sampled_from([0, 25, 50, 100, 400]))
            values.append(TravellingValue(made, tuple(read), size, draw(st.sampled_from([0, size]))))
    return np.array(rows) / 4, values, cuts, stages


@given(problems())
@settings(max_examples=300, deadline=None)
def test_partition_is_exact(problem: tuple[np.ndarray, list[TravellingValue], list[int], int]) -> None:
    seconds, values, cuts, stages = problem
    chosen = partition(seconds, values, cuts, link_bytes_per_second=LINK)
    # Ascending, allowed, and one fewer than stages: no node is dropped or done twice.
    assert list(chosen) == sorted(set(chosen))
    assert set(chosen) <= set(cuts)
    assert len(chosen) == stages - 1
    best = min(judge(seconds, values, candidate) for candidate in itertools.combinations(cuts, stages - 1))
    assert judge(seconds, values, chosen) == pytest.approx(best, rel=1e-12)


def test_equal_nodes_are_shared_equally() -> None:
    assert partition(np.ones((4, 12)), [], range(1, 12)) == (3, 6, 9)


def test_a_slow_device_gets_less() -> None:
    assert partition(np.stack([np.full(9, 2.0), np.ones(9)]), [], range(1, 9)) == (3,)


def test_among_equals_the_narrow_boundary_wins() -> None:
    """Nodes of no weight around the middle: the cut goes where fewer bytes are live."""
    seconds = np.array([[1.0, 0.0, 0.0, 1.0]] * 2)
    values = [TravellingValue(0, (1,), 800, 0), TravellingValue(1, (2,), 8, 0), TravellingValue(2, (3,), 800, 0)]
    assert partition(seconds, values, [1, 2, 3], link_bytes_per_second=1e30) == (2,)


def test_thousands_of_nodes_are_planned_quickly() -> None:
    nodes = 3000
    values = [TravellingValue(i, (i + 1,), 10, 10) for i in range(nodes - 1)]
    chosen = partition(np.ones((8, nodes)), values, range(1, nodes), link_bytes_per_second=LINK)
    assert [b - a for a, b in itertools.pairwise([0, *chosen, nodes])] == [375] * 8


def test_more_stages_than_pieces_names_both_numbers() -> None:
    with pytest.raises(PlanError) as caught:
        partition(np.ones((5, 4)), [], [1, 3])
    assert "at most 3 stages" in caught.value.expected
    assert caught.value.got == "5 stages"
    assert "3 or less" in caught.value.remedy


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
