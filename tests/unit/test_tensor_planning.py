"""Plans of tensor-parallel servers: the user's positions, exchanges in costs and traffic, and what is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from sharded_samples import INNER, WIDTH, blocks_request, known, sharded, units

from gradwire_coordinator.cost_book import CostBook
from gradwire_coordinator.costs import TravellingValue, travelling_values
from gradwire_coordinator.group_costs import GroupLink
from gradwire_coordinator.interval_sums import Units
from gradwire_coordinator.link_rates import LinkBook, LinkRate
from gradwire_coordinator.partition_problem import PartitionProblem
from gradwire_coordinator.plan_summary import summarise
from gradwire_coordinator.planner import PlannedRun, Planner, plan_run
from gradwire_coordinator.replica_groups import joint_servers
from gradwire_protocol.errors import GradwireError, PlanError, Unreachable
from gradwire_protocol.v1 import coordinator_pb2 as pb
from gradwire_protocol.v1 import graph_pb2

# Of a micro-batch: two rows.
WHOLE = 4 * 2 * WIDTH


def planned(stages: int, **changes: Any) -> tuple[PlannedRun, pb.PlanSummary]:
    asked = blocks_request(stages, schedule="1f1b", **changes)
    model = sharded(asked)
    count = stages * asked.plan.replicas
    made = plan_run(asked, model, units(count), known(model, count))
    return made, summarise(asked.plan, made)


def test_cuts_and_nodes_are_those_of_the_users_graph() -> None:
    made, summary = planned(2, cuts=[4])
    assert made.cut.way.cuts == (made.sharded.new_cut(4),)
    assert made.cut.way.cuts != (4,)
    assert [(stage.first_node, stage.nodes) for stage in summary.stages] == [(0, 4), (4, 5)]
    assert [stage.parameters for stage in summary.stages] == [WIDTH + 2 * WIDTH * INNER] * 2
    _, free = planned(2)
    assert sum(stage.nodes for stage in free.stages) == 9
    assert free.stages[0].nodes == free.stages[1].first_node


def test_a_cut_that_would_part_shares_of_a_gradient_is_refused_in_the_users_words() -> None:
    asked = blocks_request(2, cuts=[40])
    model = sharded(asked)
    with pytest.raises(PlanError, match="cannot be cut at node 40") as caught:
        plan_run(asked, model, units(2), known(model, 2))
    assert "8" in caught.value.remedy


def test_traffic_counts_all_shards_and_their_exchanges() -> None:
    made, summary = planned(2, cuts=[4], replicas=2)
    stages = sum(stage.boundary_bytes + stage.returned_bytes for stage in summary.stages)
    assert stages == 2 * WHOLE * made.micro_batches
    (chosen,) = [each for each in summary.prediction.candidates if each.chosen]
    # Two sums each way; and the halves of what crosses the boundary, there and back.
    within = (4 * WHOLE + 2 * WHOLE // 2) * made.micro_batches
    exchanged = sum(each.gradient_bytes for each in summary.prediction.servers)
    assert chosen.traffic_bytes == 2 * (stages + 2 * within) + exchanged


def test_the_summary_tells_what_is_split_and_exchanged() -> None:
    _, summary = planned(2)
    tensor = summary.tensor
    assert tensor.servers == 2
    assert {each.name: each.split for each in tensor.parameters} == {
        name + str(block): split for name, split in (("up", "column"), ("down", "row")) for block in range(2)
    }
    assert (tensor.forward_exchanges, tensor.backward_exchanges) == (2, 2)
    assert tensor.exchange_bytes == 4 * WHOLE
    assert summary.transport == "grpc"
    assert summary.transport_reason
    for each in summary.prediction.servers:
        # scale, and half of both products; gradients and Adam's two moments.
        assert each.weight_bytes == 4 * (WIDTH + WIDTH * INNER)
        assert each.optimizer_bytes == 2 * each.weight_bytes


class Asked(LinkBook):
    """Answers at once, and keeps what it was asked for, by the servers' numbers."""

    def __init__(self, rate: LinkRate) -> None:
        super().__init__(connect=_refuse)
        self.links: list[str] = []
        self._rate_of_all = rate

    def rates(self, links: Sequence[tuple[str, str]]) -> list[LinkRate | GradwireError]:
        self.links += [f"{first[-1]}{second[-1]}" for first, second in links]
        return [self._rate_of_all] * len(links)


def _refuse(address: str) -> Any:
    raise AssertionError(address)


