"""Measured costs of groups: read from a server's answer, made affine in the rows, shared out to nodes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwire_coordinator.measured_costs import (
    NOTHING_BESIDE,
    ActionSeconds,
    Cost,
    MeasuredGroups,
    average,
    failures,
    fit,
    group_ends,
    read_reply,
)
from gradwire_protocol.errors import FrameError
from gradwire_protocol.v1 import stage_pb2

# By rows: what each group took, or why it could not be measured.
Numbers = dict[int, list[tuple[float, float, float, int] | str]]

amounts = st.floats(0, 1e3)


def reply_of(numbers: Numbers) -> stage_pb2.MeasureCostsReply:
    reply = stage_pb2.MeasureCostsReply()
    for rows, groups in numbers.items():
        made = reply.measured.add(rows=rows)
        for group in groups:
            if isinstance(group, str):
                made.groups.add(failure=group)
            else:
                forward, first, second, held = group
                made.groups.add(
                    forward_seconds=forward,
                    input_gradient_seconds=first,
                    weight_gradient_seconds=second,
                    held_bytes=held,
                )
    return reply


@given(amounts, amounts, st.integers(1, 50), st.integers(1, 50))
@settings(deadline=None)
def test_what_is_affine_in_the_rows_stays_so(fixed: float, per_row: float, least: int, more: int) -> None:
    rows = [least, least + more]
    numbers = np.array([[[fixed + per_row * count]] for count in rows])
    found = fit(rows, numbers, np.ones((2, 1), bool))
    assert found[0].item() == pytest.approx(fixed, abs=1e-6)
    assert found[1].item() == pytest.approx(per_row, abs=1e-6)


@given(amounts, amounts, st.integers(1, 50), st.integers(1, 50))
@settings(deadline=None)
def test_noise_makes_no_part_negative_and_most_rows_stay_exact(low: float, high: float, least: int, more: int) -> None:
    rows = [least, least + more]
    fixed, per_row = fit(rows, np.array([[[low]], [[high]]]), np.ones((2, 1), bool))
    assert fixed.item() >= 0
    assert per_row.item() >= 0
    assert fixed.item() + per_row.item() * rows[1] == pytest.approx(high)


def test_one_number_of_rows_gives_proportions_and_none_nothing() -> None:
    numbers = np.array([[[8.0, 5.0, 7.0]], [[99.0, 10.0, 99.0]]])
    fixed, per_row = fit([2, 4], numbers, np.array([[True, True, False], [False, True, False]]))
    assert per_row.tolist() == [[4.0, 2.5, 0.0]]
    assert fixed.tolist() == [[0.0, 0.0, 0.0]]


def test_an_answer_is_read() -> None:
    reply = reply_of({8: [(8, 4, 2, 800), "no"], 4: [(5, 2, 1, 400), "no"]})
    groups = read_reply([3, 5], [8, 4], reply, "The server")
    assert groups.rows == (4, 8)
    assert groups.is_measured.tolist() == [True, False]
    assert (groups.fixed[:, 0] + 8 * groups.per_row[:, 0]).tolist() == [8, 4, 2, 800]
    assert (groups.fixed[Cost.FORWARD, 0], groups.per_row[Cost.FORWARD, 0]) == (2, 0.75)
    assert failures(reply) == ["no"]
    assert groups.action == NOTHING_BESIDE
    reply.action.CopyFrom(stage_pb2.ActionCost(forward_seconds=1, receive_seconds=2, send_seconds=3))
    assert read_reply([3, 5], [8, 4], reply, "The server").action == ActionSeconds(1, 0, 0, 2, 3)
    reply.action.send_seconds = math.nan
    with pytest.raises(FrameError, match="of an action"):
        read_reply([3, 5], [8, 4], reply, "The server")


def test_servers_that_measured_together_count_on_the_average() -> None:
    def one(number: float, told: list[bool], action: float) -> MeasuredGroups:
        numbers = np.full((len(Cost), 3), number)
        return MeasuredGroups((1, 2, 3), (4,), numbers, 2 * numbers, np.array(told), ActionSeconds(*[action] * 5))

    both = average([one(1.0, [True, True, False], 3.0), one(5.0, [True, False, False], 5.0)])
    assert both.is_measured.tolist() == [True, True, False]
    # What only one of them could measure is that one's.
    assert both.fixed[Cost.FORWARD].tolist() == [3.0, 1.0, 0.0]
    assert both.per_row[Cost.HELD_BYTES].tolist() == [6.0, 2.0, 0.0]
    assert both.action == ActionSeconds(*[4.0] * 5)


@pytest.mark.parametrize(
    "numbers",
    [
        {},
        {4: [(1, 1, 1, 1)] * 2},
        {4: [(1, 1, 1, 1)] * 2, 7: [(1, 1, 1, 1)] * 2},
        {4: [(1, 1, 1, 1)] * 2, 8: [(1, 1, 1, 1)] * 3},
        {4: [(1, 1, 1, 1)] * 2, 8: [(1, 1, 1, 1), (math.nan, 1, 1, 1)]},
        {4: [(1, 1, 1, 1)] * 2, 8: [(1, 1, 1, 1), (1, -1, 1, 1)]},
        {4: [(1, 1, 1, 1)] * 2, 8: [(1, 1, 1, 1), (1, 1, math.inf, 1)]},
    ],
)
def test_an_answer_that_makes_no_sense_is_refused(
    numbers: Numbers,
) -> None:
    with pytest.raises(FrameError):
        read_reply([3, 5], [8, 4], reply_of(numbers), "The server")


@st.composite
def measured(draw: st.DrawFn) -> tuple[MeasuredGroups, np.ndarray, int]:
    """Groups, an estimate for each node, and rows. Costs are the same of each kind."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    ends = tuple(itertools.accumulate(sizes))
    fixed, per_row = (draw(st.lists(amounts, min_size=len(ends), max_size=len(ends))) for _ in range(2))
    estimate = draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=ends[-1], max_size=ends[-1]))
    told = draw(st.lists(st.booleans(), min_size=len(ends), max_size=len(ends)))
    groups = MeasuredGroups(
        ends, (2, 4), np.array([fixed] * len(Cost)), np.array([per_row] * len(Cost)), np.array(told), NOTHING_BESIDE
    )
    return groups, np.array(estimate), draw(st.integers(1, 100))


