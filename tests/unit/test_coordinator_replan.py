"""Planning anew: what steps took scales the servers' costs, cuts follow, and the state's moves are named."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from graph_text import chain_model, plan
from planner_requests import servers

from gradwire_coordinator.boundaries import Links
from gradwire_coordinator.costs import ESTIMATED, MEASURED, NodeCosts, Rates
from gradwire_coordinator.entries import EntryRules
from gradwire_coordinator.layout import lay_out
from gradwire_coordinator.link_rates import LinkRate
from gradwire_coordinator.model_checks import check_model
from gradwire_coordinator.planner import PlannedRun, plan_run
from gradwire_coordinator.replan import Basis, new_plan, plan_anew, reload_plan
from gradwire_coordinator.tensor.sharded_model import shard_model
from gradwire_coordinator.ways import Servers
from gradwire_protocol.errors import FrameError, PlanError, StaleGeneration
from gradwire_protocol.v1 import coordinator_pb2 as pb
from gradwire_protocol.v1 import run_pb2, stage_pb2

NODES = 16
ROWS, MICRO_BATCHES = 8, 4
STEP = run_pb2.TrainStep(micro_batches=[run_pb2.MicroBatch(rows=2)] * 4)


def basis(*, links: Links = MappingProxyType({}), **changes: Any) -> Basis:
    """Two servers, 1 ms forward and 2 ms backward a node, as estimated."""
    asked = pb.CreateRunRequest(
        model=chain_model(NODES),
        plan=plan(2, **{"schedule": "1f1b", "micro_batches": MICRO_BATCHES, "expected_rows": ROWS, **changes}),
        optimizer=run_pb2.Optimizer(
            name="Adam", groups=[run_pb2.OptimizerGroup(parameters=[f"W{i}" for i in range(NODES)])]
        ),
    )
    each = np.full(NODES + 1, 1e-3)
    costs = NodeCosts(2, each, each, each, np.full(NODES + 1, 100), ESTIMATED)
    known = Servers(rates=[Rates(1e9, 1e9)] * 2, memory_bytes=[0] * 2, costs=[costs] * 2, links=links)
    model = shard_model(check_model(asked.model), asked.plan)
    planned = plan_run(asked, model, servers(2), known)
    return Basis(asked, planned, lay_out("r", 1, asked, planned))


def timings(made: Basis, factors: tuple[float, float]) -> run_pb2.EntryResult:
    """What a step takes if the servers are so many times slower than predicted."""
    found = run_pb2.EntryResult()
    for place, (known, factor) in enumerate(zip(made.planned.servers, factors, strict=True)):
        stage = made.planned.cut.seconds[place]
        busy = {
            "forward": MICRO_BATCHES * stage.forward * factor,
            "backward": MICRO_BATCHES * stage.backward * factor / 2,
            "weight": MICRO_BATCHES * stage.backward * factor / 2,
            "encode": 1.0,
        }
        found.timings[known.server].CopyFrom(run_pb2.Timing(busy_seconds=busy))
    return found


def train(made: Basis, factors: tuple[float, float], step: run_pb2.TrainStep = STEP) -> None:
    made.take(step, timings(made, (100.0, 1.0)))  # the first one does not count
    for _ in range(3):
        made.take(step, timings(made, factors))
    made.take(step, timings(made, (9.0, 9.0)))  # nor does one that is far from the others


def cut(planned: PlannedRun) -> int:
    return planned.cut.way.cuts[0]


def test_a_slower_server_gets_less() -> None:
    made = basis()
    even = cut(made.planned)
    assert even in (8, 9)
    train(made, (3.0, 1.0))
    found = plan_anew(made)
    assert found.pays(0.2)
    assert cut(found.planned) == pytest.approx((NODES + 1) / 4, abs=1)
    assert found.planned.prediction.cost_source == MEASURED
    assert [each.server for each in found.planned.servers] == ["stage-0", "stage-1"]
    # What was learned holds for the next time: as the new plan predicts it, there is nothing to gain.
    later = Basis(made.request, found.planned, made.layout)
    train(later, (1.0, 1.0))
    again = plan_anew(later)
    assert not again.differs
    assert not again.pays(0.0)
    assert again.seconds_before == pytest.approx(again.seconds_after)
    assert again.seconds_after == pytest.approx(found.seconds_after)


def test_a_server_that_does_little_says_little_of_what_it_would_take_for_more() -> None:
    """On the second server there is hardly anything; that it took four times as long for that is no reason to stay."""
    made = basis(cuts=[NODES])
    train(made, (1.0, 4.0))
    found = plan_anew(made)
    assert found.pays(0.05)
    assert cut(found.planned) < NODES - 2


def test_a_step_with_more_rows_counts_for_the_expected_ones() -> None:
    made, larger = basis(), basis()
    train(made, (2.0, 1.0))
    train(larger, (4.0, 2.0), run_pb2.TrainStep(micro_batches=[run_pb2.MicroBatch(rows=4)] * 4))
    assert plan_anew(larger).seconds_after == pytest.approx(plan_anew(made).seconds_after)


def test_the_users_own_cuts_do_not_hold() -> None:
    made = basis(cuts=[2])
    train(made, (1.0, 1.0))
    found = plan_anew(made)
    assert found.pays(0.1)
    assert cut(found.planned) in (8, 9)
    assert found.seconds_before > 1.3 * found.seconds_after
    assert list(made.request.plan.cuts) == [2]


def test_what_was_chosen_among_several_ways_is_judged_as_it_is() -> None:
    """With two stages a server where that pays, the slow link has been a reason for one."""
    made = basis(schedule="auto", virtual_stages=2, links={(0, 1): LinkRate(1e3, 1e3, 5e-2)})
    assert made.planned.schedule.placement == (0, 1)
    train(made, (1.0, 1.0))
    found = plan_anew(made)
    assert not found.differs
    assert found.seconds_before == pytest.approx(made.planned.prediction.seconds, rel=0.03)


def test_with_recomputation_all_of_a_servers_time_counts_as_one() -> None:
    made = basis(recompute=True)
    train(made, (3.0, 1.0))
    assert cut(plan_anew(made).planned) < cut(made.planned)


def test_without_a_measured_step_there_is_nothing_to_plan_from() -> None:
    made = basis()
    made.take(STEP, timings(made, (1.0, 1.0)))
    with pytest.raises(PlanError, match="nothing to plan anew from"):
        plan_anew(made)


def test_moves_name_what_a_server_did_not_have_and_who_had_it() -> None:
    made = basis(cuts=[2])
    train(made, (1.0, 1.0))
    found = plan_anew(made)
    layout = lay_out("r", 2, made.request, found.planned)
    names = [run_pb2.OptimizerStateName(parameter="W3", state=state) for state in ("step", "exp_avg")]
    replies = [stage_pb2.PrepareReply(), stage_pb2.PrepareReply(optimizer_state=names)]
    entry = new_plan(found.planned, made.layout, layout, replies)
    assert list(entry.servers) == ["stage-0", "stage-1"]
    assert (list(entry.cuts), list(entry.placement), entry.schedule) == ([cut(found.planned)], [0, 1], "1f1b")
    moved = {move.tensor: move for move in entry.moves}
    assert set(moved) == set(layout.for_client[0].tensors) - set(made.layout.for_client[0].tensors)
    assert {(move.from_server, move.to_server) for move in entry.moves} == {("stage-1", "stage-0")}
    assert list(moved["W3"].states) == ["step", "exp_avg"]
    assert list(moved["W4"].states) == []


def of_replicas(factors: tuple[float, float]) -> Basis:
    """Two replicas of one stage, after some steps in which they were so many times slower than predicted."""
    asked = pb.CreateRunRequest()
    asked.CopyFrom(basis().request)
    asked.plan.stages, asked.plan.replicas = 1, 2
    each = np.full(NODES + 1, 1e-3)
    costs = NodeCosts(2, each, each, each, np.full(NODES + 1, 100), ESTIMATED)
    known = Servers(rates=[Rates(1e9, 1e9)] * 2, memory_bytes=[0] * 2, costs=[costs] * 2, links={})
    model = shard_model(check_model(asked.model), asked.plan)
    planned = plan_run(asked, model, servers(2), known)
    assert list(planned.shares) == [0.5, 0.5]
    made = Basis(asked, planned, lay_out("r", 1, asked, planned))
    for _ in range(4):
        found = run_pb2.EntryResult()
        for name, factor in zip(("stage-0", "stage-1"), factors, strict=True):
            seconds = factor * MICRO_BATCHES / 2
            stage = planned.cut.seconds[0]
            busy = {"forward": seconds * stage.forward, "backward": seconds * stage.backward}
            found.timings[name].CopyFrom(run_pb2.Timing(busy_seconds=busy))
        made.take(STEP, found)
    return made


def test_a_slower_replica_gets_fewer_micro_batches() -> None:
    made = of_replicas((1.0, 3.0))
    found = plan_anew(made)
    assert found.planned.shares == pytest.approx([0.75, 0.25], abs=0.05)
    assert found.differs
    # Of four micro-batches two took the slow one six units of time; three and one take about three, side by side.
    assert found.seconds_before == pytest.approx(2 * found.seconds_after, rel=0.15)
    assert [each.server for each in found.planned.servers] == ["stage-0", "stage-1"]
    entry = reload_plan(found.planned)
    assert entry.reloads
    assert not entry.moves


def test_replicas_that_differ_by_less_than_a_micro_batch_stay_as_they_are() -> None:
    found = plan_anew(of_replicas((1.0, 1.1)))
    assert not found.differs
    assert not found.pays(0.0)


def test_replicas_with_parameter_servers_are_not_planned_anew() -> None:
    made = of_replicas((1.0, 1.0))
    exchange = dataclasses.replace(made.planned.cut.sharing.exchange, name="parameter-server")
    sharing = dataclasses.replace(made.planned.cut.sharing, exchange=exchange)
    cut = dataclasses.replace(made.planned.cut, sharing=sharing)
    with pytest.raises(PlanError, match="cannot be planned anew"):
        plan_anew(Basis(made.request, dataclasses.replace(made.planned, cut=cut), made.layout, made.steps))


def rules() -> EntryRules:
    made = EntryRules(generation=1, plan=run_pb2.Plan(window=2, micro_batches=1), groups=[], has_predict=True)
    made.check(run_pb2.Entry(number=1, generation=1, load_state=run_pb2.LoadState()), 0)
    return made


ANNOUNCED = run_pb2.NewPlan(cuts=[3], schedule="1f1b")


def test_a_new_plan_is_the_first_entry_of_its_generation() -> None:
    made = rules()
    made.begin_generation(2, ANNOUNCED)
    made.check(run_pb2.Entry(number=2, generation=2, new_plan=ANNOUNCED), 0)
    made.check(run_pb2.Entry(number=3, generation=2, fetch_state=run_pb2.FetchState()), 0)


def test_a_layout_without_state_loads_it_first() -> None:
    made = rules()
    plan = run_pb2.NewPlan(cuts=[3], schedule="1f1b", reloads=True)
    made.begin_generation(2, plan)
    made.check(run_pb2.Entry(number=2, generation=2, new_plan=plan), 0)
    with pytest.raises(FrameError, match="loads its state first"):
        made.check(run_pb2.Entry(number=3, generation=2, fetch_state=run_pb2.FetchState()), 0)
    made.check(run_pb2.Entry(number=3, generation=2, load_state=run_pb2.LoadState()), 0)
    made.check(run_pb2.Entry(number=4, generation=2, fetch_state=run_pb2.FetchState()), 0)


def test_other_entries_are_refused_then_and_a_new_plan_at_any_other_time() -> None:
    made = rules()
    with pytest.raises(FrameError, match="first entry of the generation"):
        made.check(run_pb2.Entry(number=2, generation=1, new_plan=ANNOUNCED), 0)
    made.begin_generation(2, ANNOUNCED)
    for entry in (
        run_pb2.Entry(number=2, generation=2, fetch_state=run_pb2.FetchState()),
        run_pb2.Entry(number=2, generation=2, new_plan=run_pb2.NewPlan(cuts=[4], schedule="1f1b")),
    ):
        with pytest.raises(FrameError, match="first entry of the generation"):
            made.check(entry, 0)
    with pytest.raises(StaleGeneration):
        made.check(run_pb2.Entry(number=2, generation=1, new_plan=ANNOUNCED), 0)
