"""Plans: the numbers that clients are told are those of the simulator for the programs that are carried out."""

from __future__ import annotations

from typing import Any

import pytest
from planner_requests import (
    LINK,
    NODES,
    Asked,
    known,
    planned,
    request,
    servers,
    sharded,
    single_servers,
)

from gradwire_coordinator.boundaries import ASSUMED_LINK, Links
from gradwire_coordinator.cost_book import CostBook
from gradwire_coordinator.costs import ESTIMATED, MEASURED
from gradwire_coordinator.link_rates import LinkRate
from gradwire_coordinator.model_checks import check_model
from gradwire_coordinator.planner import Planner, plan_run
from gradwire_coordinator.simulator import simulate
from gradwire_protocol.errors import PlanError, Unreachable
from gradwire_protocol.program import action_from_proto
from gradwire_protocol.v1 import tensors_pb2


@pytest.mark.parametrize(
    ("stages", "changes"),
    [
        (3, {}),
        (2, {"schedule": "1f1b"}),
        (2, {"schedule": "gpipe", "micro_batches": 8, "expected_rows": 16}),
        (2, {"schedule": "zb-h1", "recompute": True}),
        (2, {"schedule": "interleaved-1f1b", "virtual_stages": 3}),
        (2, {"schedule": "zb-v", "virtual_stages": 2}),
        (3, {"schedule": "auto", "virtual_stages": 2}),
    ],
)
def test_predictions_are_the_simulators_for_the_chosen_programs(stages: int, changes: dict[str, Any]) -> None:
    made, summary = planned(stages, **changes)
    costs = made.cut.way.costs
    simulated = simulate(costs.whole_step(made.schedule.programs(summary.micro_batches)), costs)
    prediction = summary.prediction
    assert prediction.seconds == simulated.seconds
    assert prediction.bubble_ratio == simulated.bubble_ratio
    assert 0 < prediction.lower_bound_seconds <= prediction.seconds * (1 + 1e-9)
    assert [server.busy_seconds for server in prediction.servers] == list(simulated.busy)
    if not changes.get("recompute"):
        assert [server.activation_bytes for server in prediction.servers] == list(simulated.peak_bytes)
    drawn = [
        [(action_from_proto(item.action), item.start_seconds, item.end_seconds) for item in row.actions]
        for row in made.timeline
    ]
    assert drawn == [[(item.action, item.start, item.end) for item in row] for row in simulated.timed]
    # Every server and stage is told of once, at its place.
    assert [server.server for server in prediction.servers] == [f"stage-{place}" for place in range(stages)]
    assert [stage.server for stage in summary.stages] == list(made.schedule.placement)
    assert sorted(stage for server in prediction.servers for stage in server.stages) == list(range(len(summary.stages)))
    assert sum(stage.nodes for stage in summary.stages) == NODES + 1
    # What was chosen is one of those considered, which are sorted.
    (chosen,) = [item for item in prediction.candidates if item.chosen]
    assert (chosen.schedule, chosen.extra_warm_up) == (summary.schedule, summary.extra_warm_up)
    assert (chosen.seconds, list(chosen.placement)) == (prediction.seconds, list(made.schedule.placement))
    seconds = [item.seconds for item in prediction.candidates]
    assert seconds == sorted(seconds)
    assert prediction.reason
    assert prediction.cost_source == MEASURED
    if not changes.get("virtual_stages"):
        assert prediction.partition_gap == 0


def test_auto_is_the_fastest_of_all() -> None:
    made, summary = planned(3, virtual_stages=2)
    found = summary.prediction.candidates
    assert summary.prediction.seconds == found[0].seconds
    assert {item.schedule for item in found} >= {"gpipe", "1f1b", "zb-h1", "interleaved-1f1b", "zb-v"}
    # One stage on each server is a way too, and has its own cuts, unless the plan says where to cut for two on each.
    assert {item.virtual_stages for item in found} == {1, 2}
    assert made.prediction.partition_gap >= 0
    _, cut = planned(3, virtual_stages=2, cuts=[2, 4, 6, 8, 10])
    assert not cut.prediction.HasField("partition_gap")
    assert {item.virtual_stages for item in cut.prediction.candidates} == {2}
    _, coded = planned(3, virtual_stages=2, activation_compression=["none", "bf16", "none", "none", "none"])
    assert {item.virtual_stages for item in coded.prediction.candidates} == {2}
    _, alike = planned(3, virtual_stages=2, activation_compression=["bf16"])
    assert {item.virtual_stages for item in alike.prediction.candidates} == {1, 2}


