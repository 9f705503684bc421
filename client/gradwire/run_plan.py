"""A plan as it will be carried out, with what is expected of it: `trainer.plan`, `cluster.plan(...)`, `gradwire plan`.

Values only, read from what the coordinator answers. Leaves to others: what a user asks for (`plan.py`), and showing it
(`cli/plan.py`, `timeline_drawing.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gradwire.planned_parts import (
    Candidate,
    PlannedLink,
    PlannedServer,
    PlannedStage,
    Predicted,
    candidate_from_proto,
    link_from_proto,
    schedule_name,
    server_from_proto,
    stage_from_proto,
)
from gradwire.planned_tensor import PlannedTensor, tensor_lines
from gradwire.timeline_drawing import TimedAction
from gradwire.units import shown_bytes, shown_seconds
from gradwire_protocol.dealing import deal
from gradwire_protocol.exchanges import parse_exchange
from gradwire_protocol.program import action_from_proto
from gradwire_protocol.v1 import coordinator_pb2 as pb


@dataclass(frozen=True, kw_only=True, repr=False)
class RunPlan:
    """How a run is laid out, and what is expected of its steps. `print` shows it in a few lines.

    cost_source: whether seconds come from profiles of the nodes ("measured") or from their shapes ("estimated").
    partition_gap: by which share other cuts could make the busiest server faster at the most; 0: it is proven that none
    do; None: the plan says where to cut.
    candidates: the fastest first. timeline: every action of a step as expected; empty where it would be too large.
    replica_shares: of a step's micro-batches, by replica. All replicas are laid out alike; what is expected of a step,
    its candidates and its timeline are of one that is nowhere faster than the slowest. compression: codec of the
    gradients that they exchange, or, with local steps, of the way that their weights have gone; compression_reason:
    why, where the plan leaves it open. shards_optimizer: whether they share the optimizer's state; zero_reason: why, or
    why not. transport: what moves the sums of shards and replicas; transport_reason: why; both empty without either.
    tensor: what the servers of a stage share; None: each stage has one.
    """

    schedule: str
    extra_warm_up: int
    micro_batches: int
    replica_shares: tuple[float, ...]
    exchange: str
    compression: str
    compression_reason: str
    shards_optimizer: bool
    zero_reason: str
    transport: str
    transport_reason: str
    tensor: PlannedTensor | None
    theoretical_bubble_ratio: float
    stages: tuple[PlannedStage, ...]
    servers: tuple[PlannedServer, ...]
    links: tuple[PlannedLink, ...]
    predicted: Predicted
    candidates: tuple[Candidate, ...]
    reason: str
    cost_source: str
    partition_gap: float | None
    timeline: tuple[TimedAction, ...]

    @classmethod
    def from_proto(cls, summary: pb.PlanSummary, timeline: Sequence[pb.ServerTimeline] = ()) -> RunPlan:
        """Return what a coordinator's answer says."""
        prediction = summary.prediction
        # Of one replica: the others are like it.
        replicas = max(1, len(summary.replica_shares))
        tensor = PlannedTensor.from_proto(summary.tensor) if summary.HasField("tensor") else None
        shards = max(1, tensor.servers) if tensor is not None else 1
        pipeline = max(1, len(prediction.servers) // (replicas * shards))
        positions = [place // shards % pipeline for place in range(len(prediction.servers))]
        server_of = {
            stage: position
            for position, server in zip(positions, prediction.servers, strict=True)
            for stage in server.stages
        }
        return cls(
            schedule=summary.schedule,
            extra_warm_up=summary.extra_warm_up,
            micro_batches=summary.micro_batches,
            replica_shares=tuple(summary.replica_shares) or (1.0,),
            exchange=summary.exchange or "ring",
            compression=summary.compression or "none",
            compression_reason=summary.compression_reason,
            shards_optimizer=summary.shards_optimizer,
            zero_reason=summary.zero_reason,
            transport=summary.transport,
            transport_reason=summary.transport_reason,
            tensor=tensor,
            theoretical_bubble_ratio=summary.theoretical_bubble_ratio,
            stages=tuple(stage_from_proto(stage, server_of.get(stage.stage, stage.stage)) for stage in summary.stages),
            servers=tuple(map(server_from_proto, positions, prediction.servers)),
            links=tuple(link_from_proto(link) for link in prediction.links),
            predicted=Predicted(
                seconds=prediction.seconds,
                bubble=prediction.bubble_ratio,
                lower_bound_seconds=prediction.lower_bound_seconds,
            ),
            candidates=tuple(candidate_from_proto(candidate) for candidate in prediction.candidates),
            reason=prediction.reason,
            cost_source=prediction.cost_source,
            partition_gap=prediction.partition_gap if prediction.HasField("partition_gap") else None,
            timeline=tuple(
                TimedAction(server, action_from_proto(timed.action), timed.start_seconds, timed.end_seconds)
                for server, row in enumerate(timeline)
                for timed in row.actions
            ),
        )

    @property
    def name(self) -> str:
        """The schedule; "1f1b+1" is one with a warm-up that is one micro-batch deeper than the textbook's."""
        return schedule_name(self.schedule, self.extra_warm_up)

    @property
    def replicas(self) -> int:
        """Copies of the pipeline."""
        return len(self.replica_shares)

    @property
    def shards(self) -> int:
        """Servers of each stage, which share it."""
        return max(1, self.tensor.servers) if self.tensor is not None else 1

    @property
    def positions(self) -> int:
        """Servers of one replica's pipeline, those that share a stage counted once."""
        return len(self.servers) // (self.replicas * self.shards) or len(self.stages)

    @property
    def servers_each(self) -> int:
        """Servers of one replica."""
        return self.positions * self.shards

    @property
    def virtual_stages(self) -> int:
        """Stages on each server."""
        return len(self.stages) // self.positions

    def micro_batches_of(self, replica: int, micro_batches: int) -> int:
        """Return how many of a step's micro-batches a replica takes."""
        return deal(micro_batches, self.replica_shares).count(replica)

    def to_record(self) -> dict[str, Any]:
        """Return everything for JSON; an action of the timeline is [server, action, start, end]."""
        record = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for part in ("stages", "servers", "links", "candidates"):
            record[part] = [dataclasses.asdict(item) for item in record[part]]
        record["tensor"] = dataclasses.asdict(self.tensor) if self.tensor is not None else None
        record["predicted"] = dataclasses.asdict(self.predicted)
        record["timeline"] = [[item.server, str(item.action), item.start, item.end] for item in self.timeline]
        return record

    def __repr__(self) -> str:
        return f"<RunPlan: {self._headline()}>"

    def __str__(self) -> str:
        lines = [self._headline()]
        for stage in self.stages:
            first, last = module_names(self, stage)
            lines.append(
                f"  stage {stage.stage} on server {stage.server}: {first} … {last}, {stage.nodes} nodes, "
                f"{stage.parameters:,} parameters; F {shown_seconds(stage.forward_seconds)}, "
                f"B {shown_seconds(stage.backward_seconds)} a micro-batch"
                + (f"; sends {shown_bytes(stage.boundary_bytes)} a step" if stage.boundary_bytes else "")
            )
        lines += [f"  {line}" for line in grid_lines(self)]
        if self.reason:
            lines.append(f"  why: {self.reason}; costs are {self.cost_source}")
        return "\n".join(lines)

    def _headline(self) -> str:
        each = f"{self.replicas} replicas of " if self.replicas > 1 else ""
        return (
            f"{self.name}, {each}{_counted(len(self.stages), 'stage')} on {_counted(self.servers_each, 'server')}, "
            f"{self.micro_batches} micro-batches, a step "
            f"of {shown_seconds(self.predicted.seconds)} with a bubble of {self.predicted.bubble:.1%} expected"
        )


def grid_lines(plan: RunPlan) -> Iterator[str]:
    """Yield what the servers of a stage do together, and replicas, and what moves what they add up."""
    yield from tensor_lines(plan.tensor)
    yield from replica_lines(plan)
    if plan.transport:
        reason = f": {plan.transport_reason}" if plan.transport_reason else ""
        yield f"transport {plan.transport}{reason}"


def replica_lines(plan: RunPlan) -> Iterator[str]:
    """Yield what replicas do, where there are several: their shares, and what they exchange."""
    if plan.replicas == 1 and not parse_exchange(plan.exchange).has_servers:
        return
    shares = ", ".join(f"{share:.1%}" for share in plan.replica_shares)
    exchange = parse_exchange(plan.exchange)
    longest = max((server.reduce_seconds for server in plan.servers), default=0.0)
    if exchange.is_local:
        each = f"they train alone, and agree every {_counted(exchange.every, 'step')}, compression {plan.compression}"
        time = f"in {shown_seconds(longest)} a step on average"
    elif exchange.has_servers:
        servers = _counted(exchange.servers, "parameter server")
        late = f", up to {_counted(exchange.staleness, 'step')} late" if exchange.staleness else ""
        each = f"{servers} update for them{late}, compression {plan.compression}"
        time = f"in {shown_seconds(longest)} a step at most"
    else:
        each = f"they exchange gradients in a ring, compression {plan.compression}"
        time = f"in {shown_seconds(longest)} a step at most"
    yield f"replicas: {plan.replicas}, which take {shares} of the micro-batches; {each}, {time}"
    if plan.compression_reason:
        yield f"why {plan.compression}: {plan.compression_reason}"
    if plan.shards_optimizer:
        yield f"they share the optimizer's state: {plan.zero_reason}"
    elif plan.zero_reason and not exchange.has_servers:
        yield f"each has the whole of the optimizer's state: {plan.zero_reason}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def module_names(plan: RunPlan, stage: PlannedStage) -> tuple[str, str]:
    """Return what a stage begins and ends in: nodes of the model's own forward, or of the loss, have no module."""
    first = stage.first_module or ("the model's inputs" if stage.stage == 0 else "the model")
    last = stage.last_module or ("the loss" if stage.stage == len(plan.stages) - 1 else "the model")
    return first, last
