"""How many messages can lie untaken: against random executions, and against the one that lets most of them lie."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwire_coordinator.bounds import Flow, message_bounds, untaken_bounds
from gradwire_coordinator.schedules import Programs, first_micro_batches, gpipe, interleaved_1f1b, one_f_one_b
from gradwire_coordinator.zero_bubble import zb_h1, zb_v
from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import BACKWARD, FORWARD, parse_program
from gradwire_protocol.v1 import stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb

SCHEDULES = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "auto": lambda stages, count: one_f_one_b(stages, count, 1),
    "deep": lambda stages, count: one_f_one_b(stages, count, 3),
    "zb-h1": zb_h1,
}
# By name, with the number of stages a server.
SEVERAL = {
    "interleaved-1f1b": (2, lambda servers, count: interleaved_1f1b(servers, count, 2)),
    "interleaved-1f1b, 3": (3, lambda servers, count: interleaved_1f1b(servers, count, 3)),
    "zb-v": (2, zb_v),
}


@st.composite
def runs(draw) -> tuple[Programs, list[tuple[int, ...]]]:
    """Programs and the routes of the values between their stages: the chain's, and some that skip stages."""
    stages = draw(st.integers(2, 6))
    count = draw(st.integers(1, 12))
    name = draw(st.sampled_from([*SCHEDULES, *SEVERAL]))
    if name in SEVERAL:
        of_each, make = SEVERAL[name]
        programs = make(stages, count)
        stages *= of_each
    else:
        programs = SCHEDULES[name](stages, count)
    routes = {(stage, stage + 1) for stage in range(stages - 1) if draw(st.booleans())}
    for _ in range(draw(st.integers(1, 3))):
        route = draw(st.lists(st.integers(0, stages - 1), min_size=2, max_size=stages, unique=True))
        routes.add(tuple(sorted(route)))
    return programs, sorted(routes)


def flows_of(route: tuple[int, ...]) -> list[Flow]:
    forward = [Flow(FORWARD, route[0], consumer) for consumer in route[1:]]
    return forward + [Flow(BACKWARD, late, early) for early, late in itertools.pairwise(route)]


def messages_of(route: tuple[int, ...], programs: Programs) -> list[Flow]:
    """Return the flows between servers; a server gets a forward value once, for its first consumer."""
    host = {action.stage: server for server, program in enumerate(programs) for action in program}
    flows = [flow for flow in flows_of(route) if host[flow.source] != host[flow.target]]
    return [
        flow
        for flow in flows
        if flow.kind == BACKWARD or flow.target == min(stage for stage in route[1:] if host[stage] == host[flow.target])
    ]


def sending(programs: Programs) -> Programs:
    """Return the programs with B in place of I, and without W, which sends nothing."""
    return [
        [action._replace(kind=BACKWARD) if action.kind == "I" else action for action in program if action.kind != "W"]
        for program in programs
    ]


def execute(programs: Programs, routes: list[tuple[int, ...]], choose) -> dict[tuple[int, ...], Counter[Flow]]:
    """Run the programs action by action, `choose` saying which server goes on; return the most that lay untaken."""
    programs = sending(programs)
    flows = {flow for route in routes for flow in flows_of(route)}
    done: Counter[tuple[int, str]] = Counter()
    position = [0] * len(programs)
    most = {route: Counter() for route in routes}
    while True:
        ready = [
            server
            for server, program in enumerate(programs)
            if position[server] < len(program)
            and all(
                done[flow.source, flow.kind] > program[position[server]].micro_batch
                for flow in flows
                if (flow.target, flow.kind) == program[position[server]][:2]
            )
        ]
        if not ready:
            assert all(place == len(program) for place, program in zip(position, programs, strict=True))
            return most
        server = choose(ready)
        action = programs[server][position[server]]
        position[server] += 1
        done[action.stage, action.kind] += 1
        for route, found in most.items():
            for flow in flows_of(route):
                found[flow] = max(found[flow], done[flow.source, flow.kind] - done[flow.target, flow.kind])