def test_memory_is_that_of_weights_gradients_optimizer_and_activations() -> None:
    made, summary = planned(2, schedule="gpipe")
    for server, stage in zip(summary.prediction.servers, summary.stages, strict=True):
        weights = stage.parameters * 4
        assert (server.weight_bytes, server.gradient_bytes, server.optimizer_bytes) == (weights, weights, 2 * weights)
        # GPipe holds all four micro-batches; each node keeps 100 bytes of each, and 2 rows of x, or n5, come in.
        incoming = made.cut.way.costs.held[stage.stage].activations - 100 * stage.nodes
        assert incoming > 0
        assert server.activation_bytes == 4 * (100 * stage.nodes + incoming)
    (candidate,) = [item for item in summary.prediction.candidates if item.chosen]
    sums = [
        server.weight_bytes + server.gradient_bytes + server.optimizer_bytes + server.activation_bytes
        for server in summary.prediction.servers
    ]
    assert list(candidate.peak_bytes) == sums


def test_recomputing_holds_what_came_in_and_once_what_nodes_keep() -> None:
    made, summary = planned(2, schedule="gpipe", recompute=True)
    for server, stage in zip(summary.prediction.servers, summary.stages, strict=True):
        incoming = made.cut.way.costs.held[stage.stage].activations
        assert server.activation_bytes == 4 * incoming + 100 * stage.nodes
        assert 2.9e-3 * stage.nodes < stage.backward_seconds <= 3e-3 * stage.nodes