def test_links_within_groups_are_measured_and_between_their_first_servers() -> None:
    asked = blocks_request(2, replicas=2, activation_compression=["auto"])
    model = sharded(asked)
    free = units(4)
    for first, second in free:
        first.device.memory_bytes, second.device.memory_bytes = 2000, 1000
    book, costs = Asked(LinkRate(1e6, 1e6, 2e-3)), CostBook(_refuse, seconds=0)
    found = Planner(book, costs).measure(asked.plan, model, free)
    assert book.links[:4] == ["01", "23", "45", "67"]
    assert sorted("".join(sorted(link)) for link in book.links[4:]) == ["02", "04", "26", "46"]
    assert {frozenset(ends) for ends in found.links} == {frozenset(ends) for ends in ((0, 1), (2, 3), (0, 2), (1, 3))}
    assert found.groups == [GroupLink(2, 1e6, 1e-3)] * 4
    assert list(found.memory_bytes) == [1000] * 4
    plain = costs.of(model.indexed, asked.plan, [unit[0] for unit in free])
    each = 1e-3 + WHOLE / 1e6
    for with_exchanges, without in zip(found.costs, plain, strict=True):
        assert with_exchanges.forward.sum() == pytest.approx(without.forward.sum() + 2 * each)
        assert with_exchanges.input_gradient.sum() == pytest.approx(without.input_gradient.sum() + 2 * each)
    # Where a step is over in no time, only these: whether servers reach each other must be known.
    hasty = blocks_request(2)
    quiet = Asked(LinkRate(1e6, 1e6, 2e-3))
    Planner(quiet, costs).measure(hasty.plan, sharded(hasty), units(2))
    assert quiet.links == ["01", "23"]


def test_of_replicas_the_slowest_group_counts_and_goes_with_its_position() -> None:
    model = sharded(blocks_request(2))
    links = [GroupLink(2, speed, 1e-4) for speed in (1e8, 2e8, 3e8, 5e7)]
    joint = joint_servers(((0, 1), (2, 3)), dataclasses.replace(known(model, 4), groups=links))
    assert joint.groups == [links[0], links[3]]
    assert joint.ordered([1, 0]).groups == [links[3], links[0]]


def test_of_what_is_spread_a_part_is_sent_and_the_whole_is_kept() -> None:
    model = sharded(blocks_request(2))
    spread = model.spread[graph_pb2.GRAPH_KIND_TRAIN]
    assert {"s0", "d0", "s1"} < spread.keys()
    assert "u0" not in spread
    found = {value.made: value for value in travelling_values(model.indexed.train, 2, spread, 2)}
    of_d0 = found[model.indexed.train.producers["d0"]]
    of_u0 = found[model.indexed.train.producers["u0"]]
    assert (of_d0.size_bytes, of_d0.gradient_bytes, of_d0.kept_bytes) == (WHOLE // 2, WHOLE // 2, WHOLE)
    # Of a part, what each server has travels as it is.
    assert of_u0.size_bytes == of_u0.kept_bytes == 4 * 2 * INNER // 2
    problem = PartitionProblem(
        seconds=np.ones((2, 3)), cuts=[1], placement=(0, 1), values=[TravellingValue(0, (2,), 5, 5, 10)]
    )
    parts = Units(problem, [1])
    assert (parts.sent.of(0, 1), parts.returned.of(1, 2), parts.incoming.of(1, 2)) == (5, 5, 10)


def test_more_stages_take_all_their_shards() -> None:
    asked = blocks_request(1, schedule="1f1b")
    model = sharded(asked)
    servers = dataclasses.replace(known(model, 1), memory_bytes=[9000])
    with pytest.raises(PlanError, match="does not fit") as caught:
        plan_run(asked, model, units(1), servers)
    assert "use 2 stages, on 2 more such servers" in caught.value.remedy


def test_servers_of_a_stage_that_do_not_reach_each_other_are_refused() -> None:
    """One that the coordinator itself does not reach is another matter: a free one may take its place."""
    asked = blocks_request(1)
    model, own = sharded(asked), units(1)
    first, second = (server.address for server in own[0])

    class Links(LinkBook):
        def rates(self, links: Sequence[tuple[str, str]]) -> list[LinkRate | GradwireError]:
            return [Unreachable(f"Cannot reach the stage server at {lost}") for _ in links]

    def refuse(address: str) -> Any:
        raise AssertionError(address)

    planner = Planner(Links(refuse), CostBook(refuse, seconds=0))
    lost = second
    with pytest.raises(PlanError, match="cannot reach each other") as caught:
        planner.measure(asked.plan, model, own)
    assert first in caught.value.message
    assert second in caught.value.message
    assert "--advertise" in caught.value.remedy
    lost = first
    with pytest.raises(Unreachable):
        planner.measure(asked.plan, model, own)