@settings(max_examples=150, deadline=None)
@given(runs(), st.randoms(use_true_random=False))
def test_no_execution_exceeds_the_bounds(run, chance: random.Random) -> None:
    programs, routes = run
    # Some servers are much faster than others: chosen ten times as often.
    speed = [chance.choice((1, 10)) for _ in programs]

    def choose(ready: list[int]) -> int:
        return chance.choices(ready, [speed[server] for server in ready])[0]

    for route, most in execute(programs, routes, choose).items():
        bounds = untaken_bounds(programs, route)
        assert set(bounds) == set(messages_of(route, programs))
        assert all(most[flow] <= bound for flow, bound in bounds.items()), (route, most, bounds)


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_the_bounds_are_reached_in_a_chain(schedule: str, count: int, stages: int) -> None:
    """With all the waits of a real chain, and the receiver that stands still as long as it can."""
    programs = SCHEDULES[schedule](stages, count)
    chain = [(stage, stage + 1) for stage in range(stages - 1)]
    for slow in range(stages):

        def choose(ready: list[int], slow: int = slow) -> int:
            return next((server for server in ready if server != slow), slow)

        for route, most in execute(programs, chain, choose).items():
            for flow, bound in untaken_bounds(programs, route).items():
                if flow.target == slow:
                    assert most[flow] == bound, (route, flow)


@pytest.mark.parametrize("servers", [2, 3, 5])
@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("schedule", sorted(SEVERAL))
def test_the_bounds_hold_in_a_chain_that_comes_round(schedule: str, count: int, servers: int) -> None:
    of_each, make = SEVERAL[schedule]
    programs = make(servers, count)
    host = {action.stage: server for server, program in enumerate(programs) for action in program}
    chain = [(stage, stage + 1) for stage in range(servers * of_each - 1)]
    found: Counter[tuple[tuple[int, ...], Flow]] = Counter()
    for slow in range(servers):

        def choose(ready: list[int], slow: int = slow) -> int:
            return next((server for server in ready if server != slow), slow)

        for route, most in execute(programs, chain, choose).items():
            for flow, seen in most.items():
                found[route, flow] = max(found[route, flow], seen)
    for route in chain:
        bounds = untaken_bounds(programs, route)
        assert all(found[route, flow] <= bound for flow, bound in bounds.items())
        assert set(bounds) == {flow for flow in flows_of(route) if host[flow.source] != host[flow.target]}


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_fewer_micro_batches_need_no_more(schedule: str) -> None:
    """A batch with fewer rows than planned may have them."""
    for stages in (2, 4, 6):
        for route in [(0, 1), (0, stages - 1), tuple(range(stages))]:
            earlier: dict[Flow, int] = {}
            for count in range(1, 14):
                bounds = untaken_bounds(SCHEDULES[schedule](stages, count), route)
                assert all(bounds[flow] >= bound for flow, bound in earlier.items())
                earlier = bounds


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_no_stage_runs_further_ahead_before_a_backward_than_those_before_it(schedule: str) -> None:
    """What mailboxes rest on when they hold a stream back (gradwire_stage/mailbox.py)."""
    for stages in range(1, 7):
        for count in range(1, 12):
            ahead = [
                [
                    sum(earlier.kind == FORWARD for earlier in program[:place])
                    for place, action in enumerate(program)
                    if action.kind == BACKWARD
                ]
                for program in sending(SCHEDULES[schedule](stages, count))
            ]
            for before, behind in itertools.pairwise(ahead):
                assert all(b <= a for a, b in zip(before, behind, strict=True))


def test_the_numbers_of_the_textbooks() -> None:
    # 1F1B: stage 0 of 4 runs four forwards before its first backward, and stage 1 sends a gradient for each of them.
    assert untaken_bounds(one_f_one_b(4, 8), (0, 1)) == {Flow(FORWARD, 0, 1): 4, Flow(BACKWARD, 1, 0): 4}
    assert untaken_bounds(one_f_one_b(4, 8), (2, 3)) == {Flow(FORWARD, 2, 3): 2, Flow(BACKWARD, 3, 2): 2}
    assert untaken_bounds(gpipe(4, 8), (2, 3)) == {Flow(FORWARD, 2, 3): 8, Flow(BACKWARD, 3, 2): 8}


