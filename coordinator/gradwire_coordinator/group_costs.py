"""What the exchanges within a tensor group cost: bytes that one of its servers sends, and seconds on its links.

Pure. Leaves to others: which servers make up a group (`tensor_groups.py`), what is computed between exchanges
(`costs.py`), and which values travel between stages in parts (`boundaries.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from gradwire_coordinator.boundaries import ASSUMED_LINK, Boundaries
from gradwire_coordinator.costs import NodeCosts, trained_tensors
from gradwire_coordinator.graph_index import GraphIndex, can_need_gradient, learned_values, read_values, value_bytes
from gradwire_coordinator.link_rates import LinkRate
from gradwire_coordinator.measured_costs import Floats
from gradwire_coordinator.placement import Placement
from gradwire_coordinator.simulator import StageSeconds
from gradwire_coordinator.tensor.sharded_model import ShardedModel
from gradwire_protocol.errors import GradwireError
from gradwire_protocol.frames import ELEMENT_BYTES
from gradwire_protocol.group_operators import BACKWARD_EXCHANGES, CROSS_ENTROPY, FORWARD_EXCHANGES, GATHER, SPLIT
from gradwire_protocol.v1 import graph_pb2

# Measurements of like links differ by less: in bytes a second, and in round trips, which are the noisier.
_LIKE_RATES, _LIKE_ROUND_TRIPS = 2.0, 4.0
# What servers tell each other of each row of scores: the largest; then the sum of exponentials, and the target's score.
_SCORE_NUMBERS = (1, 2)


@dataclass(frozen=True)
class Exchange:
    """What the servers of a group bring together at a node of the train graph, for one micro-batch."""

    node: int
    backward: bool
    # Whether each has another part of it; otherwise they add up what each has of all of it.
    gathers: bool
    # Of all of it.
    size_bytes: int


@dataclass(frozen=True)
class GroupLink:
    """The links between the servers of a group: every one of them as slow as the slowest."""

    servers: int
    bytes_per_second: float
    # From a server to another.
    delay_seconds: float

    def sent_bytes(self, exchange: Exchange) -> float:
        """Return what each of the servers sends."""
        turns = 1 if exchange.gathers else 2
        return turns * (self.servers - 1) / self.servers * exchange.size_bytes

    def seconds(self, exchange: Exchange) -> float:
        """Return what an exchange takes: two servers swap all that they add up, more of them sums of parts."""
        rounds = 2 if not exchange.gathers and self.servers > 2 else 1
        return rounds * self.delay_seconds + self.sent_bytes(exchange) / self.bytes_per_second

    def gather_bytes(self, part_bytes: int) -> int:
        """Return what each sends so that all have what each of them has such a part of."""
        return (self.servers - 1) * part_bytes

    def gather_seconds(self, part_bytes: int) -> float:
        """Return how long that takes."""
        return self.delay_seconds + self.gather_bytes(part_bytes) / self.bytes_per_second


def exchanges(index: GraphIndex, trained: Collection[str], rows: int, shards: int) -> list[Exchange]:
    """Return the exchanges of a train graph that was rewritten for so many shards, in the order of its nodes.

    In the backward only of what has a gradient: what a parameter of `trained` has a part in.
    """
    learned = learned_values(index, trained)
    found = []
    for position, node in enumerate(index.graph.nodes):
        if node.target in FORWARD_EXCHANGES:
            sizes = (
                _score_bytes(index, node, rows) if node.target == CROSS_ENTROPY else [value_bytes(node.output, rows)]
            )
            found += [Exchange(position, False, node.target == GATHER, size) for size in sizes]
        elif node.target in BACKWARD_EXCHANGES and _has_gradient(node, learned):
            parts = shards if node.target == SPLIT else 1
            found.append(Exchange(position, True, node.target == SPLIT, parts * value_bytes(node.output, rows)))
    return found


def exchanges_of(sharded: ShardedModel, rows: int) -> list[Exchange]:
    """Return the exchanges of a model's train graph, for a micro-batch of so many rows."""
    return exchanges(sharded.indexed.train, trained_tensors(sharded.indexed.tensors), rows, sharded.shards)


def with_exchanges(costs: NodeCosts, found: Sequence[Exchange], link: GroupLink) -> NodeCosts:
    """Return the costs of nodes with their exchanges in a group."""
    forward, input_gradient = _exchange_seconds(len(costs.forward), found, link)
    return dataclasses.replace(
        costs, forward=costs.forward + forward, input_gradient=costs.input_gradient + input_gradient
    )


