"""Lays a planned run out: what each server and the client must know of it.

Pure. Leaves to others: choosing the servers (`registry.py`), the cut and the schedule (`planner.py`), what is told of
them (`plan_summary.py`), and preparing the servers (`run.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradwire_coordinator.bounds import message_bounds
from gradwire_coordinator.costs import rows_per_micro_batch
from gradwire_coordinator.graph_index import value_bytes
from gradwire_coordinator.model_checks import IndexedModel
from gradwire_coordinator.placement import hosted
from gradwire_coordinator.plan_summary import summarise
from gradwire_coordinator.planner import PlannedRun
from gradwire_coordinator.programs import ChosenSchedule, ProgramBook
from gradwire_coordinator.registry import Server
from gradwire_coordinator.timetable import check_programs, draw
from gradwire_coordinator.ways import CutModel
from gradwire_protocol.codecs import CODEC_NAMES
from gradwire_protocol.v1 import coordinator_pb2, graph_pb2, stage_pb2

# In micro-batches: what still fits a log.
_WIDEST_PICTURE = 32


@dataclass(frozen=True)
class Layout:
    """A run, laid out. Lists go by server."""

    servers: list[Server]
    # The stages of each server, ascending.
    stages: list[list[int]]
    prepare: list[stage_pb2.PrepareRequest]
    for_client: list[coordinator_pb2.ServerLayout]
    summary: coordinator_pb2.PlanSummary
    timeline: list[coordinator_pb2.ServerTimeline]
    schedule: ChosenSchedule
    programs: ProgramBook

    def picture(self) -> str:
        """Return the schedule of a whole step, drawn with actions of equal length; nothing if it is too wide."""
        micro_batches = self.summary.micro_batches
        if micro_batches > _WIDEST_PICTURE:
            return ""
        programs = self.schedule.programs(micro_batches)
        return draw(programs, check_programs(programs, micro_batches, backward=True, placement=self.schedule.placement))


def lay_out(
    run: str,
    generation: int,
    request: coordinator_pb2.CreateRunRequest,
    indexed: IndexedModel,
    planned: PlannedRun,
) -> Layout:
    """Return what carries out a run that is planned."""
    plan, servers, cut, schedule = request.plan, planned.servers, planned.cut, planned.schedule
    stages = hosted(schedule.placement)
    bounds = _bounds(request, indexed, cut, schedule)
    peers = [
        stage_pb2.Peer(server=server.server, address=server.address, stages=own)
        for server, own in zip(servers, stages, strict=True)
    ]
    segments = cut.segments
    return Layout(
        servers=list(servers),
        stages=stages,
        prepare=[
            stage_pb2.PrepareRequest(
                run=run,
                generation=generation,
                server=server.server,
                segments=[segment for stage in own for segment in segments.stages[stage]],
                tensors=segments.held_by(position, schedule.placement),
                peers=peers,
                stages=len(schedule.placement),
                optimizer=request.optimizer,
                loss_form=indexed.model.loss_form,
                seed=request.seed,
                recompute=plan.recompute,
                precision=plan.precision,
                activation_codecs=[CODEC_NAMES[choice.codec] for choice in cut.codecs],
                bounds=[bound for stage in own for bound in bounds.get(stage, ())],
                checksums=plan.checksums,
            )
            for position, (server, own) in enumerate(zip(servers, stages, strict=True))
        ],
        for_client=[
            _for_client(server, cut, position, own)
            for position, (server, own) in enumerate(zip(servers, stages, strict=True))
        ],
        summary=summarise(plan, planned),
        timeline=planned.timeline,
        schedule=schedule,
        programs=ProgramBook(
            schedule,
            tied_servers=segments.tied_servers(schedule.placement),
            active_stages={kind: frozenset(segments.of_graph(kind)) for kind in segments.cuts},
        ),
    )


def _bounds(
    request: coordinator_pb2.CreateRunRequest, indexed: IndexedModel, cut: CutModel, schedule: ChosenSchedule
) -> dict[int, list[stage_pb2.UntakenBound]]:
    """Return how many messages can lie untaken, by the stage that receives them, whatever a batch's rows."""
    # Later batches may have more rows than the expected one, and then as many micro-batches as the plan allows.
    plan = request.plan
    rows = rows_per_micro_batch(plan.expected_rows, plan.micro_batches)
    *fewer, full = schedule.extremes(plan.micro_batches)
    return message_bounds(
        full,
        cut.segments.of_graph(graph_pb2.GRAPH_KIND_TRAIN),
        lambda value: value_bytes(indexed.train.spec(value), rows),
        fewer=fewer,
    )


def _for_client(server: Server, cut: CutModel, position: int, stages: Sequence[int]) -> coordinator_pb2.ServerLayout:
    held = cut.segments.held_by(position, cut.way.placement)
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
        stages=stages,
        tensors=[placement.spec.name for placement in held],
        inputs=[coordinator_pb2.InputUse(graph=graph, values=values) for graph, values in inputs.items()],
        results=[
            result.value
            for segment in segments
            if segment.graph == graph_pb2.GRAPH_KIND_PREDICT
            for result in segment.results
        ],
        owned_tensors=[
            placement.spec.name
            for placement in held
            if placement.holder_stages[0] in stages and _is_state(placement.spec)
        ],
    )


def _is_state(spec: graph_pb2.TensorSpec) -> bool:
    """Whether a tensor is in the user's state dict."""
    return spec.kind == graph_pb2.TENSOR_KIND_PARAMETER or (
        spec.kind == graph_pb2.TENSOR_KIND_BUFFER and spec.persistent
    )