def test_several_stages_on_a_server() -> None:
    programs = [parse_program("0F0 2F0 0F1 2F1 2B0 0B0 2B1 0B1"), parse_program("1F0 1F1 1B0 1B1")]
    bounds = untaken_bounds(programs, (0, 1))
    assert bounds[Flow(FORWARD, 0, 1)] == 2
    assert bounds[Flow(BACKWARD, 1, 0)] == 2
    with pytest.raises(PlanError, match="deadlock"):
        untaken_bounds([parse_program("0B0 0F0"), parse_program("1F0 1B0")], (0, 1))


def test_within_a_server_nothing_is_sent_and_what_several_read_is_sent_once() -> None:
    programs = [parse_program("0F0 2F0 3F0 3B0 2B0 0B0"), parse_program("1F0 1B0")]
    assert untaken_bounds(programs, (2, 3)) == {}
    assert set(untaken_bounds(programs, (1, 2, 3))) == {Flow(FORWARD, 1, 2), Flow(BACKWARD, 2, 1)}
    assert set(untaken_bounds(programs, (0, 1, 2))) == {
        Flow(FORWARD, 0, 1),
        Flow(BACKWARD, 2, 1),
        Flow(BACKWARD, 1, 0),
    }


def test_a_gradient_that_goes_before_its_weights_own() -> None:
    programs = [
        parse_program("0F0 0F1 0F2 0I0 0I1 0I2 0W0 0W1 0W2"),
        parse_program("1F0 1I0 1F1 1W0 1I1 1F2 1I2 1W1 1W2"),
    ]
    assert untaken_bounds(programs, (0, 1)) == {Flow(FORWARD, 0, 1): 3, Flow(BACKWARD, 1, 0): 3}


def test_bounds_of_a_models_values() -> None:
    segments = {
        0: stage_pb2.Segment(outgoing=[stage_pb2.OutgoingValue(value="h", consumer_stages=[1, 2])]),
        1: stage_pb2.Segment(outgoing=[stage_pb2.OutgoingValue(value="g", consumer_stages=[2])]),
        2: stage_pb2.Segment(),
    }
    bounds = message_bounds(one_f_one_b(3, 8), segments, {"h": 100, "g": 7}.__getitem__)
    found = {
        stage: [(bound.direction, bound.source_stage, bound.value, bound.messages, bound.message_bytes) for bound in of]
        for stage, of in bounds.items()
    }
    assert found == {
        0: [(pb.DIRECTION_BACKWARD, 1, "h", 3, 100)],
        1: [
            (pb.DIRECTION_FORWARD, 0, "h", 3, 100),
            (pb.DIRECTION_BACKWARD, 2, "h", 3, 100),
            (pb.DIRECTION_BACKWARD, 2, "g", 2, 7),
        ],
        2: [(pb.DIRECTION_FORWARD, 0, "h", 3, 100), (pb.DIRECTION_FORWARD, 1, "g", 2, 7)],
    }


def test_bounds_of_steps_with_fewer_micro_batches() -> None:
    """Virtual stages: a step with fewer may need more, since a server then waits less."""
    programs = interleaved_1f1b(2, 13, 2)
    fewer = [first_micro_batches(programs, count) for count in range(1, 13)]
    segments = {
        0: stage_pb2.Segment(outgoing=[stage_pb2.OutgoingValue(value="h", consumer_stages=[1])]),
        1: stage_pb2.Segment(),
    }
    found = message_bounds(programs, segments, {"h": 100}.__getitem__, fewer=fewer)
    of_all = [untaken_bounds(each, (0, 1)) for each in (programs, *fewer)]
    assert found[1][0].messages == max(bounds[Flow(FORWARD, 0, 1)] for bounds in of_all)
    assert found[0][0].messages == max(bounds[Flow(BACKWARD, 1, 0)] for bounds in of_all)
    assert of_all[0] != {Flow(FORWARD, 0, 1): found[1][0].messages, Flow(BACKWARD, 1, 0): found[0][0].messages}


def test_many_micro_batches_take_no_time_to_speak_of() -> None:
    # Of this process alone: others may be busy beside it. Two seconds, where the square of the micro-batches would be
    # minutes.
    start = time.process_time()
    for stage in range(15):
        untaken_bounds(one_f_one_b(16, 1024), (stage, stage + 1))
    assert time.process_time() - start < 20