@given(measured())
@settings(deadline=None)
def test_nodes_of_a_group_add_up_to_it(made: tuple[MeasuredGroups, np.ndarray, int]) -> None:
    groups, estimate, rows = made
    otherwise = np.ones_like(estimate)
    found = groups.share_out(Cost.FORWARD, rows, estimate, otherwise)
    bare = groups.share_out(Cost.FORWARD, rows, estimate)
    assert (found >= 0).all()
    for number, (first, end) in enumerate(itertools.pairwise([0, *groups.ends])):
        whole = groups.fixed[0, number] + groups.per_row[0, number] * rows
        own = estimate[first:end]
        if not groups.is_measured[number]:
            continue
        assert found[first:end].sum() == pytest.approx(whole)
        if own.sum() > 0:
            assert found[first:end] * own.sum() == pytest.approx(own * whole)
        else:
            assert bare[first:end].sum() == 0


def test_an_estimate_is_corrected_by_what_it_was_wrong_by_elsewhere() -> None:
    groups = MeasuredGroups(
        (2, 3, 5),
        (4,),
        np.zeros((len(Cost), 3)),
        np.array([[1.0, 1.5, 777.0]] * len(Cost)),
        np.array([True, True, False]),
        NOTHING_BESIDE,
    )
    # Measured: 4 + 6; estimated there: 1 + 3 and 1.
    found = groups.share_out(Cost.FORWARD, 4, np.array([1.0, 3.0, 1.0, 2.0, 0.5]))
    assert found.tolist() == [1.0, 3.0, 6.0, 4.0, 1.0]


def test_numbers_hold_for_rows_that_are_near() -> None:
    groups = MeasuredGroups((1,), (4, 8), np.zeros((4, 1)), np.zeros((4, 1)), np.array([True]), NOTHING_BESIDE)
    assert [rows for rows in range(1, 40) if groups.covers(rows)] == list(range(2, 17))


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=30),
    st.data(),
    st.floats(0.1, 20),
    st.integers(1, 10),
)
@settings(deadline=None)
def test_groups_end_at_cuts_and_none_is_too_small(
    seconds: list[float], data: st.DataObject, least: float, most: int
) -> None:
    nodes = len(seconds)
    cuts = sorted(data.draw(st.sets(st.integers(1, nodes - 1)))) if nodes > 1 else []
    ends = group_ends(np.array(seconds), cuts, least_seconds=least, most=most)
    assert ends[-1] == nodes
    assert ends == sorted(set(ends))
    assert set(ends[:-1]) <= set(cuts)
    assert len(ends) <= most
    if len(ends) > 1:
        assert all(sum(seconds[first:end]) >= least * (1 - 1e-9) for first, end in itertools.pairwise([0, *ends]))
