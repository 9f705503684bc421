"""Sums over segments against their definition, for blocks of segments and for one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from partition_problems import problems, reads, sent_bytes

from gradwire_coordinator.costs import TravellingValue
from gradwire_coordinator.interval_sums import Units
from gradwire_coordinator.partition_problem import PartitionProblem
from gradwire_coordinator.segment_costs import Block, activation_bytes, segment_seconds, stages_on


@given(problems())
@settings(max_examples=100, deadline=None)
def test_sums_are_those_of_the_definition(problem: PartitionProblem) -> None:
    units = Units(problem, problem.cuts)
    everything = slice(0, units.count + 1)
    sent = units.sent.block(everything, everything)
    returned = units.returned.block(everything, everything)
    state = units.state.block(everything, everything)
    for start, end in itertools.combinations(range(units.count + 1), 2):
        first, last = (int(units.ends[place]) for place in (start, end))
        assert sent[start, end] == units.sent.of(start, end) == sent_bytes(problem, first, last)
        gradients = sum(v.gradient_bytes for v in problem.values if v.made < first and reads(v.read, first, last))
        assert returned[start, end] == units.returned.of(start, end) == gradients
        tensors = [tensor for tensor in problem.tensors if reads(tensor.read, first, last)]
        assert state[start, end] == units.state.of(start, end) == sum(tensor.total_bytes for tensor in tensors)
        assert sum(units.tensors_of([(start, end)])) == state[start, end]


@given(problems())
@settings(max_examples=100, deadline=None)
def test_a_block_is_cut_out_of_the_whole(problem: PartitionProblem) -> None:
    """The costs of a part of the segments are those of the same segments among all."""
    units = Units(problem, problem.cuts)
    everything = slice(0, units.count + 1)
    for stage in stages_on(problem, range(problem.servers)):
        whole = Block(units, everything, everything)
        seconds, size = whole.seconds(stage), whole.bytes(stage)
        for start, end in itertools.combinations(range(units.count + 1), 2):
            one = Block(units, slice(start, start + 1), slice(end, end + 1))
            assert one.bytes(stage)[0, 0] == size[start, end]
            assert units.state.of(start, end) + activation_bytes(units, stage, start, end) == size[start, end]
            if size[start, end] <= stage.limit:
                assert one.seconds(stage)[0, 0] == pytest.approx(seconds[start, end])
                assert segment_seconds(units, stage, start, end) == pytest.approx(seconds[start, end])
            else:
                assert seconds[start, end] == np.inf


def test_coarse_units_keep_narrow_cuts() -> None:
    values = [TravellingValue(node, (node + 1,), 1 if node % 10 == 4 else 100, 0) for node in range(99)]
    problem = PartitionProblem(seconds=np.ones((1, 100)), cuts=range(1, 100), placement=(0,), values=values)
    coarse, places = Units(problem, problem.cuts).coarse(11)
    assert places[0] == 0
    assert places[-1] == 100
    assert all(place % 10 == 5 for place in places[1:-1])
    assert coarse.count == len(places) - 1
