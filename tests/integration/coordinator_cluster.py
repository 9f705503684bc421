"""A real coordinator on loopback, with stage servers of a few lines that answer over real gRPC but compute nothing."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from gradwire_coordinator.log import RunLog
from gradwire_coordinator.metrics import Metrics
from gradwire_coordinator.registry import Registry
from gradwire_coordinator.service import Coordinator
from gradwire_protocol.channels import open_channel
from gradwire_protocol.errors import ErrorInterceptor, GradwireError, ServerBusy, StaleGeneration, from_rpc_error
from gradwire_protocol.program import format_program, program_from_proto
from gradwire_protocol.serving import Service, ServiceSettings
from gradwire_protocol.tls_files import TlsFiles
from gradwire_protocol.v1 import (
    coordinator_pb2,
    coordinator_pb2_grpc,
    graph_pb2,
    run_pb2,
    stage_pb2,
    stage_pb2_grpc,
    tensors_pb2,
)

WINDOW_SECONDS = 0.5


class StageServer(stage_pb2_grpc.StageServiceServicer):
    """Reports every entry as done, when `go` is set; fails with `failure` at entry `fails_at` (0: Prepare)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.prepared: stage_pb2.PrepareRequest | None = None
        self.programs: list[tuple[int, str]] = []
        self.released: list[str] = []
        self.go = threading.Event()
        self.go.set()
        self.failure: GradwireError | None = None
        self.fails_at = 0
        self.delay_seconds = 0.0
        self.waits_to_prepare = False
        self.preparing = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(8), interceptors=(ErrorInterceptor(),))
        stage_pb2_grpc.add_StageServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Prepare(self, request: stage_pb2.PrepareRequest, context: Any) -> stage_pb2.PrepareReply:
        self.preparing.set()
        if self.waits_to_prepare:
            self.go.wait()
        if self.failure is not None and self.fails_at == 0:
            raise self.failure
        if self.prepared is not None:
            raise ServerBusy(f"{self.name} is held", got=self.prepared.run)
        self.prepared = request
        return stage_pb2.PrepareReply()

    def Execute(self, requests: Iterator[stage_pb2.ExecuteRequest], context: Any) -> Iterator[stage_pb2.ExecuteReply]:
        prepared = self.prepared
        if prepared is None:
            raise StaleGeneration(f"{self.name} holds no run")
        with_loss = any(segment.loss for segment in prepared.segments)
        replica = next(peer.replica for peer in prepared.peers if peer.server == self.name)
        for request in requests:
            self.programs.append((request.entry.number, format_program(program_from_proto(request.program))))
            self.go.wait()
            time.sleep(self.delay_seconds)
            if self.failure is not None and request.entry.number == self.fails_at:
                raise self.failure
            yield stage_pb2.ExecuteReply(report=_report(request.entry, with_loss, replica))

    def Release(self, request: stage_pb2.ReleaseRequest, context: Any) -> stage_pb2.ReleaseReply:
        self.prepared = None
        self.released.append(request.reason)
        return stage_pb2.ReleaseReply()

    def vanish(self) -> None:
        """Break all connections without a word."""
        self._server.stop(None)

    def close(self) -> None:
        self.go.set()
        self._server.stop(None).wait()


def _report(entry: run_pb2.Entry, with_loss: bool, replica: int) -> run_pb2.EntryReport:
    timing = run_pb2.Timing(
        window_seconds=WINDOW_SECONDS, busy_seconds={"forward": 0.4}, idle_seconds={"wait-gradient": 0.1}
    )
    report = run_pb2.EntryReport(
        entry=entry.number, generation=entry.generation, timing=timing, weight_version=entry.train_step.step
    )
    if with_loss:
        parts = entry.train_step.micro_batches or entry.evaluate.micro_batches
        # Deliberately out of order.
        for part in reversed(parts):
            if part.replica == replica:
                report.losses.add(micro_batch=part.index, sum=float(part.index + 1) * part.rows, weight=part.rows)
    return report


class Cluster:
    """A coordinator, its stub, and its stage servers."""

    def __init__(
        self, directory: Path, *, metrics: bool = False, tls: TlsFiles | None = None, **changes: float
    ) -> None:
        self.directory = directory
        self.now = [100.0]
        self.log = RunLog(directory)
        metrics_listen = "127.0.0.1:0" if metrics else ""
        self.service = Service("coordinator", ServiceSettings(metrics_listen=metrics_listen, tls=tls))
        self.registry = Registry(lease_seconds=5.0, heartbeat_seconds=1.0, clock=lambda: self.now[0])
        self.coordinator = Coordinator(
            log=self.log,
            registry=self.registry,
            metrics=Metrics(self.service.registry, "test"),
            connect=open_channel,
            version="test",
            **{"sweep_seconds": 0.05, **changes},
        )
        coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(self.coordinator, self.service.server)
        self.service.start()
        self.stages: list[StageServer] = []
        self.channel = open_channel(self.service.address)
        self.stub = coordinator_pb2_grpc.CoordinatorServiceStub(self.channel)

    def add_stages(self, count: int) -> list[StageServer]:
        for _ in range(count):
            stage = StageServer(f"stage-{len(self.stages)}")
            self.stages.append(stage)
            self.register(stage)
        return self.stages

    def register(self, stage: StageServer, address: str = "") -> coordinator_pb2.RegisterReply:
        return self.stub.Register(
            coordinator_pb2.RegisterRequest(
                server=stage.name, role=coordinator_pb2.SERVER_ROLE_STAGE, address=address or stage.address
            )
        )

    def status(self) -> coordinator_pb2.GetStatusReply:
        return self.stub.GetStatus(coordinator_pb2.GetStatusRequest())

    def close(self) -> None:
        for stage in self.stages:
            stage.go.set()
        self.coordinator.close()
        self.service.stop(0.1)
        self.channel.close()
        for stage in self.stages:
            stage.close()
        self.log.close()


