"""What a plan consists of, as it will be carried out: stages, servers, links, and the schedules that were considered.

Values only, each read from what the coordinator answers. Leaves the plan as a whole to `run_plan.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradwire_protocol.codecs import NAME_OF_CODEC
from gradwire_protocol.v1 import coordinator_pb2 as pb


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One stage of the pipeline, of each replica, and what it is expected to take.

    server: position of its server. first_node, nodes: of the training graph. parameters: elements that it holds.
    forward_seconds, …: of one micro-batch; the backward is in two parts under some schedules. boundary_bytes,
    returned_bytes: values and gradients that leave it in one step, as encoded. codec: of what the next stage reads.
    """

    stage: int
    server: int
    first_node: int
    nodes: int
    first_module: str
    last_module: str
    parameters: int
    estimated_seconds: float
    forward_seconds: float
    backward_seconds: float
    input_gradient_seconds: float
    weight_gradient_seconds: float
    boundary_bytes: int
    returned_bytes: int
    codec: str
    codec_reason: str


@dataclass(frozen=True, kw_only=True)
class PlannedServer:
    """A server of the plan: what it does in a step, and what it holds at the peak, in bytes.

    position: in the pipeline of its replica. shard: among the servers that share its stages. reduce_seconds: exchanging
    gradients with other replicas, and adding up those of tied parameters.
    """

    position: int
    replica: int
    shard: int
    server: str
    device: str
    # Of the device; 0: not known.
    memory_bytes: int
    stages: tuple[int, ...]
    busy_seconds: float
    reduce_seconds: float
    update_seconds: float
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


@dataclass(frozen=True, kw_only=True)
class PlannedLink:
    """The link that a boundary goes over, from a stage to the next; `reason`: why it is assumed, where it is."""

    stage: int
    forward_bytes_per_second: float
    backward_bytes_per_second: float
    round_trip_seconds: float
    measured: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A schedule that was considered, with what a step of it is expected to take.

    placement: the position of each stage's server. peak_bytes: by server. traffic_bytes: between servers in a step.
    fits: whether every server has the memory. split_backwards: how many are in two parts.
    """

    schedule: str
    extra_warm_up: int
    virtual_stages: int
    placement: tuple[int, ...]
    seconds: float
    bubble: float
    peak_bytes: tuple[int, ...]
    traffic_bytes: int
    fits: bool
    chosen: bool
    split_backwards: int

    @property
    def name(self) -> str:
        """The schedule; "1f1b+1" is one with a warm-up that is one micro-batch deeper than the textbook's."""
        return schedule_name(self.schedule, self.extra_warm_up)


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What a step is expected to take, by simulation.

    bubble: share of it in which servers have nothing to do, on average. lower_bound_seconds: no order of the same
    actions on the same servers is faster.
    """

    seconds: float
    bubble: float
    lower_bound_seconds: float


def schedule_name(schedule: str, extra_warm_up: int) -> str:
    return f"{schedule}+{extra_warm_up}" if extra_warm_up else schedule


def stage_from_proto(stage: pb.StageSummary, server: int) -> PlannedStage:
    return PlannedStage(
        stage=stage.stage,
        server=server,
        first_node=stage.first_node,
        nodes=stage.nodes,
        first_module=stage.first_module,
        last_module=stage.last_module,
        parameters=stage.parameters,
        estimated_seconds=stage.estimated_seconds,
        forward_seconds=stage.forward_seconds,
        backward_seconds=stage.backward_seconds,
        input_gradient_seconds=stage.input_gradient_seconds,
        weight_gradient_seconds=stage.weight_gradient_seconds,
        boundary_bytes=stage.boundary_bytes,
        returned_bytes=stage.returned_bytes,
        codec=NAME_OF_CODEC.get(stage.codec, "none"),
        codec_reason=stage.codec_reason,
    )


def server_from_proto(position: int, server: pb.ServerPrediction) -> PlannedServer:
    threads = server.device.threads
    return PlannedServer(
        position=position,
        replica=server.replica,
        shard=server.shard,
        server=server.server,
        device=f"{server.device.kind}, {threads} thread{'s' * (threads != 1)}" if threads else server.device.kind,
        memory_bytes=server.device.memory_bytes,
        stages=tuple(server.stages),
        busy_seconds=server.busy_seconds,
        reduce_seconds=server.reduce_seconds,
        update_seconds=server.update_seconds,
        weight_bytes=server.weight_bytes,
        gradient_bytes=server.gradient_bytes,
        optimizer_bytes=server.optimizer_bytes,
        activation_bytes=server.activation_bytes,
    )


def link_from_proto(link: pb.LinkPrediction) -> PlannedLink:
    return PlannedLink(
        stage=link.stage,
        forward_bytes_per_second=link.forward_bytes_per_second,
        backward_bytes_per_second=link.backward_bytes_per_second,
        round_trip_seconds=link.round_trip_seconds,
        measured=link.measured,
        reason=link.reason,
    )


def candidate_from_proto(candidate: pb.PlanCandidate) -> Candidate:
    return Candidate(
        schedule=candidate.schedule,
        extra_warm_up=candidate.extra_warm_up,
        virtual_stages=candidate.virtual_stages,
        placement=tuple(candidate.placement),
        seconds=candidate.seconds,
        bubble=candidate.bubble_ratio,
        peak_bytes=tuple(candidate.peak_bytes),
        traffic_bytes=candidate.traffic_bytes,
        fits=candidate.fits,
        chosen=candidate.chosen,
        split_backwards=candidate.split_backwards,
    )
