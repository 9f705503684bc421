"""Ways to add up gradients over processes, each behind the same few calls: what allreduce.py compares.

A way is one process's part in it. Gradwire's is a stage server for each codec, with a run prepared whose replicas are
the processes; the calling thread is its compute thread. From the gradients that a backward leaves to sums, all
inclusive. gloo's adds up one flat tensor where it lies, the best that it can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from gradwire_protocol.program import REDUCE, Action
from gradwire_protocol.serving import ServiceSettings
from gradwire_protocol.v1 import graph_pb2, run_pb2, stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.metrics import RECEIVED
from gradwire_stage.timeline import HostClock, Timeline
from stage_services import BenchmarkServer

GRADWIRE, MEMORY, GLOO = "gradwire", "gradwire-memory", "gloo"
WAYS = (GRADWIRE, MEMORY, GLOO)

_RUN = "benchmark"
# A parameter: a matrix of 1 MiB in float32.
_SIDE = 512
PARAMETER_BYTES = 4 * _SIDE * _SIDE


class Member(Protocol):
    """One process of a way. `addresses`: of this one, by codec, for all members."""

    addresses: dict[str, str]

    def connect(self, addresses: Sequence[dict[str, str]]) -> None:
        """Take the addresses of all members, by rank."""

    def prepare(self, size_bytes: int) -> None:
        """Make gradients of so many bytes, a multiple of PARAMETER_BYTES, in float32."""

    def all_reduce(self, codec: str) -> None:
        """Add them up over the members."""

    def received_bytes(self, codec: str) -> float | None:
        """Return the payload that has come to this member since it was prepared; None if that is not counted."""


# --- Gradwire: a stage server for each codec


class GradwireMember:
    def __init__(self, rank: int, codecs: Sequence[str], listen: str, *, memory: bool) -> None:
        self._replicas = {codec: _Replica(rank, codec, listen, memory=memory) for codec in codecs}
        self.addresses = {codec: replica.address for codec, replica in self._replicas.items()}

    def connect(self, addresses: Sequence[dict[str, str]]) -> None:
        for codec, replica in self._replicas.items():
            replica.peers = [found[codec] for found in addresses]

    def prepare(self, size_bytes: int) -> None:
        for replica in self._replicas.values():
            replica.prepare(size_bytes // PARAMETER_BYTES)

    def all_reduce(self, codec: str) -> None:
        self._replicas[codec].all_reduce()

    def received_bytes(self, codec: str) -> float:
        return self._replicas[codec].received_bytes()


class _Replica:
    """A stage server that hosts the only stage of a replica."""

    def __init__(self, rank: int, codec: str, listen: str, *, memory: bool) -> None:
        self._rank = rank
        self._codec = codec
        self._server = BenchmarkServer(
            _server(rank), ServiceSettings(listen=listen, metrics_listen="", insecure=True), memory=memory
        )
        self.address = self._server.address
        self.peers: Sequence[str] = ()
        self._generation = 0
        self._entry = 0
        self._gradients: list[torch.Tensor] = []
        self._run: Any = None

    def prepare(self, parameters: int) -> None:
        self._generation += 1
        self._entry = 0
        self._run = self._server.prepare(self._request(parameters))
        generator = torch.Generator().manual_seed(self._rank)
        self._gradients = [1e-3 * torch.randn(_SIDE, _SIDE, generator=generator) for _ in range(parameters)]

    def all_reduce(self) -> None:
        run = self._run
        self._entry += 1
        run.mailbox.begin(self._entry, training=True)
        for parameter, gradient in zip(run.parameters.values(), self._gradients, strict=True):
            parameter.grad = gradient
        micro_batches = [run_pb2.MicroBatch(index=rank, replica=rank, rows=1) for rank in range(len(self.peers))]
        step = run_pb2.TrainStep(step=self._entry, micro_batches=micro_batches)
        run.agreement.begin(Timeline(HostClock()), self._entry, step, [Action(0, REDUCE, 0)])
        run.agreement.reduce()
        run.mailbox.finish(self._entry)
        for parameter in run.parameters.values():
            parameter.grad = None

    def received_bytes(self) -> float:
        return sum(
            sample.value
            for metric in self._server.metrics.transferred.collect()
            for sample in metric.samples
            if sample.name.endswith("_total") and sample.labels["direction"] == RECEIVED
        )

    def _request(self, parameters: int) -> stage_pb2.PrepareRequest:
        """Describe a stage that takes the hyperbolic tangent of what it gets, and has parameters beside it."""
        names = [f"parameter{number}" for number in range(parameters)]
        segment = stage_pb2.Segment(
            graph=graph_pb2.GRAPH_KIND_TRAIN,
            nodes=[graph_pb2.Node(name="loss", target="aten.tanh.default", arguments=[graph_pb2.Argument(value="x")])],
            tensors=[graph_pb2.TensorUse(value=name, tensor=name) for name in names],
            incoming=[stage_pb2.IncomingValue(value="x", from_batch=True)],
            loss="loss",
        )
        specs = [
            graph_pb2.TensorSpec(
                name=name,
                names=[name],
                kind=graph_pb2.TENSOR_KIND_PARAMETER,
                requires_grad=True,
                data_type=pb.DATA_TYPE_FLOAT32,
                shape=[_SIDE, _SIDE],
            )
            for name in names
        ]
        return stage_pb2.PrepareRequest(
            run=_RUN,
            generation=self._generation,
            server=_server(self._rank),
            segments=[segment],
            tensors=[stage_pb2.TensorPlacement(spec=spec, holder_stages=[0]) for spec in specs],
            peers=[
                stage_pb2.Peer(server=_server(rank), address=address, stages=[0], replica=rank)
                for rank, address in enumerate(self.peers)
            ],
            stages=1,
            optimizer=run_pb2.Optimizer(name="SGD"),
            loss_form=graph_pb2.LOSS_FORM_MEAN_OVER_ROWS,
            compression=self._codec,
            transport="grpc",
        )


def _server(rank: int) -> str:
    return f"replica{rank}"


# --- torch.distributed


class GlooMember:
    def __init__(self, rank: int, members: int, rendezvous: str) -> None:
        self.addresses: dict[str, str] = {}
        self._rank = rank
        self._members = members
        self._rendezvous = rendezvous
        self._flat = torch.empty(0)

    def connect(self, addresses: Sequence[dict[str, str]]) -> None:
        dist.init_process_group("gloo", init_method=self._rendezvous, rank=self._rank, world_size=self._members)

    def prepare(self, size_bytes: int) -> None:
        # Sums of sums would soon be infinite.
        self._flat = torch.zeros(size_bytes // 4)

    def all_reduce(self, codec: str) -> None:
        dist.all_reduce(self._flat)

    def received_bytes(self, codec: str) -> None:
        return None


def make_member(way: str, rank: int, members: int, *, codecs: Sequence[str], rendezvous: str, listen: str) -> Member:
    """Return a process's part in a way. rendezvous: where gloo's processes find each other."""
    if way == GLOO:
        return GlooMember(rank, members, rendezvous)
    return GradwireMember(rank, codecs, listen, memory=way == MEMORY)
