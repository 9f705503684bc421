"""The ways to cut a model and to place its stages on servers that a plan allows, and what a step costs on each.

Pure. Leaves to others: choosing among them (`candidates.py`), and what servers and the client must know of the one that
is carried out (`layout.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gradwire_coordinator.boundaries import Boundaries, Links, asked_codecs
from gradwire_coordinator.candidates import AUTO, Way
from gradwire_coordinator.codec_choice import Choice
from gradwire_coordinator.costs import NodeCosts, Rates
from gradwire_coordinator.exchange_costs import Ring, choose_codec, exchange_bytes, exchange_seconds
from gradwire_coordinator.group_costs import GroupLink, exchanges_of, group_bytes, with_gathers
from gradwire_coordinator.named_schedules import placements
from gradwire_coordinator.optimizer_costs import OptimizerCosts
from gradwire_coordinator.partition import check_cuts, find_partition
from gradwire_coordinator.partition_inputs import PartitionInputs
from gradwire_coordinator.placement import Placement, looped
from gradwire_coordinator.programs import ChosenSchedule, recomputing_stages
from gradwire_coordinator.segments import Segments, make_segments
from gradwire_coordinator.sharing import Sharing
from gradwire_coordinator.simulator import StageSeconds
from gradwire_coordinator.step_costs import (
    rebuilt_bytes,
    reduce_seconds,
    stage_bytes,
    stage_seconds,
    step_costs,
    with_messages,
)
from gradwire_coordinator.tensor.sharded_model import ShardedModel
from gradwire_protocol.errors import PlanError
from gradwire_protocol.optimizer_state import StateBytes
from gradwire_protocol.v1 import graph_pb2, run_pb2


@dataclass(frozen=True, kw_only=True, eq=False)
class Servers:
    """What is known of the servers of a run, by position: speed, memory (0: not known), costs of nodes, and links.

    Of a tensor group it is what is known of its first server, but the least memory of all, and costs with exchanges.
    """

    rates: Sequence[Rates]
    memory_bytes: Sequence[int]
    costs: Sequence[NodeCosts]
    links: Links
    # Of each position, with the servers of other replicas; empty: there are no others.
    rings: Sequence[Ring] = ()
    # Of each position, within its tensor group; empty: there is one shard.
    groups: Sequence[GroupLink] = ()
    # Whether each must stay at its position.
    order_is_fixed: bool = False

    def ordered(self, devices: Sequence[int]) -> Servers:
        """Return these servers, so that the one now at `devices[k]` is at position k."""
        position = {device: at for at, device in enumerate(devices)}
        return Servers(
            rates=[self.rates[device] for device in devices],
            memory_bytes=[self.memory_bytes[device] for device in devices],
            costs=[self.costs[device] for device in devices],
            links={(position[a], position[b]): rate for (a, b), rate in self.links.items()},
            rings=[self.rings[device] for device in devices] if self.rings else (),
            groups=[self.groups[device] for device in devices] if self.groups else (),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class CutModel:
    """A model cut for a placement. Bytes and seconds are of one shard, and all shards have the same."""

    # What is known of the servers by their places in the pipeline, and by place: which of the given ones it is.
    servers: Servers
    devices: tuple[int, ...]
    segments: Segments
    # Of a micro-batch on each stage, without messages and transfers.
    seconds: tuple[StageSeconds, ...]
    boundaries: Boundaries
    # The codec of each boundary.
    codecs: tuple[Choice, ...]
    # Weights, gradients and optimizer state, by server.
    state: tuple[StateBytes, ...]
    # How replicas agree.
    sharing: Sharing
    # Of each stage: whether it runs forwards again for their backwards.
    recomputes: tuple[bool, ...]
    way: Way
    # By which share other cuts could be faster at the most (`Partition.gap`); None: the user's own.
    gap: float | None


class Division(NamedTuple):
    """Where the stages of a run are: of each its server's position, and the cuts of the sharded training graph."""

    placement: Placement
    cuts: tuple[int, ...]


def possible_ways(
    plan: run_pb2.Plan,
    optimizer: run_pb2.Optimizer,
    sharded: ShardedModel,
    servers: Servers,
    division: Division | None = None,
) -> list[CutModel]:
    """Return the model, cut for each placement that the plan allows and that fits, the fewest stages first.

    division: what it is to be instead. PlanError, ModelError.
    """
    found: list[CutModel] = []
    problem: PlanError | None = None
    for placement in allowed_placements(plan) if division is None else [division.placement]:
        try:
            found.append(_cut(plan, optimizer, sharded, placement, servers, division))
        except PlanError as error:
            problem = problem or error
    if problem is not None and not found:
        raise problem
    return found


def allowed_placements(plan: run_pb2.Plan) -> list[Placement]:
    """Return where stages can go: as the schedule wants it; under "auto" also one stage on each server.

    The latter unless the plan says something of each of its stages.
    """
    found = placements(plan.schedule, plan.stages, plan.virtual_stages)
    one_each = looped(plan.stages)
    says_of_each = bool(plan.cuts) or len(plan.activation_compression) > 1
    return found if plan.schedule != AUTO or says_of_each or one_each in found else [one_each, *found]


