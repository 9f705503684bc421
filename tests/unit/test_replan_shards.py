"""Planning runs of tensor-parallel servers anew: the slowest of a group counts, and exchanges are no computation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from sharded_samples import blocks_request, known, sharded, units

from gradwire_coordinator.group_costs import GroupLink, exchanges_of, with_exchanges
from gradwire_coordinator.layout import lay_out
from gradwire_coordinator.planner import plan_run
from gradwire_coordinator.replan import Basis, plan_anew, reload_plan
from gradwire_protocol.v1 import run_pb2

BLOCKS, STEPS = 8, 4
# An exchange takes as long as some nodes.
LINK = GroupLink(2, 1e9, 5e-3)


def basis(replicas: int = 1, **changes: Any) -> Basis:
    """Two stages of two servers each, where exchanges take about as long as what is computed."""
    asked = blocks_request(2, blocks=BLOCKS, schedule="1f1b", micro_batches=4 * replicas, replicas=replicas, **changes)
    asked.plan.expected_rows = 2 * asked.plan.micro_batches
    model = sharded(asked)
    plain = known(model, 2 * replicas)
    found = exchanges_of(model, 2)
    assert sum(LINK.seconds(each) for each in found) > 0.5 * plain.costs[0].seconds().sum()
    costs = [with_exchanges(each, found, LINK) for each in plain.costs]
    of_units = dataclasses.replace(plain, costs=costs, groups=[LINK] * len(costs))
    planned = plan_run(asked, model, units(2 * replicas), of_units)
    return Basis(asked, planned, lay_out("r", 1, asked, planned))


def train(made: Basis, factors: Sequence[Sequence[float]]) -> None:
    """Take in steps whose servers, unit by unit, computed so many times as long as they were to."""
    planned = made.planned
    costs = known(planned.sharded, 1).costs[0]
    ends = (0, cut(made), len(costs.forward))
    micro_batches = planned.micro_batches
    step = run_pb2.TrainStep(micro_batches=[run_pb2.MicroBatch(rows=2)] * micro_batches * len(planned.shares))
    for _ in range(STEPS):
        result = run_pb2.EntryResult()
        for number, (unit, of_unit) in enumerate(zip(planned.units, factors, strict=True)):
            own = slice(*ends[number % 2 : number % 2 + 2])
            for server, factor in zip(unit, of_unit, strict=True):
                busy = {
                    "forward": factor * micro_batches * float(costs.forward[own].sum()),
                    "backward": factor * micro_batches * float(costs.backward[own].sum()),
                }
                # What exchanges take is waiting.
                timing = run_pb2.Timing(busy_seconds=busy, idle_seconds={"wait-exchange": 10.0})
                result.timings[server.server].CopyFrom(timing)
        made.take(step, result)


def cut(made: Basis) -> int:
    return made.planned.cut.way.cuts[0]


def test_as_predicted_nothing_differs() -> None:
    made = basis()
    train(made, [(1.0, 1.0)] * 2)
    found = plan_anew(made)
    assert not found.differs
    assert found.seconds_before == pytest.approx(made.planned.prediction.seconds)


def test_a_group_is_as_slow_as_its_slowest_server() -> None:
    made = basis()
    train(made, [(1.0, 4.0), (1.0, 1.0)])
    found = plan_anew(made)
    assert found.pays(0.1)
    assert found.planned.cut.way.cuts[0] < cut(made)
    assert found.planned.units == made.planned.units
    assert reload_plan(found.planned).reloads
    assert list(reload_plan(found.planned).servers) == [f"stage-{number}" for number in range(4)]
    # What was learned holds for the next time, but for what each was taken to have done like all others.
    later = Basis(made.request, found.planned, made.layout)
    train(later, [(4.0, 4.0), (1.0, 1.0)])
    again = plan_anew(later)
    assert not again.pays(0.01)
    assert again.seconds_before == pytest.approx(found.seconds_after, rel=0.1)


def test_exchanges_take_what_they_took() -> None:
    """Of servers that compute twice as long, a step takes less than twice as long."""
    made = basis()
    train(made, [(2.0, 2.0)] * 2)
    found = plan_anew(made)
    assert not found.differs
    computed, exchanged = known(made.planned.sharded, 1).costs[0], exchanges_of(made.planned.sharded, 2)
    expected = 2 * computed.forward.sum() + sum(LINK.seconds(each) for each in exchanged if not each.backward)
    for costs in found.planned.known.costs:
        assert costs.forward.sum() == pytest.approx(expected)


def test_a_slower_replica_gets_fewer_micro_batches() -> None:
    made = basis(replicas=2)
    assert list(made.planned.shares) == [0.5, 0.5]
    train(made, [(1.0, 1.0), (1.0, 1.0), (6.0, 1.0), (6.0, 6.0)])
    found = plan_anew(made)
    assert found.differs
    fast, slow = found.planned.shares
    assert fast > 1.5 * slow


def test_the_users_own_cuts_do_not_hold() -> None:
    made = basis(cuts=[4])
    train(made, [(1.0, 1.0)] * 2)
    found = plan_anew(made)
    assert found.pays(0.1)
    assert found.planned.cut.way.cuts[0] > cut(made)