def test_traffic_counts_both_ways_and_codecs() -> None:
    _, plain = planned(2, schedule="gpipe")
    _, halved = planned(2, schedule="gpipe", activation_compression=["bf16"])
    sizes = [(stage.boundary_bytes, stage.returned_bytes) for summary in (plain, halved) for stage in summary.stages]
    sent = sizes[0][0]
    assert sent > 0
    assert sizes == [(sent, 0), (0, sent), (sent // 2, 0), (0, sent // 2)]
    traffic = [summary.prediction.candidates[0].traffic_bytes for summary in (plain, halved)]
    assert traffic == [2 * sent, sent]


def test_links_say_whether_they_were_measured() -> None:
    asked = request(3)
    model = sharded(asked)
    gone = Unreachable("The stage server at 127.0.0.1:9002 does not answer")
    links: Links = {(0, 1): LINK, (1, 2): gone}
    made = plan_run(asked, model, servers(3), known(3, links=links, source=ESTIMATED))
    first, second = made.prediction.links
    assert (first.stage, first.measured, first.reason) == (0, True, "")
    assert (first.forward_bytes_per_second, first.backward_bytes_per_second) == (1e6, 2e6)
    assert first.round_trip_seconds == 2e-3
    assert (second.stage, second.measured, second.reason) == (1, False, gone.message)
    assert second.forward_bytes_per_second == ASSUMED_LINK.forward
    assert made.prediction.cost_source == ESTIMATED
    unknown = plan_run(asked, model, servers(3), known(3))
    assert [link.measured for link in unknown.prediction.links] == [False, False]
    # Back from the last server to the first, a measured link counts the other way round.
    looped = request(2, schedule="interleaved-1f1b", virtual_stages=2)
    back = plan_run(looped, sharded(looped), servers(2), known(2, links={(0, 1): LINK})).prediction.links
    assert [link.forward_bytes_per_second for link in back] == [1e6, 2e6, 1e6]
    assert all(link.measured for link in back)


def test_a_slow_link_makes_the_warm_up_deeper() -> None:
    asked = request(3, schedule="1f1b", micro_batches=8, expected_rows=16)
    slow = LinkRate(1e9, 1e9, 20e-3)
    made = plan_run(asked, sharded(asked), servers(3), known(3, links={(0, 1): slow, (1, 2): slow}))
    assert made.schedule.extra_warm_up > 0
    assert f"its warm-up is {made.schedule.extra_warm_up} deeper" in made.prediction.reason


def test_what_does_not_fit_in_memory_is_refused() -> None:
    asked = request(2, schedule="gpipe", micro_batches=8, expected_rows=16)
    with pytest.raises(PlanError, match=r"stage 0 lacks 648 bytes.*schedule=\"auto\""):
        plan_run(asked, sharded(asked), servers(2), known(2, memory=7000))
    # 1F1B does.
    asked.plan.schedule = "auto"
    made = plan_run(asked, sharded(asked), servers(2), known(2, memory=7000))
    assert {item.schedule: item.fits for item in made.prediction.candidates}["gpipe"] is False
    assert max(made.cut.way.held_bytes) < 7000


def test_a_step_of_very_many_actions_is_not_drawn() -> None:
    made, _ = planned(2, schedule="gpipe", micro_batches=13_000, expected_rows=13_000)
    assert made.timeline == []
    assert made.prediction.seconds > 0


def test_precisions_of_codecs_are_shown() -> None:
    _, summary = planned(2, activation_compression=["int8"])
    assert [stage.codec for stage in summary.stages] == [tensors_pb2.CODEC_INT8, tensors_pb2.CODEC_NONE]


@pytest.mark.parametrize(
    ("changes", "makes", "work", "expected"),
    [
        # A step that is over in no time is not worth anybody's wait, unless a codec is to be chosen.
        ({}, "aaa", 0, []),
        ({"activation_compression": ["auto"]}, "aaa", 0, ["01", "12"]),
        ({}, "aaa", 10**8, ["01", "12"]),
        # Back from the last to the first.
        ({"schedule": "interleaved-1f1b", "virtual_stages": 2}, "aaa", 10**8, ["01", "12", "20"]),
        # Unlike servers can be in another order.
        ({}, "aab", 10**8, ["01", "02", "12"]),
        ({"cuts": [3, 6]}, "aab", 10**8, ["01", "12"]),
        ({"stages": 1}, "a", 10**8, []),
    ],
)
def test_links_are_measured_where_they_matter(
    changes: dict[str, Any], makes: str, work: int, expected: list[str]
) -> None:
    asked = request(**{"stages": 3, **changes})
    for node in asked.model.train.nodes:
        node.flops.fixed = work
    found = servers(len(makes))
    for (server,), make in zip(found, makes, strict=True):
        server.device.name = make
    book = Asked()
    planner = Planner(book, CostBook(lambda address: None, seconds=0))
    measured = planner.measure(asked.plan, sharded(asked), found)
    assert [f"{first[-1]}{second[-1]}" for first, second in book.links] == expected
    assert measured.links == {(int(pair[0]), int(pair[1])): LINK for pair in expected}
    assert [costs.source for costs in measured.costs] == [ESTIMATED] * len(makes)


@pytest.mark.parametrize(("stages", "threads", "asks"), [(1, 1, False), (1, 2, True), (2, 1, True)])
def test_nodes_are_profiled_where_cuts_or_shares_hang_on_it(stages: int, threads: int, asks: bool) -> None:
    """Two replicas; the last server may have more threads than the others."""
    asked_of: list[str] = []

    def refuse(address: str) -> Any:
        asked_of.append(address)
        raise Unreachable(f"{address} does not answer")

    asked = request(stages, replicas=2, expected_rows=2**24)
    free = single_servers(2 * stages)
    free[-1].device.threads = threads
    CostBook(refuse).of(check_model(asked.model), asked.plan, free)
    assert bool(asked_of) == asks