def _users_cuts(plan: run_pb2.Plan, sharded: ShardedModel, stages: int) -> tuple[int, ...]:
    """Return where the user wants the graph to be cut, as positions in the sharded one; PlanError."""
    usable = sharded.indexed.train.usable_cuts(sharded.indexed.mutated)
    # Where several positions are one to the user, it stands for one of them.
    of_users = [old for cut in usable if sharded.new_cut(old := sharded.old_cut(cut)) == cut]
    return tuple(sharded.new_cut(cut) for cut in check_cuts(plan.cuts, stages, of_users))


def _cut(
    plan: run_pb2.Plan,
    optimizer: run_pb2.Optimizer,
    sharded: ShardedModel,
    placement: Placement,
    servers: Servers,
    division: Division | None,
) -> CutModel:
    indexed = sharded.indexed
    sharing = Sharing.of(plan, optimizer.name)
    optimizer_costs = OptimizerCosts(
        optimizer, sharing.sharers, elsewhere=sharing.exchange.has_servers, exchange=sharing.state
    )
    rows = servers.costs[0].rows
    if division is not None or plan.cuts:
        cuts = _users_cuts(plan, sharded, len(placement)) if division is None else division.cuts
        devices, gap = tuple(range(plan.stages)), None
    else:
        inputs = PartitionInputs(
            plan=plan,
            optimizer=optimizer_costs,
            sharded=sharded,
            costs=servers.costs,
            memory_bytes=servers.memory_bytes,
            links=servers.links,
            order_is_fixed=servers.order_is_fixed,
        )
        partition = find_partition(inputs.problem(placement), inputs.alternatives(placement))
        cuts, devices, gap = partition.cuts, partition.devices, partition.gap
    servers = servers.ordered(devices)
    # Of "auto" it is not known yet: what a named one needs is near enough.
    programs = ChosenSchedule(plan.schedule, placement).programs(min(plan.micro_batches, plan.expected_rows))
    recomputes = recomputing_stages(programs) if plan.recompute else [False] * len(placement)
    of_nodes = [servers.costs[server] for server in placement]
    segments = make_segments(indexed, cuts, rows, servers.rates[0], sharded.spread)
    train = segments.of_graph(graph_pb2.GRAPH_KIND_TRAIN)
    stages = stage_seconds(of_nodes, cuts, recomputes)
    boundaries = Boundaries(indexed.train, train, placement, rows, sharded.shards)
    asked = asked_codecs(plan)[: len(placement) - 1]
    codecs = boundaries.choose(asked, programs, stages, servers.rates, servers.links)
    held = stage_bytes(indexed.train, train, of_nodes, cuts, recomputes)
    tensors = [[item.spec for item in segments.held_by(server, placement)] for server in range(plan.stages)]
    if sharing.codec_is_open:
        busy = [0.0] * plan.stages
        for server, seconds in zip(placement, stages, strict=True):
            busy[server] += (seconds.forward + seconds.backward) * min(plan.micro_batches, plan.expected_rows)
        chosen = choose_codec(servers.rings, sharing, tensors, servers.rates, max(busy))
        sharing = Sharing.of(plan, optimizer.name, chosen)
        optimizer_costs = OptimizerCosts(optimizer, sharing.sharers, exchange=sharing.state)
    state = [optimizer_costs.held(own) for own in tensors]
    rebuilt = rebuilt_bytes(of_nodes, cuts, recomputes, placement)
    update = [optimizer_costs.update_seconds(own, rates) for own, rates in zip(tensors, servers.rates, strict=True)]
    messages = with_gathers(with_messages(stages, of_nodes, placement), boundaries, placement, servers.groups)
    in_groups = exchanges_of(sharded, rows)
    way = Way(
        cuts=tuple(cuts),
        costs=step_costs(
            placement,
            boundaries.loaded(codecs, messages, servers.rates, servers.links),
            held,
            reduce=reduce_seconds(segments, placement, servers.links),
            update=update,
            exchange=exchange_seconds(servers.rings, sharing, tensors, plan.replicas),
        ),
        held_bytes=tuple(each.total + once for each, once in zip(state, rebuilt, strict=True)),
        memory_bytes=tuple(servers.memory_bytes),
        traffic_bytes=sum(
            boundaries.leaving_bytes(segment, codecs) + boundaries.returned_bytes(segment, codecs)
            for segment in train.values()
        )
        + group_bytes(in_groups, boundaries, servers.groups),
        exchange_bytes=exchange_bytes(servers.rings, sharing, tensors),
    )
    return CutModel(
        servers=servers,
        devices=devices,
        segments=segments,
        seconds=tuple(stages),
        boundaries=boundaries,
        codecs=tuple(codecs),
        state=tuple(state),
        recomputes=tuple(recomputes),
        sharing=sharing,
        way=way,
        gap=gap,
    )