@contextmanager
def cluster(directory: Path, stages: int = 0, **changes: Any) -> Iterator[Cluster]:
    with ExitStack() as stack:
        made = Cluster(directory, **changes)
        stack.callback(made.close)
        made.add_stages(stages)
        yield made


class Driver:
    """The client's side of a Drive stream."""

    def __init__(self, made: Cluster, run: coordinator_pb2.CreateRunReply) -> None:
        self._run = run
        self._queue: Any = queue.SimpleQueue()
        self.call = made.stub.Drive(iter(self._queue.get, None))
        self.number = 0
        self.step = 0

    def send(self, **changes: Any) -> int:
        """Send an entry, LoadState first; keyword arguments change it, or give its kind."""
        self.number += 1
        entry = run_pb2.Entry(**{"number": self.number, "generation": self._run.generation, **changes})
        if entry.WhichOneof("kind") is None:
            entry.load_state.SetInParent()
        self._queue.put(coordinator_pb2.DriveRequest(run=self._run.run, entry=entry))
        return entry.number

    def send_step(self, rows: tuple[int, ...] = (2, 2, 2, 2), **changes: Any) -> int:
        self.step += 1
        fields = {
            "step": self.step,
            "micro_batches": split(rows),
            "hyperparameters": run_pb2.Hyperparameters(groups=[run_pb2.OptimizerGroup()]),
            **changes,
        }
        return self.send(train_step=run_pb2.TrainStep(**fields))

    def result(self) -> run_pb2.EntryResult:
        return next(reply.result for reply in self.call if reply.HasField("result"))

    def done(self) -> None:
        self._queue.put(None)


def split(rows: tuple[int, ...], replicas: int = 1) -> list[run_pb2.MicroBatch]:
    return [
        run_pb2.MicroBatch(index=index, replica=index % replicas, first_row=sum(rows[:index]), rows=count)
        for index, count in enumerate(rows)
    ]


def run_request(stages: int, *, nodes: int = 6, **plan: Any) -> coordinator_pb2.CreateRunRequest:
    """A chain of `nodes` linear nodes with a parameter each, the first and the last of them tied."""
    spec = graph_pb2.ValueSpec(
        kind=graph_pb2.VALUE_KIND_TENSOR,
        data_type=tensors_pb2.DATA_TYPE_FLOAT32,
        shape=[graph_pb2.AffineSize(per_row=1), graph_pb2.AffineSize(fixed=4)],
    )
    parameters = [f"W{index}" for index in range(nodes - 1)]

    def graph(kind: graph_pb2.GraphKind) -> graph_pb2.Graph:
        made = graph_pb2.Graph(kind=kind, inputs=[graph_pb2.GraphInput(value="x", spec=spec, batched=True)])
        for index in range(nodes):
            made.tensors.add(value=f"w{index}", tensor=parameters[index % len(parameters)])
            before = f"n{index - 1}" if index else "x"
            made.nodes.add(
                name=f"n{index}",
                target="aten.linear.default",
                arguments=[graph_pb2.Argument(value=before), graph_pb2.Argument(value=f"w{index}")],
                output=spec,
                flops=graph_pb2.AffineSize(per_row=10**6),
            )
        made.allowed_cuts.extend(range(1, nodes))
        made.outputs.add(value=f"n{nodes - 1}")
        return made

    tensors = [
        graph_pb2.TensorSpec(
            name=name,
            names=[name],
            kind=graph_pb2.TENSOR_KIND_PARAMETER,
            requires_grad=True,
            data_type=tensors_pb2.DATA_TYPE_FLOAT32,
            shape=[4, 4],
        )
        for name in parameters
    ]
    fields = {
        "stages": stages,
        "virtual_stages": 1,
        "replicas": 1,
        "tensor": 1,
        "micro_batches": 4,
        "schedule": "1f1b",
        "window": 2,
        "expected_rows": 8,
        **plan,
    }
    return coordinator_pb2.CreateRunRequest(
        model=graph_pb2.Model(
            tensors=tensors,
            train=graph(graph_pb2.GRAPH_KIND_TRAIN),
            evaluate=graph(graph_pb2.GRAPH_KIND_EVALUATE),
            predict=graph(graph_pb2.GRAPH_KIND_PREDICT),
            loss_form=graph_pb2.LOSS_FORM_MEAN_OVER_ROWS,
        ),
        plan=run_pb2.Plan(**fields),
        optimizer=run_pb2.Optimizer(name="SGD", groups=[run_pb2.OptimizerGroup(parameters=parameters)]),
        seed=7,
        description="a test",
    )


def wait_until(condition: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.01)


def refused(call: Any, *arguments: Any) -> GradwireError:
    """Return the typed error of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments)
    return from_rpc_error(caught.value)


def create(made: Cluster, *arguments: Any, **changes: Any) -> coordinator_pb2.CreateRunReply:
    return made.stub.CreateRun(run_request(*arguments, **changes))


def driven(made: Cluster, *arguments: Any, **changes: Any) -> Driver:
    """Create a run and load its state."""
    driver = Driver(made, create(made, *arguments, **changes))
    driver.send()
    assert driver.result().entry == 1
    return driver


def run_state(made: Cluster) -> int:
    return made.status().runs[0].state


def free(made: Cluster) -> bool:
    """Whether the servers hold no run, and the coordinator would give them to another one."""
    return all(stage.prepared is None for stage in made.stages) and not any(
        server.run for server in made.registry.servers()
    )
