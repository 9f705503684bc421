"""Makes replicas of servers, and of them one pipeline to plan for: all replicas are cut and scheduled alike.

At each position of it, the slowest of its servers counts, one of each replica. Pure. Leaves to others: planning that
pipeline (`ways.py`, `candidates.py`), and what the exchange between replicas takes (`exchange_costs.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from gradwire_coordinator.boundaries import ASSUMED_LINK, Links, link_between
from gradwire_coordinator.costs import (
    ESTIMATED,
    MEASURED,
    NodeCosts,
    Rates,
    rows_per_micro_batch,
)
from gradwire_coordinator.exchange_costs import Ring
from gradwire_coordinator.group_costs import slowest_group
from gradwire_coordinator.link_rates import LinkRate
from gradwire_coordinator.measured_costs import ActionSeconds
from gradwire_coordinator.placement import Placement
from gradwire_coordinator.step_costs import stage_seconds
from gradwire_coordinator.ways import Servers
from gradwire_protocol.errors import GradwireError
from gradwire_protocol.v1 import run_pb2

# By replica: its servers, out of those that were given, by position.
Groups = tuple[tuple[int, ...], ...]


def replica_groups(
    plan: run_pb2.Plan, costs: Sequence[NodeCosts], memory_bytes: Sequence[int], *, as_given: bool = False
) -> Groups:
    """Return which servers make up which replica, so that unlike ones are alike at each position, as far as they are.

    They are dealt out by speed, and then by memory. In the order given where all are alike, the plan has cuts, there is
    one replica, or it is asked for.
    """
    stages, replicas = plan.stages, plan.replicas
    speed = [(float(each.seconds().sum()), -memory) for each, memory in zip(costs, memory_bytes, strict=True)]
    servers = range(stages * replicas)
    if as_given or replicas == 1 or plan.cuts or len(set(speed)) == 1:
        return tuple(tuple(servers[replica * stages : (replica + 1) * stages]) for replica in range(replicas))
    dealt = sorted(servers, key=speed.__getitem__)
    return tuple(tuple(dealt[replica::replicas]) for replica in range(replicas))


def ring_neighbours(groups: Groups) -> list[tuple[int, int]]:
    """Return the pairs of servers that exchange gradients: of each position those of one replica and the next."""
    pairs = [
        (first, second)
        for position in zip(*groups, strict=True)
        for first, second in zip(position, (*position[1:], position[0]), strict=True)
    ]
    # Of two replicas the way there is the way back.
    return list({frozenset(pair): pair for pair in reversed(pairs)}.values()) if len(groups) > 1 else []


def joint_servers(groups: Groups, known: Servers) -> Servers:
    """Return what is known of a pipeline that is nowhere faster than the replica that is slowest there."""
    if len(groups) == 1:
        return known
    positions = list(zip(*groups, strict=True))
    return Servers(
        rates=[_slowest_rates([known.rates[server] for server in own]) for own in positions],
        memory_bytes=[_least([known.memory_bytes[server] for server in own]) for own in positions],
        costs=[_slowest_costs([known.costs[server] for server in own]) for own in positions],
        links=_joint_links(groups, known.links),
        rings=[_ring(own, known.links) for own in positions],
        groups=[slowest_group([known.groups[server] for server in own]) for own in positions] if known.groups else (),
        order_is_fixed=known.order_is_fixed,
    )


def pipeline_plan(plan: run_pb2.Plan) -> run_pb2.Plan:
    """Return the plan of one replica, with an equal share of the micro-batches, of as many rows each."""
    if plan.replicas == 1:
        return plan
    made = run_pb2.Plan()
    made.CopyFrom(plan)
    rows = rows_per_micro_batch(plan.expected_rows, plan.micro_batches)
    # A batch may have fewer rows than the plan has micro-batches.
    made.micro_batches = -(-min(plan.micro_batches, plan.expected_rows) // plan.replicas)
    made.expected_rows = rows * made.micro_batches
    return made


def replica_shares(
    groups: Groups,
    devices: Sequence[int],
    costs: Sequence[NodeCosts],
    placement: Placement,
    cuts: Sequence[int],
    recomputes: Sequence[bool],
) -> list[float]:
    """Return the share of a step's micro-batches of each replica, in proportion to the speed of its slowest server.

    devices: by position, its place in each of the groups. costs: of the servers as given.
    """
    speeds = []
    for group in groups:
        on_stages = [costs[group[devices[position]]] for position in placement]
        busy = [0.0] * len(group)
        for position, seconds in zip(placement, stage_seconds(on_stages, cuts, recomputes), strict=True):
            busy[position] += seconds.forward + seconds.backward
        speeds.append(1.0 / max(busy) if max(busy) > 0 else 1.0)
    # Of like replicas to the last bit, so that clients see that they are.
    return [1.0 / len(speeds)] * len(speeds) if len(set(speeds)) == 1 else [speed / sum(speeds) for speed in speeds]


def _slowest_rates(rates: Sequence[Rates]) -> Rates:
    return Rates(min(rate.flops_per_second for rate in rates), min(rate.bytes_per_second for rate in rates))


def _least(memory_bytes: Sequence[int]) -> int:
    """Of what is known."""
    return min(filter(None, memory_bytes), default=0)


def _slowest_costs(costs: Sequence[NodeCosts]) -> NodeCosts:
    first = costs[0]
    if all(each is first for each in costs):
        return first
    return NodeCosts(
        rows=first.rows,
        forward=np.max([each.forward for each in costs], axis=0),
        input_gradient=np.max([each.input_gradient for each in costs], axis=0),
        weight_gradient=np.max([each.weight_gradient for each in costs], axis=0),
        held_bytes=np.max([each.held_bytes for each in costs], axis=0),
        source=MEASURED if all(each.source == MEASURED for each in costs) else ESTIMATED,
        action=ActionSeconds(*(max(parts) for parts in zip(*(each.action for each in costs), strict=True))),
    )


def _joint_links(groups: Groups, links: Links) -> Links:
    """Return the links between positions that were measured in some replica, each as slow as the slowest of them."""
    found: dict[tuple[int, int], LinkRate | GradwireError] = {}
    for ends in itertools.combinations(range(len(groups[0])), 2):
        of_replicas = [
            link for group in groups if (link := _measured(links, group[ends[0]], group[ends[1]])) is not None
        ]
        rates = [link for link in of_replicas if isinstance(link, LinkRate)]
        if rates:
            found[ends] = _slowest_link(rates)
        elif of_replicas:
            found[ends] = of_replicas[0]
    return found


def _ring(servers: Sequence[int], links: Links) -> Ring:
    ways = []
    for first, second in zip(servers, (*servers[1:], servers[0]), strict=True):
        found = link_between(links, first, second)
        ways.append(found if isinstance(found, LinkRate) else ASSUMED_LINK)
    slowest = _slowest_link(ways)
    return Ring(len(servers), slowest.forward, slowest.round_trip_seconds / 2)


def _measured(links: Links, first: int, second: int) -> LinkRate | GradwireError | None:
    return link_between(links, first, second) if (first, second) in links or (second, first) in links else None


def _slowest_link(links: Sequence[LinkRate]) -> LinkRate:
    return LinkRate(
        min(link.forward for link in links),
        min(link.backward for link in links),
        max(link.round_trip_seconds for link in links),
    )
