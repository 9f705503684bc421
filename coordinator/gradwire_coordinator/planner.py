"""Plans a run: from a checked model, a plan and servers to the cut and the schedule that are carried out, with reasons.

First what must be measured on the servers, while they are reserved; then, purely, the ways that the plan allows and a
choice among them. Leaves to others: each of these parts (`cost_book.py`, `link_rates.py`, `ways.py`, `candidates.py`),
and what servers and the client must know of it (`layout.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from gradwire_coordinator.boundaries import Links, needs_links
from gradwire_coordinator.candidates import AUTO, Choice, choose
from gradwire_coordinator.cost_book import LEAST_SECONDS, CostBook
from gradwire_coordinator.costs import ESTIMATED, MEASURED, DeviceMake, NodeCosts, device_rates
from gradwire_coordinator.group_costs import GroupLink, exchanges_of, group_links, with_exchanges
from gradwire_coordinator.link_rates import LinkBook
from gradwire_coordinator.placement import neighbours
from gradwire_coordinator.prediction import predict, timeline
from gradwire_coordinator.programs import ChosenSchedule
from gradwire_coordinator.registry import Server
from gradwire_coordinator.replica_groups import (
    Groups,
    joint_servers,
    pipeline_plan,
    replica_groups,
    replica_shares,
    ring_neighbours,
)
from gradwire_coordinator.simulator import simulate
from gradwire_coordinator.tensor.sharded_model import ShardedModel
from gradwire_coordinator.tensor_groups import Unit, inner_links, unit_memory
from gradwire_coordinator.transport_choice import Transport, choose_transport
from gradwire_coordinator.ways import CutModel, Division, Servers, allowed_placements, possible_ways
from gradwire_protocol.dealing import deal
from gradwire_protocol.errors import PlanError, Unreachable
from gradwire_protocol.v1 import coordinator_pb2, run_pb2

# Unlike servers of which every pair is measured: with more it takes too long, and the order as given is tried.
_MOST_PAIRED = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedRun:
    """What is carried out."""

    sharded: ShardedModel
    # By position, one replica after the other: the servers of its shards.
    units: Sequence[Unit]
    # Of what shards and replicas add up.
    transport: Transport
    # Of the units: what was known of them.
    known: Servers
    # Of each replica: its share of a step's micro-batches; and how many one of them is expected to take, at most.
    shares: Sequence[float]
    micro_batches: int
    cut: CutModel
    schedule: ChosenSchedule
    prediction: coordinator_pb2.Prediction
    # By position, of every shard.
    timeline: list[coordinator_pb2.ServerTimeline]

    @property
    def servers(self) -> list[Server]:
        """By replica, position and shard."""
        return [server for unit in self.units for server in unit]


class Planner:
    """Measures with the help of two books, which remember what they were told. Thread-safe."""

    def __init__(self, links: LinkBook, costs: CostBook) -> None:
        self._links = links
        self._costs = costs

    def measure(self, plan: run_pb2.Plan, sharded: ShardedModel, units: Sequence[Unit]) -> Servers:
        """Return what is known of tensor groups, whose servers must be free, after measuring what the run depends on.

        Links are left out where a step is over so soon that they do not matter, unless the plan needs them.
        """
        # Between stages, and for what a group computes, its first server stands for all.
        servers = [unit[0] for unit in units]
        costs = self._costs.of(sharded.indexed, plan, servers)
        shortest = min(float(each.seconds().sum()) for each in costs)
        several = len(units) * sharded.shards > 1
        measures = (several and (_source(costs) == MEASURED or shortest >= LEAST_SECONDS)) or needs_links(plan)
        within = self._measure_groups(units) if sharded.shards > 1 else []
        if within:
            found = exchanges_of(sharded, costs[0].rows)
            costs = [with_exchanges(each, found, link) for each, link in zip(costs, within, strict=True)]
        memory_bytes = [unit_memory(unit) for unit in units]
        groups = replica_groups(plan, costs, memory_bytes)
        return Servers(
            rates=device_rates([server.device for server in servers]),
            memory_bytes=memory_bytes,
            costs=costs,
            links=self._measure_links(plan, servers, groups) if measures else {},
            groups=within,
        )

    def _measure_groups(self, units: Sequence[Unit]) -> list[GroupLink]:
        """Return how fast the links within tensor groups are; PlanError where servers do not reach each other.

        Always, for in the middle of a step nothing would say so before the step's limit.
        """
        of_units = [inner_links(unit) for unit in units]
        ends = [link for links in of_units for link in links]
        rates = self._links.rates(ends)
        for (first, second), rate in zip(ends, rates, strict=True):
            if isinstance(rate, Unreachable):
                if f"at {first}" in rate.message:
                    # Not even this service reaches it: others may take its place.
                    raise rate
                raise PlanError(
                    f"The servers at {first} and {second} are to share a stage, but cannot reach each other",
                    expected="servers that reach each other at the addresses that they advertise",
                    got=rate.message,
                    remedy="start servers with --advertise addresses that the others can dial, or plan with tensor=1",
                ) from rate
        found = iter(rates)
        return group_links(len(units[0]), [list(itertools.islice(found, len(links))) for links in of_units])

    def _measure_links(self, plan: run_pb2.Plan, servers: Sequence[Server], groups: Groups) -> Links:
        """Return how fast the links are that neighbouring stages may use: all, where the order is to be found.

        And those between the replicas of a stage.
        """
        unlike = any(len({DeviceMake.of(servers[server].device) for server in group}) > 1 for group in groups)
        if unlike and not plan.cuts and plan.stages <= _MOST_PAIRED:
            positions = list(itertools.combinations(range(plan.stages), 2))
        else:
            positions = neighbours(allowed_placements(plan))
        ends = [(group[first], group[second]) for group in groups for first, second in positions]
        ends += ring_neighbours(groups)
        rates = self._links.rates([(servers[first].address, servers[second].address) for first, second in ends])
        return dict(zip(ends, rates, strict=True))


def plan_run(
    request: coordinator_pb2.CreateRunRequest,
    sharded: ShardedModel,
    units: Sequence[Unit],
    known: Servers,
    division: Division | None = None,
) -> PlannedRun:
    """Return the cut and the schedule for these tensor groups, of which this is known; PlanError, ModelError.

    All replicas get the same ones: those of a pipeline that is nowhere faster than its slowest replica. division: how
    the model is divided, if that is not to be found.
    """
    groups = replica_groups(request.plan, known.costs, known.memory_bytes, as_given=known.order_is_fixed)
    plan = pipeline_plan(request.plan)
    ways = possible_ways(plan, request.optimizer, sharded, joint_servers(groups, known), division)
    # A batch may have fewer rows than the plan has micro-batches.
    micro_batches = min(plan.micro_batches, plan.expected_rows)
    choice = choose(plan.schedule, [each.way for each in ways], micro_batches)
    cut = next(each for each in ways if each.way is choice.chosen.way)
    order = [group[device] for group in groups for device in cut.devices]
    replicas = [[units[group[device]] for device in cut.devices] for group in groups]
    prediction = predict(choice, replicas, cut.state, cut.servers.links, micro_batches, _source(known.costs), cut.gap)
    schedule = _schedule(choice)
    return PlannedRun(
        sharded=sharded,
        units=[units[index] for index in order],
        known=known.ordered(order),
        transport=choose_transport(request.plan, cut.sharing, replicas),
        shares=_shares(request.plan, groups, known, cut, schedule),
        micro_batches=micro_batches,
        cut=cut,
        schedule=schedule,
        prediction=prediction,
        timeline=timeline(choice.chosen.candidate.simulation),
    )


def _shares(plan: run_pb2.Plan, groups: Groups, known: Servers, cut: CutModel, schedule: ChosenSchedule) -> list[float]:
    """Return the shares of replicas by their speed; equal ones where memory does not allow the fastest to take more."""
    way = cut.way
    shares = replica_shares(groups, cut.devices, known.costs, way.placement, way.cuts, cut.recomputes)
    dealt = deal(min(plan.micro_batches, plan.expected_rows), shares)
    most = max(dealt.count(replica) for replica in range(len(groups)))
    held = simulate(schedule.programs(most), way.costs).peak_bytes
    limits = way.limits
    if limits is not None and any(size > limit for size, limit in zip(held, limits, strict=True)):
        return [1.0 / len(groups)] * len(groups)
    return shares


def _schedule(choice: Choice) -> ChosenSchedule:
    chosen = choice.chosen
    return ChosenSchedule(
        chosen.schedule,
        chosen.way.placement,
        extra_warm_up=chosen.extra_warm_up,
        made=chosen.candidate.programs if chosen.schedule == AUTO else None,
    )


def _source(costs: Sequence[NodeCosts]) -> str:
    return MEASURED if all(each.source == MEASURED for each in costs) else ESTIMATED
