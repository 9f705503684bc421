"""Lays a planned run out: what each server and the client must know of it.

Pure. Leaves to others: choosing the servers (`registry.py`), the cut and the schedule (`planner.py`), what is told of
them (`plan_summary.py`), and preparing the servers (`run.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradwire_coordinator.bounds import message_bounds
from gradwire_coordinator.costs import rows_per_micro_batch
from gradwire_coordinator.graph_index import value_bytes
from gradwire_coordinator.placement import Placement, hosted
from gradwire_coordinator.plan_summary import summarise
from gradwire_coordinator.planner import PlannedRun
from gradwire_coordinator.programs import ChosenSchedule, ProgramBook
from gradwire_coordinator.registry import Server
from gradwire_coordinator.server_place import ServerPlace
from gradwire_coordinator.timetable import check_programs, draw
from gradwire_coordinator.ways import CutModel
from gradwire_protocol.codecs import CODEC_NAMES
from gradwire_protocol.optimizer_state import tensor_bytes
from gradwire_protocol.v1 import coordinator_pb2, graph_pb2, stage_pb2

# In micro-batches: what still fits a log.
_WIDEST_PICTURE = 32


@dataclass(frozen=True)
class Layout:
    """A run, laid out. Lists go by server: by replica, position and shard; then parameter servers."""

    servers: list[Server]
    places: list[ServerPlace]
    # Servers of the last stage, each with its replica: the first shards, and the others, whose losses are the same.
    loss_from: dict[int, int]
    loss_copies: dict[int, int]
    prepare: list[stage_pb2.PrepareRequest]
    for_client: list[coordinator_pb2.ServerLayout]
    summary: coordinator_pb2.PlanSummary
    timeline: list[coordinator_pb2.ServerTimeline]
    schedule: ChosenSchedule
    programs: ProgramBook

    def picture(self) -> str:
        """Return the schedule of a replica's whole step, with actions of equal length; nothing if it is too wide."""
        micro_batches = -(-self.summary.micro_batches // len(self.summary.replica_shares))
        if micro_batches > _WIDEST_PICTURE:
            return ""
        programs = self.schedule.programs(micro_batches)
        return draw(programs, check_programs(programs, micro_batches, backward=True, placement=self.schedule.placement))


def lay_out(
    run: str,
    generation: int,
    request: coordinator_pb2.CreateRunRequest,
    planned: PlannedRun,
    parameter_servers: Sequence[Server] = (),
) -> Layout:
    """Return what carries out a run that is planned, with these parameter servers."""
    plan, cut, schedule, shards = request.plan, planned.cut, planned.schedule, planned.sharded.shards
    pipeline = hosted(schedule.placement)
    sharing = cut.sharing
    local_steps = sharing.local_steps() if plan.replicas > 1 else None
    # (position in its pipeline, the server, its place) of each.
    placed = [
        (
            position,
            server,
            ServerPlace(stages=pipeline[position], replica=replica, replicas=plan.replicas, shard=shard, shards=shards),
        )
        for (replica, position), unit in zip(
            itertools.product(range(plan.replicas), range(plan.stages)), planned.units, strict=True
        )
        for shard, server in enumerate(unit)
    ]
    helpers = [
        (server, ServerPlace(stages=[len(schedule.placement) + number], parameter_server=number))
        for number, server in enumerate(parameter_servers)
    ]
    bounds = _bounds(request, planned)
    peers = [
        stage_pb2.Peer(
            server=server.server,
            address=server.address,
            stages=place.stages,
            replica=place.replica,
            shard=place.shard,
        )
        for _, server, place in placed
    ]
    peers += [
        stage_pb2.Peer(server=server.server, address=server.address, stages=place.stages, parameter_server=True)
        for server, place in helpers
    ]
    segments = cut.segments
    placements = _with_parameter_servers(segments.placements, [server.server for server, _ in helpers])
    common = stage_pb2.PrepareRequest(
        run=run,
        generation=generation,
        peers=peers,
        stages=len(schedule.placement),
        optimizer=request.optimizer,
        loss_form=planned.sharded.indexed.model.loss_form,
        seed=request.seed,
        recompute=plan.recompute,
        precision=plan.precision,
        activation_codecs=[CODEC_NAMES[choice.codec] for choice in cut.codecs],
        checksums=plan.checksums,
        compression=str(sharing.codec),
        shard_optimizer=sharing.shards_optimizer,
        local_steps=local_steps,
        staleness=sharing.exchange.staleness,
        transport=planned.transport.name,
    )
    losses = {number: place for number, (position, _, place) in enumerate(placed) if position == schedule.placement[-1]}
    return Layout(
        servers=[*planned.servers, *parameter_servers],
        places=[place for _, _, place in placed] + [place for _, place in helpers],
        loss_from={number: place.replica for number, place in losses.items() if place.shard == 0},
        loss_copies={number: place.replica for number, place in losses.items() if place.shard > 0},
        prepare=[
            _for_server(
                common,
                server,
                segments=[segment for stage in place.stages for segment in segments.stages[stage]],
                tensors=_held_by(placements, position, schedule.placement),
                bounds=[bound for stage in place.stages for bound in bounds.get(stage, ())],
            )
            for position, server, place in placed
        ]
        + [_for_server(common, server, tensors=_updated_by(placements, server)) for server, _ in helpers],
        for_client=[
            _for_client(server, cut, _held_by(placements, position, schedule.placement), place)
            for position, server, place in placed
        ]
        + [_for_client(server, cut, _updated_by(placements, server), place) for server, place in helpers],
        summary=summarise(plan, planned),
        timeline=planned.timeline,
        schedule=schedule,
        programs=ProgramBook(
            schedule,
            tied_servers=segments.tied_servers(schedule.placement),
            active_stages={kind: frozenset(segments.of_graph(kind)) for kind in segments.cuts},
            replicas=plan.replicas,
            shards=shards,
            sharing=sharing,
        ),
    )


def _bounds(request: coordinator_pb2.CreateRunRequest, planned: PlannedRun) -> dict[int, list[stage_pb2.UntakenBound]]:
    """Return how many messages can lie untaken, by the stage that receives them, whatever a batch's rows."""
    # Later batches may have more rows than the expected one, and then as many micro-batches as the plan allows; shares
    # may give one replica any number of them.
    plan, sharded = request.plan, planned.sharded
    train, spread = sharded.indexed.train, sharded.spread.get(graph_pb2.GRAPH_KIND_TRAIN, {})
    rows = rows_per_micro_batch(plan.expected_rows, plan.micro_batches)
    *fewer, full = planned.schedule.extremes(plan.micro_batches)
    return message_bounds(
        full,
        planned.cut.segments.of_graph(graph_pb2.GRAPH_KIND_TRAIN),
        # Of what is spread, a message is one part.
        lambda value: -(-value_bytes(train.spec(value), rows) // (sharded.shards if value in spread else 1)),
        fewer=fewer,
    )


def _for_server(common: stage_pb2.PrepareRequest, server: Server, **fields: Any) -> stage_pb2.PrepareRequest:
    """Return what one server must know, with what all must know."""
    made = stage_pb2.PrepareRequest(server=server.server, **fields)
    made.MergeFrom(common)
    return made


def _with_parameter_servers(
    placements: Sequence[stage_pb2.TensorPlacement], servers: Sequence[str]
) -> list[stage_pb2.TensorPlacement]:
    """Give each trained parameter, the largest first, to the parameter server that has the least."""
    loads = dict.fromkeys(servers, 0)
    server_of: dict[str, str] = {}
    trained = [
        item.spec
        for item in placements
        if item.spec.requires_grad and item.spec.kind == graph_pb2.TENSOR_KIND_PARAMETER and servers
    ]
    for spec in sorted(trained, key=lambda spec: -tensor_bytes(spec)):
        server = min(loads, key=loads.__getitem__)
        server_of[spec.name] = server
        loads[server] += tensor_bytes(spec)
    return [
        stage_pb2.TensorPlacement(
            spec=item.spec, holder_stages=item.holder_stages, parameter_server=server_of.get(item.spec.name, "")
        )
        for item in placements
    ]


def _held_by(
    placements: Sequence[stage_pb2.TensorPlacement], position: int, placement: Placement
) -> list[stage_pb2.TensorPlacement]:
    """Return the tensors that the server at a position holds for its stages, each once."""
    return [item for item in placements if any(placement[stage] == position for stage in item.holder_stages)]


def _updated_by(placements: Sequence[stage_pb2.TensorPlacement], server: Server) -> list[stage_pb2.TensorPlacement]:
    return [item for item in placements if item.parameter_server == server.server]


def _for_client(
    server: Server, cut: CutModel, held: Sequence[stage_pb2.TensorPlacement], place: ServerPlace
) -> coordinator_pb2.ServerLayout:
    is_helper = place.parameter_server is not None
    stages = [] if is_helper else place.stages
    segments = [segment for stage in stages for segment in cut.segments.stages[stage]]
    inputs: dict[graph_pb2.GraphKind, dict[str, None]] = {}
    for segment in segments:
        read = [incoming.value for incoming in segment.incoming if incoming.from_batch]
        if read:
            # What several stages of a server read comes there once.
            inputs.setdefault(segment.graph, {}).update(dict.fromkeys(read))
    return coordinator_pb2.ServerLayout(
        server=server.server,
        address=server.address,
        stages=place.stages,
        replica=place.replica,
        shard=place.shard,
        parameter_server=is_helper,
        tensors=[placement.spec.name for placement in held],
        inputs=[coordinator_pb2.InputUse(graph=graph, values=values) for graph, values in inputs.items()],
        results=[
            result.value
            for segment in segments
            # All shards have the whole of them.
            if segment.graph == graph_pb2.GRAPH_KIND_PREDICT and place.shard == 0
            for result in segment.results
        ],
        owned_tensors=[
            placement.spec.name
            for placement in held
            if place.leads and _is_state(placement.spec) and _gives(placement, server, stages)
        ],
    )


def _gives(placement: stage_pb2.TensorPlacement, server: Server, stages: Sequence[int]) -> bool:
    """Whether a server that holds a tensor is the one of its replica that the client collects it from."""
    if placement.parameter_server:
        return placement.parameter_server == server.server
    return placement.holder_stages[0] in stages


def _is_state(spec: graph_pb2.TensorSpec) -> bool:
    """Whether a tensor is in the user's state dict."""
    return spec.kind == graph_pb2.TENSOR_KIND_PARAMETER or (
        spec.kind == graph_pb2.TENSOR_KIND_BUFFER and spec.persistent
    )
