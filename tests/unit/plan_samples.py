"""A plan as a coordinator answers it: two servers, two micro-batches, the second server with an order made for it."""

from __future__ import annotations

from gradwire_protocol.program import action_to_proto, parse_action
from gradwire_protocol.v1 import coordinator_pb2 as pb
from gradwire_protocol.v1 import tensors_pb2

MIB = 2**20


def summary() -> pb.PlanSummary:
    return pb.PlanSummary(
        schedule="auto",
        micro_batches=2,
        theoretical_bubble_ratio=1 / 3,
        stages=[
            pb.StageSummary(
                stage=0,
                nodes=40,
                last_module="blocks.1",
                parameters=1_234_567,
                forward_seconds=0.02,
                backward_seconds=0.04,
                input_gradient_seconds=0.02,
                weight_gradient_seconds=0.02,
                boundary_bytes=MIB,
                codec=tensors_pb2.CODEC_BF16,
            ),
            pb.StageSummary(
                stage=1,
                first_node=40,
                nodes=30,
                first_module="blocks.2",
                parameters=1000,
                forward_seconds=0.02,
                backward_seconds=0.04,
                input_gradient_seconds=0.02,
                weight_gradient_seconds=0.02,
                returned_bytes=MIB,
                codec=tensors_pb2.CODEC_NONE,
            ),
        ],
        prediction=pb.Prediction(
            seconds=0.18,
            bubble_ratio=0.3,
            lower_bound_seconds=0.18,
            servers=[
                pb.ServerPrediction(
                    server=f"stage-{position}",
                    device=pb.DeviceInfo(kind="cpu", threads=1 + position, memory_bytes=position * 2**30),
                    stages=[position],
                    busy_seconds=0.126,
                    weight_bytes=4 * MIB,
                    gradient_bytes=4 * MIB,
                    optimizer_bytes=8 * MIB,
                    activation_bytes=5 * MIB,
                )
                for position in range(2)
            ],
            links=[
                pb.LinkPrediction(
                    stage=0,
                    forward_bytes_per_second=1.25e8,
                    backward_bytes_per_second=1.25e7,
                    round_trip_seconds=0.002,
                    measured=True,
                )
            ],
            candidates=[
                pb.PlanCandidate(
                    schedule="auto",
                    virtual_stages=1,
                    placement=[0, 1],
                    seconds=0.18,
                    bubble_ratio=0.3,
                    peak_bytes=[21 * MIB, 20 * MIB],
                    traffic_bytes=2 * MIB,
                    fits=True,
                    chosen=True,
                    split_backwards=1,
                ),
                pb.PlanCandidate(
                    schedule="1f1b",
                    extra_warm_up=1,
                    virtual_stages=1,
                    placement=[0, 1],
                    seconds=0.198,
                    bubble_ratio=0.4,
                    peak_bytes=[30 * MIB, 20 * MIB],
                    traffic_bytes=2 * MIB,
                ),
            ],
            reason="an order made for these costs takes 180 ms",
            cost_source="measured",
            partition_gap=0.0,
        ),
    )


def timeline() -> list[pb.ServerTimeline]:
    rows = [
        "0F0@0-0.02 0F1@0.02-0.04 0B0@0.08-0.12 0B1@0.14-0.18",
        "1F0@0.02-0.04 1B0@0.04-0.08 1F1@0.08-0.1 1I1@0.1-0.12 1W1@0.12-0.14",
    ]
    return [
        pb.ServerTimeline(
            actions=[
                pb.TimedAction(
                    action=action_to_proto(parse_action(word.split("@")[0])),
                    start_seconds=float(word.split("@")[1].split("-")[0]),
                    end_seconds=float(word.split("@")[1].split("-")[1]),
                )
                for word in row.split()
            ]
        )
        for row in rows
    ]


def replicated_summary() -> pb.PlanSummary:
    """The same plan, on two replicas of these servers, whose gradients take 5 ms to exchange."""
    made = summary()
    made.micro_batches = 4
    made.replica_shares[:] = [0.75, 0.25]
    made.compression = "int8"
    for server in list(made.prediction.servers):
        server.reduce_seconds = 0.005
        other = made.prediction.servers.add()
        other.CopyFrom(server)
        other.server, other.replica = f"{server.server}-of-1", 1
    return made


def sharded_summary(base: pb.PlanSummary | None = None) -> pb.PlanSummary:
    """The same plan, or another, with two servers for each one of it, which share its stages."""
    made = pb.PlanSummary()
    made.CopyFrom(base or summary())
    servers = list(made.prediction.servers)
    del made.prediction.servers[:]
    for server in servers:
        for shard in range(2):
            made.prediction.servers.add().CopyFrom(server)
            made.prediction.servers[-1].server = f"{server.server}-{'ab'[shard]}"
            made.prediction.servers[-1].shard = shard
    made.tensor.CopyFrom(
        pb.TensorSummary(
            servers=2,
            parameters=[
                pb.SplitParameter(name=f"blocks.{layer}.{name}.weight", split=split)
                for layer in range(3)
                for name, split in (("mlp.0", "column"), ("mlp.2", "row"))
            ],
            forward_exchanges=3,
            backward_exchanges=4,
            exchange_bytes=3 * MIB,
        )
    )
    made.transport, made.transport_reason = "gloo", "no server has a GPU"
    return made