def without_exchanges(costs: NodeCosts, found: Sequence[Exchange], link: GroupLink) -> NodeCosts:
    """Return what nodes only compute, out of their costs with exchanges."""
    forward, input_gradient = _exchange_seconds(len(costs.forward), found, link)
    return dataclasses.replace(
        costs,
        forward=np.maximum(0.0, costs.forward - forward),
        input_gradient=np.maximum(0.0, costs.input_gradient - input_gradient),
    )


def _exchange_seconds(nodes: int, found: Sequence[Exchange], link: GroupLink) -> tuple[Floats, Floats]:
    """Return what exchanges take at each node, in its forward and in its backward."""
    forward, backward = np.zeros(nodes), np.zeros(nodes)
    for exchange in found:
        (backward if exchange.backward else forward)[exchange.node] += link.seconds(exchange)
    return forward, backward


def with_gathers(
    seconds: Sequence[StageSeconds], boundaries: Boundaries, placement: Placement, groups: Sequence[GroupLink]
) -> list[StageSeconds]:
    """Add what it takes each stage to bring together what comes in parts: values, and gradients of what it made.

    groups: by server; none: there is one shard.
    """
    if not groups:
        return list(seconds)
    forward, backward = [0.0] * len(seconds), [0.0] * len(seconds)
    for before, values in enumerate(boundaries.spread):
        behind = before + 1
        for value in values:
            forward[behind] += groups[placement[behind]].gather_seconds(value.size_bytes)
            if value.has_gradient:
                backward[before] += groups[placement[before]].gather_seconds(value.size_bytes)
    return [own.plus(*both) for own, *both in zip(seconds, forward, backward, strict=True)]


def group_bytes(found: Sequence[Exchange], boundaries: Boundaries, groups: Sequence[GroupLink]) -> int:
    """Return what a shard sends to others of its group in one micro-batch, through all stages."""
    if not groups:
        return 0
    link = groups[0]
    gathered = sum(
        link.gather_bytes(value.size_bytes) * (2 if value.has_gradient else 1)
        for values in boundaries.spread
        for value in values
    )
    return gathered + round(sum(map(link.sent_bytes, found)))


def group_links(servers: int, rates: Sequence[Sequence[LinkRate | GradwireError]]) -> list[GroupLink]:
    """Return the links of groups, each of so many servers, from those that were measured within each.

    Like ones, up to the noise of measurements, count as equal, so that the order of groups does not hang on it. One
    that was not measured is as assumed.
    """
    found = []
    for own in rates:
        ways = [rate if isinstance(rate, LinkRate) else ASSUMED_LINK for rate in own] or [ASSUMED_LINK]
        speed = min(min(way.forward, way.backward) for way in ways)
        found.append(GroupLink(servers, speed, max(way.round_trip_seconds for way in ways) / 2))
    speeds, delays = [link.bytes_per_second for link in found], [link.delay_seconds for link in found]
    if max(speeds) > _LIKE_RATES * min(speeds) or max(delays) > _LIKE_ROUND_TRIPS * min(delays):
        return found
    return [GroupLink(servers, median(speeds), median(delays))] * len(found)


def slowest_group(links: Sequence[GroupLink]) -> GroupLink:
    """Return the links of a group that is nowhere faster than any of these."""
    return GroupLink(
        links[0].servers, min(link.bytes_per_second for link in links), max(link.delay_seconds for link in links)
    )


def _has_gradient(node: graph_pb2.Node, learned: Collection[str]) -> bool:
    return not node.no_grad and can_need_gradient(node.output) and any(value in learned for value in read_values(node))


def _score_bytes(index: GraphIndex, node: graph_pb2.Node, rows: int) -> list[int]:
    """Return what a cross entropy exchanges, in bytes: some numbers of each row of its scores."""
    scores = index.spec(next(read_values(node)))
    sizes = [max(0, size.fixed + size.per_row * rows) for size in scores.shape]
    # (rows, classes, …), or the classes alone.
    of_rows = math.prod(size for dimension, size in enumerate(sizes) if dimension != min(1, len(sizes) - 1))
    return [numbers * of_rows * ELEMENT_BYTES.get(scores.data_type, 4) for numbers in _SCORE_NUMBERS]
