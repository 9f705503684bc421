"""A planned run as it is shown to people: its schedule, and what each stage has, takes and sends.

Pure. Leaves to others: what is expected of its steps (`prediction.py`).
"""

from __future__ import annotations

import math

from gradwire_coordinator.codec_choice import Choice
from gradwire_coordinator.planner import PlannedRun
from gradwire_coordinator.simulator import equal_stages_bubble
from gradwire_protocol.codecs import CODEC_NAMES
from gradwire_protocol.program import INPUT_GRADIENT, WEIGHT_GRADIENT
from gradwire_protocol.v1 import coordinator_pb2, graph_pb2, run_pb2


def summarise(plan: run_pb2.Plan, planned: PlannedRun) -> coordinator_pb2.PlanSummary:
    """Return the summary of a plan that was asked for, and of what became of it."""
    schedule = planned.schedule
    sharing = planned.cut.sharing
    return coordinator_pb2.PlanSummary(
        schedule=schedule.name,
        extra_warm_up=schedule.extra_warm_up,
        micro_batches=plan.micro_batches,
        virtual_stages=schedule.virtual_stages,
        theoretical_bubble_ratio=equal_stages_bubble(
            schedule.programs(-(-plan.micro_batches // plan.replicas)), schedule.placement
        ),
        stages=[_stage(planned, stage) for stage in range(len(schedule.placement))],
        replica_shares=planned.shares,
        compression=str(sharing.codec),
        compression_reason=sharing.codec_reason,
        exchange=str(sharing.exchange),
        shards_optimizer=sharing.shards_optimizer,
        zero_reason=sharing.reason,
        prediction=planned.prediction,
    )


def _stage(planned: PlannedRun, stage: int) -> coordinator_pb2.StageSummary:
    """Return what a stage of one replica has, and what it does in a step."""
    cut, micro_batches = planned.cut, planned.micro_batches
    segment = cut.segments.of_graph(graph_pb2.GRAPH_KIND_TRAIN)[stage]
    choice = cut.codecs[stage] if stage < len(cut.codecs) else Choice("none")
    seconds = cut.seconds[stage]
    return coordinator_pb2.StageSummary(
        stage=stage,
        server=cut.way.placement[stage],
        first_node=cut.way.cuts[stage - 1] if stage else 0,
        nodes=len(segment.nodes),
        first_module=segment.nodes[0].module_path,
        last_module=segment.nodes[-1].module_path,
        parameters=sum(
            math.prod(placement.spec.shape)
            for placement in cut.segments.placements
            if stage in placement.holder_stages and placement.spec.kind == graph_pb2.TENSOR_KIND_PARAMETER
        ),
        estimated_seconds=(seconds.forward + seconds.backward) * micro_batches,
        boundary_bytes=cut.boundaries.leaving_bytes(segment, cut.codecs) * micro_batches,
        codec=CODEC_NAMES[choice.codec],
        codec_reason=choice.reason,
        forward_seconds=seconds.forward,
        backward_seconds=seconds.backward,
        input_gradient_seconds=seconds.of[INPUT_GRADIENT],
        weight_gradient_seconds=seconds.of[WEIGHT_GRADIENT],
        returned_bytes=cut.boundaries.returned_bytes(segment, cut.codecs) * micro_batches,
    )
