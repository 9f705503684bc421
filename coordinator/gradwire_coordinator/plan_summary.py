"""A planned run as it is shown to people: its schedule, and what each stage has, takes and sends.

Pure. Leaves to others: what is expected of its steps (`prediction.py`).
"""

from __future__ import annotations

import math

from gradwire_coordinator.codec_choice import Choice
from gradwire_coordinator.group_costs import exchanges_of
from gradwire_coordinator.planner import PlannedRun
from gradwire_coordinator.simulator import equal_stages_bubble
from gradwire_protocol.codecs import CODEC_NAMES
from gradwire_protocol.program import INPUT_GRADIENT, WEIGHT_GRADIENT
from gradwire_protocol.splits import whole_shape
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
        transport=planned.transport.name,
        transport_reason=planned.transport.reason,
        tensor=_tensor(planned) if planned.sharded.shards > 1 else None,
    )


def _stage(planned: PlannedRun, stage: int) -> coordinator_pb2.StageSummary:
    """Return what a stage of one replica has, all shards of it together, and what it does in a step."""
    cut, micro_batches, sharded = planned.cut, planned.micro_batches, planned.sharded
    first, end = (sharded.old_cut(position) for position in _ends(planned, stage))
    segment = cut.segments.of_graph(graph_pb2.GRAPH_KIND_TRAIN)[stage]
    choice = cut.codecs[stage] if stage < len(cut.codecs) else Choice("none")
    seconds = cut.seconds[stage]
    return coordinator_pb2.StageSummary(
        stage=stage,
        server=cut.way.placement[stage],
        first_node=first,
        nodes=end - first,
        first_module=segment.nodes[0].module_path,
        last_module=segment.nodes[-1].module_path,
        parameters=sum(
            math.prod(whole_shape(placement.spec))
            for placement in cut.segments.placements
            if stage in placement.holder_stages and placement.spec.kind == graph_pb2.TENSOR_KIND_PARAMETER
        ),
        estimated_seconds=(seconds.forward + seconds.backward) * micro_batches,
        boundary_bytes=cut.boundaries.leaving_bytes(segment, cut.codecs) * micro_batches * sharded.shards,
        codec=CODEC_NAMES[choice.codec],
        codec_reason=choice.reason,
        forward_seconds=seconds.forward,
        backward_seconds=seconds.backward,
        input_gradient_seconds=seconds.of[INPUT_GRADIENT],
        weight_gradient_seconds=seconds.of[WEIGHT_GRADIENT],
        returned_bytes=cut.boundaries.returned_bytes(segment, cut.codecs) * micro_batches * sharded.shards,
    )


def _ends(planned: PlannedRun, stage: int) -> tuple[int, int]:
    """Return where the nodes of a stage begin and end, in the train graph that is carried out."""
    ends = [0, *planned.cut.way.cuts, len(planned.sharded.indexed.train.graph.nodes)]
    return ends[stage], ends[stage + 1]


def _tensor(planned: PlannedRun) -> coordinator_pb2.TensorSummary:
    """Return how the shards of a stage work together."""
    sharded, servers = planned.sharded, planned.cut.servers
    found = exchanges_of(sharded, servers.costs[0].rows)
    backward = sum(exchange.backward for exchange in found)
    return coordinator_pb2.TensorSummary(
        servers=sharded.shards,
        parameters=[coordinator_pb2.SplitParameter(name=name, split=split) for name, split in sharded.splits.items()],
        forward_exchanges=len(found) - backward,
        backward_exchanges=backward,
        exchange_bytes=round(sum(map(servers.groups[0].sent_bytes, found))),
    )
