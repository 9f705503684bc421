"""Lays a run out: from a checked model, a plan and servers to what each server and the client must know.

Pure: one server a stage, in the order given. Leaves to others: choosing the servers (`registry.py`), and preparing them
(`run.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gradwire_coordinator.boundaries import Boundaries, asked_codecs
from gradwire_coordinator.bounds import message_bounds
from gradwire_coordinator.codec_choice import Choice
from gradwire_coordinator.costs import device_rates, node_seconds, rows_per_micro_batch, travelling_values
from gradwire_coordinator.graph_index import value_bytes
from gradwire_coordinator.link_rates import LinkRate
from gradwire_coordinator.model_checks import IndexedModel
from gradwire_coordinator.partition import check_cuts, partition
from gradwire_coordinator.programs import ProgramBook, choose_schedule, recomputing_stages, training_programs
from gradwire_coordinator.registry import Server
from gradwire_coordinator.segments import Segments, make_segments
from gradwire_coordinator.timetable import check_programs, draw
from gradwire_protocol.codecs import CODEC_NAMES
from gradwire_protocol.errors import GradwireError
from gradwire_protocol.v1 import coordinator_pb2, graph_pb2, stage_pb2

# In micro-batches: what still fits a log.
_WIDEST_PICTURE = 32


@dataclass(frozen=True)
class Layout:
    """A run, laid out. Lists go by stage, and so by server."""

    servers: list[Server]
    prepare: list[stage_pb2.PrepareRequest]
    for_client: list[coordinator_pb2.ServerLayout]
    summary: coordinator_pb2.PlanSummary
    programs: ProgramBook

    def picture(self) -> str:
        """Return the schedule of a whole step, drawn with actions of equal length; nothing if it is too wide."""
        summary = self.summary
        stages, micro_batches = len(summary.stages), summary.micro_batches
        if micro_batches > _WIDEST_PICTURE:
            return ""
        programs = training_programs(summary.schedule, summary.extra_warm_up, stages, micro_batches)
        return draw(programs, check_programs(programs, micro_batches, backward=True))


def lay_out(
    run: str,
    generation: int,
    request: coordinator_pb2.CreateRunRequest,
    indexed: IndexedModel,
    servers: Sequence[Server],
    links: Sequence[LinkRate | GradwireError] = (),
) -> Layout:
    """Cut the model for these servers, one stage each, as the plan says; PlanError, ModelError.

    links: from each server to the next, where the plan leaves a codec open.
    """
    plan = request.plan
    rows = rows_per_micro_batch(plan.expected_rows, plan.micro_batches)
    rates = device_rates([server.device for server in servers])
    micro_batches = min(plan.micro_batches, plan.expected_rows)
    schedule, extra_warm_up = choose_schedule(plan.schedule)
    programs = training_programs(schedule, extra_warm_up, plan.stages, micro_batches)
    recomputes = recomputing_stages(programs) if plan.recompute else None
    seconds = node_seconds(indexed.train.graph.nodes, rows, rates, recomputes)
    usable = indexed.train.usable_cuts(indexed.mutated)
    if plan.cuts:
        cuts = check_cuts(plan.cuts, plan.stages, usable)
    else:
        cuts = partition(seconds, travelling_values(indexed.train, rows), usable)
    segments = make_segments(indexed, cuts, rows, rates[0])
    ends = [0, *cuts, len(indexed.train.graph.nodes)]
    stage_seconds = [float(seconds[stage, ends[stage] : ends[stage + 1]].sum()) for stage in range(plan.stages)]
    boundaries = Boundaries(indexed.train, segments.of_graph(graph_pb2.GRAPH_KIND_TRAIN), plan.stages, rows)
    choices = boundaries.choose(asked_codecs(plan), programs, stage_seconds, rates, links)
    # Later batches may have more rows than the expected one, and then as many micro-batches as the plan allows.
    bounds = message_bounds(
        training_programs(schedule, extra_warm_up, plan.stages, plan.micro_batches),
        segments.of_graph(graph_pb2.GRAPH_KIND_TRAIN),
        lambda value: value_bytes(indexed.train.spec(value), rows),
    )
    summary = coordinator_pb2.PlanSummary(
        schedule=schedule,
        extra_warm_up=extra_warm_up,
        micro_batches=plan.micro_batches,
        theoretical_bubble_ratio=(plan.stages - 1) / (plan.micro_batches + plan.stages - 1),
        stages=[
            _summarise(
                indexed,
                segments,
                stage,
                ends,
                micro_batches,
                stage_seconds[stage],
                boundaries,
                choices,
            )
            for stage in range(plan.stages)
        ],
    )
    peers = [
        stage_pb2.Peer(server=server.server, address=server.address, stages=[stage])
        for stage, server in enumerate(servers)
    ]
    return Layout(
        servers=list(servers),
        prepare=[
            stage_pb2.PrepareRequest(
                run=run,
                generation=generation,
                server=server.server,
                segments=segments.stages[stage],
                tensors=_held(segments, stage),
                peers=peers,
                stages=plan.stages,
                optimizer=request.optimizer,
                loss_form=indexed.model.loss_form,
                seed=request.seed,
                recompute=plan.recompute,
                precision=plan.precision,
                activation_codecs=[CODEC_NAMES[choice.codec] for choice in choices],
                bounds=bounds.get(stage, ()),
                checksums=plan.checksums,
            )
            for stage, server in enumerate(servers)
        ],
        for_client=[_for_client(server, segments, stage) for stage, server in enumerate(servers)],
        summary=summary,
        programs=ProgramBook(
            schedule=schedule,
            extra_warm_up=extra_warm_up,
            stages=plan.stages,
            tied_stages=segments.tied_stages(),
            active_stages={kind: frozenset(segments.of_graph(kind)) for kind in segments.cuts},
        ),
    )


def _held(segments: Segments, stage: int) -> list[stage_pb2.TensorPlacement]:
    return [placement for placement in segments.placements if stage in placement.holder_stages]


def _for_client(server: Server, segments: Segments, stage: int) -> coordinator_pb2.ServerLayout:
    held = _held(segments, stage)
    return coordinator_pb2.ServerLayout(
        server=server.server,
        address=server.address,
        stages=[stage],
        tensors=[placement.spec.name for placement in held],
        inputs=[
            coordinator_pb2.InputUse(graph=segment.graph, values=read)
            for segment in segments.stages[stage]
            if (read := [incoming.value for incoming in segment.incoming if incoming.from_batch])
        ],
        results=[
            result.value
            for segment in segments.stages[stage]
            if segment.graph == graph_pb2.GRAPH_KIND_PREDICT
            for result in segment.results
        ],
        owned_tensors=[
            placement.spec.name
            for placement in held
            if placement.holder_stages[0] == stage and _is_state(placement.spec)
        ],
    )


def _is_state(spec: graph_pb2.TensorSpec) -> bool:
    """Whether a tensor is in the user's state dict."""
    return spec.kind == graph_pb2.TENSOR_KIND_PARAMETER or (
        spec.kind == graph_pb2.TENSOR_KIND_BUFFER and spec.persistent
    )


def _summarise(
    indexed: IndexedModel,
    segments: Segments,
    stage: int,
    ends: Sequence[int],
    micro_batches: int,
    seconds: float,
    boundaries: Boundaries,
    choices: Sequence[Choice],
) -> coordinator_pb2.StageSummary:
    segment = segments.of_graph(graph_pb2.GRAPH_KIND_TRAIN)[stage]
    choice = choices[stage] if stage < len(choices) else Choice("none")
    return coordinator_pb2.StageSummary(
        stage=stage,
        first_node=ends[stage],
        nodes=len(segment.nodes),
        first_module=segment.nodes[0].module_path,
        last_module=segment.nodes[-1].module_path,
        parameters=sum(
            math.prod(placement.spec.shape)
            for placement in _held(segments, stage)
            if placement.spec.kind == graph_pb2.TENSOR_KIND_PARAMETER
        ),
        estimated_seconds=seconds * micro_batches,
        boundary_bytes=boundaries.leaving_bytes(segment, choices) * micro_batches,
        codec=CODEC_NAMES[choice.codec],
        codec_reason=choice.reason,
    )
