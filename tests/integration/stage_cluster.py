"""Stage servers in this process, on real ports, that train stage_model.py's model without a coordinator."""

from __future__ import annotations

import gc
import queue
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import grpc
import torch
from stage_model import (
    EVALUATE,
    HOLDERS,
    MEAN,
    PREDICT,
    TRAIN,
    adam,
    made_state,
    placement,
    segment,
)

from gradwire_protocol.channels import open_channel
from gradwire_protocol.delivery import FrameSender
from gradwire_protocol.errors import GradwireError, from_rpc_error
from gradwire_protocol.frames import Admission, FrameAssembler
from gradwire_protocol.program import parse_program, program_to_proto
from gradwire_protocol.serving import Service, ServiceSettings
from gradwire_protocol.torch_tensors import payload_of, tensor_from, tensor_info
from gradwire_protocol.v1 import run_pb2, stage_pb2, stage_pb2_grpc
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.device import CpuDevice, Device
from gradwire_stage.metrics import StageMetrics
from gradwire_stage.service import Limits, StageService
from gradwire_stage.shared_memory import SharedMemory

# Each run ends with a collection: without the imports it takes no time, as in a real server.
gc.freeze()


class RemoteServer:
    """A server of another process."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.channel = open_channel(address)
        self.stub = stage_pb2_grpc.StageServiceStub(self.channel)

    def call(self, method: str, request: Any, timeout: float = 5.0) -> Any:
        """Call a unary method; a failure is raised as the typed error."""
        try:
            return getattr(self.stub, method)(request, timeout=timeout)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def activity(self) -> stage_pb2.Activity:
        return self.call("GetActivity", stage_pb2.GetActivityRequest()).activity

    def stop(self) -> None:
        self.channel.close()


class StageServer(RemoteServer):
    """One server of this process: the real service behind a real port."""

    def __init__(
        self,
        name: str,
        device: Device | None = None,
        shared_memory: SharedMemory | None = None,
        checkpoint_root: Path | None = None,
        **limits: Any,
    ) -> None:
        self.service = Service(name, ServiceSettings(metrics_listen=""))
        sizes = {"memory_bytes": 2**33, "mailbox_bytes": 2**28, "outbox_bytes": 2**28, "tensor_bytes": 2**26}
        self.stage_service = StageService(
            name,
            device or CpuDevice(1),
            Limits(**{**sizes, **limits}),
            StageMetrics(self.service.registry, version="test"),
            open_channel,
            shared_memory=shared_memory,
            checkpoint_root=checkpoint_root,
        )
        self.stage_service.add_to(self.service.server)
        self.service.start()
        super().__init__(name, self.service.address)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.service.registry.get_sample_value(name, labels)

    def stop(self) -> None:
        self.stage_service.release_all("the test ends")
        super().stop()
        self.service.stop(0)


class Stream:
    """An Execute stream to one server."""

    def __init__(self, server: RemoteServer) -> None:
        self._requests: queue.SimpleQueue[stage_pb2.ExecuteRequest | None] = queue.SimpleQueue()
        self.call = server.stub.Execute(iter(self._requests.get, None))

    def submit(self, entry: run_pb2.Entry, program: str = "", run: str = "r") -> None:
        actions = program_to_proto(parse_program(program))
        self._requests.put(stage_pb2.ExecuteRequest(run=run, entry=entry, program=actions))

    def report(self) -> run_pb2.EntryReport:
        """Wait for the next report; a failure is raised as the typed error."""
        return self.replies(1)[0].report

    def replies(self, count: int) -> list[stage_pb2.ExecuteReply]:
        """Wait for so many replies, of any kind; a failure is raised as the typed error."""
        try:
            return [next(self.call) for _ in range(count)]
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def failure(self) -> GradwireError:
        """Wait for the end of a stream that fails, and return the typed error."""
        try:
            for _ in self.call:
                pass
        except grpc.RpcError as error:
            return from_rpc_error(error)
        raise AssertionError("the stream ended in good order")

    def close(self) -> None:
        self._requests.put(None)


class Connected:
    """Servers, and a coordinator's and a client's connections to them; all of it ends with the `with` block."""

    servers: Mapping[Any, RemoteServer]
    streams: Mapping[Any, Stream]
    senders: Mapping[Any, FrameSender]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sender in self.senders.values():
            sender.cancel()
        for stream in self.streams.values():
            stream.call.cancel()
        for server in self.servers.values():
            server.stop()


class Cluster(Connected):
    """Servers that host the three stages as told, and the client's and the coordinator's side of one run."""

    checksums = False
    codecs: tuple[pb.Codec, ...] = ()
    recompute = False
    # The micro-batches whose weight gradients come behind all backwards.
    split: Collection[int] = ()

    def __init__(
        self,
        layout: dict[str, list[int]],
        form: int = MEAN,
        *,
        remote: dict[str, str] | None = None,
        devices: Mapping[str, Device] = MappingProxyType({}),
        **limits: Any,
    ) -> None:
        self.layout = layout
        self.form = form
        addresses = remote or {}
        self.servers = {
            name: (
                RemoteServer(name, addresses[name])
                if name in addresses
                else StageServer(name, devices.get(name), **limits)
            )
            for name in layout
        }
        self.streams: dict[str, Stream] = {}
        self.senders: dict[str, FrameSender] = {}
        self.entry = 0

    def request(self, name: str, *, run: str = "r", generation: int = 1) -> stage_pb2.PrepareRequest:
        stages = self.layout[name]
        return stage_pb2.PrepareRequest(
            run=run,
            generation=generation,
            server=name,
            segments=[segment(stage, graph, self.form) for stage in stages for graph in (TRAIN, EVALUATE, PREDICT)],
            tensors=[placement(tensor) for tensor, holders in HOLDERS.items() if set(holders) & set(stages)],
            peers=[
                stage_pb2.Peer(server=peer, address=self.servers[peer].address, stages=hosted)
                for peer, hosted in self.layout.items()
            ],
            stages=3,
            optimizer=run_pb2.Optimizer(name="AdamW", groups=[adam(0.1)]),
            loss_form=self.form,
            seed=5,
            checksums=self.checksums,
            activation_codecs=self.codecs,
            recompute=self.recompute,
        )

    def prepare(self, **identity: Any) -> None:
        for name, server in self.servers.items():
            server.call("Prepare", self.request(name, **identity))

    def open(self) -> None:
        """Prepare all, open all streams, load the state."""
        self.prepare()
        for name, server in self.servers.items():
            self.streams[name] = Stream(server)
            self.senders[name] = FrameSender(server.channel, name, checksums=self.checksums)
        entry = self.next_entry(load_state=run_pb2.LoadState())
        for name, stages in self.layout.items():
            for tensor, value in made_state().items():
                if set(HOLDERS[tensor]) & set(stages):
                    self.send(name, entry.number, 0, tensor, value, pb.DIRECTION_STATE)
            self.streams[name].submit(entry)
        for stream in self.streams.values():
            assert stream.report().entry == 1

    def next_entry(self, **kind: Any) -> run_pb2.Entry:
        self.entry += 1
        return run_pb2.Entry(number=self.entry, generation=1, **kind)

    def send(
        self,
        server: str,
        entry: int,
        micro_batch: int,
        value: str,
        tensor: torch.Tensor,
        direction: int,
        state: str = "",
    ) -> None:
        header = pb.TensorHeader(
            key=pb.MessageKey(
                run="r",
                generation=1,
                entry=entry,
                micro_batch=micro_batch,
                value=value,
                direction=direction,
                state=state,
            ),
            tensor=tensor_info(tensor),
        )
        self.senders[server].send(header, payload_of(tensor))

    def send_batch(self, entry: int, x: torch.Tensor, y: torch.Tensor | None, parts: int) -> list[run_pb2.MicroBatch]:
        """Send the rows of a batch to the stages that read them; return the micro-batches."""
        first, micro_batches = 0, []
        for index, rows in enumerate(x.tensor_split(parts)):
            self.send(self.host(0), entry, index, "x", rows, pb.DIRECTION_BATCH)
            micro_batches.append(run_pb2.MicroBatch(index=index, first_row=first, rows=len(rows)))
            first += len(rows)
        for index, rows in enumerate(() if y is None else y.tensor_split(parts)):
            self.send(self.host(2), entry, index, "y", rows, pb.DIRECTION_BATCH)
        return micro_batches

    def host(self, stage: int) -> str:
        return next(name for name, stages in self.layout.items() if stage in stages)

    def submit_step(self, x: torch.Tensor, y: torch.Tensor, parts: int, *, rate: float = 0.1, **options: Any) -> int:
        """Send a training step's entry and batch to all; return the entry's number."""
        entry = self.next_entry(train_step=run_pb2.TrainStep(step=self.entry, **options))
        step = entry.train_step
        step.hyperparameters.groups.append(adam(rate))
        step.micro_batches.extend(self.send_batch(entry.number, x, y, parts))
        norm = "NORM " if step.HasField("max_gradient_norm") else ""
        for name, stages in self.layout.items():
            forward = [f"{stage}F{part}" for stage in stages for part in range(parts)]
            backward = [
                f"{stage}{'I' if part in self.split else 'B'}{part}"
                for stage in reversed(stages)
                for part in range(parts)
            ]
            weight = [f"{stage}W{part}" for stage in reversed(stages) for part in range(parts) if part in self.split]
            self.streams[name].submit(entry, " ".join([*forward, *backward, *weight]) + f" REDUCE {norm}UPDATE")
        return entry.number

    def submit_forward(self, kind: str, x: torch.Tensor, y: torch.Tensor | None, parts: int) -> int:
        message = {"evaluate": run_pb2.Evaluate, "predict": run_pb2.Predict}[kind]()
        entry = self.next_entry(**{kind: message})
        getattr(entry, kind).micro_batches.extend(self.send_batch(entry.number, x, y, parts))
        for name, stages in self.layout.items():
            self.streams[name].submit(entry, " ".join(f"{stage}F{part}" for stage in stages for part in range(parts)))
        return entry.number

    def load(self, saved: Mapping[tuple[str, str], torch.Tensor], *, weight_version: int) -> None:
        """Submit a LoadState of what was collected, by (tensor, state); what was not is as it was at first."""
        items = [run_pb2.OptimizerStateName(parameter=name, state=state) for name, state in saved if state]
        load = run_pb2.LoadState(optimizer_state=items, weight_version=weight_version)
        entry = self.next_entry(load_state=load)
        values = {(name, ""): value for name, value in made_state().items()} | dict(saved)
        for server, stages in self.layout.items():
            for (name, state), value in values.items():
                if set(HOLDERS[name]) & set(stages):
                    self.send(server, entry.number, 0, name, value, pb.DIRECTION_STATE, state)
            self.streams[server].submit(entry)

    def submit_fetch(self, *, optimizer_state: bool = False) -> int:
        entry = self.next_entry(fetch_state=run_pb2.FetchState(optimizer_state=optimizer_state))
        for stream in self.streams.values():
            stream.submit(entry)
        return entry.number

    def reports(self) -> dict[str, run_pb2.EntryReport]:
        return {name: stream.report() for name, stream in self.streams.items()}

    def loss(self, reports: dict[str, run_pb2.EntryReport]) -> float:
        parts = reports[self.host(2)].losses
        return sum(part.sum for part in parts) / sum(part.weight for part in parts)

    def collect(
        self, entry: int, servers: Collection[str] | None = None
    ) -> Iterator[tuple[pb.MessageKey, torch.Tensor | None]]:
        """Yield what all servers, or some, have for the client under an entry, server by server."""
        for server in (self.servers[name] for name in servers or self.servers):
            call = server.channel.unary_stream(
                "/gradwire_protocol.v1.StageService/Collect",
                request_serializer=stage_pb2.CollectRequest.SerializeToString,
                response_deserializer=None,
            )
            wanted = Admission.KEEP_CHECKED if self.checksums else Admission.KEEP
            assembler = FrameAssembler(admit=lambda *_, wanted=wanted: wanted)
            for frame in call(stage_pb2.CollectRequest(run="r", generation=1, entry=entry), timeout=5):
                message = assembler.feed(frame)
                if message is not None:
                    absent = message.header.WhichOneof("value") == "absent"
                    yield message.header.key, None if absent else tensor_from(message)
            assembler.finish()

    def state(self) -> dict[str, torch.Tensor]:
        number_of_entry = self.submit_fetch()
        self.reports()
        return {key.value: tensor for key, tensor in self.collect(number_of_entry) if tensor is not None}


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for something that happens on another thread; an AssertionError if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()
