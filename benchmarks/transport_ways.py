"""Ways to bring a tensor from one process to another, each behind the same few calls: what transport.py compares."""

from __future__ import annotations

import queue
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator
from concurrent import futures
from typing import Any, Protocol

import grpc
import numpy as np
import torch
import torch.distributed as dist

from gradwire_protocol.channels import CHANNEL_OPTIONS, SERVER_OPTIONS, bind
from gradwire_protocol.frames import CHUNK_BYTES
from gradwire_protocol.serving import ServiceSettings
from gradwire_protocol.tls_files import TlsFiles
from gradwire_protocol.torch_tensors import payload_of, tensor_info
from gradwire_protocol.v1 import graph_pb2, run_pb2, stage_pb2, stage_pb2_grpc
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.keys import Key
from stage_services import BenchmarkServer

GRADWIRE, MEMORY = "gradwire", "gradwire-memory"
GENERATED, GENERATED_WHOLE = "generated", "generated-whole"
BYTES = "grpc-bytes"
GLOO, TCP = "gloo", "tcp"
WAYS = (GRADWIRE, MEMORY, BYTES, GENERATED, GENERATED_WHOLE, GLOO, TCP)
CAN_ENCRYPT = (GRADWIRE, GENERATED, TCP)

_RUN, _STAGE_SERVERS = "benchmark", ("sender", "receiver")


class Receiver(Protocol):
    """The side that gets tensors. `address` is for the sender."""

    address: str

    def receive(self, size: int) -> torch.Tensor:
        """Return the next tensor, of so many bytes, when it is whole."""


class Sender(Protocol):
    """The side that gives them."""

    def send(self, tensor: torch.Tensor) -> None:
        """Send a tensor; may return before it has arrived. Nobody writes to it."""


# --- Gradwire: two stage servers with a run that was prepared in both, on either side of its mailbox


def _prepared(name: str, addresses: dict[str, str], server: BenchmarkServer) -> Any:
    """Prepare a run of two stages whose only boundary value is `h`; return its state."""
    stage = _STAGE_SERVERS.index(name)
    node = graph_pb2.Node(
        name=("h", "loss")[stage],
        target="aten.tanh.default",
        arguments=[graph_pb2.Argument(value=("x", "h")[stage])],
    )
    segment = stage_pb2.Segment(stage=stage, graph=graph_pb2.GRAPH_KIND_TRAIN, nodes=[node])
    if stage == 0:
        segment.incoming.add(value="x", from_batch=True)
        segment.outgoing.add(value="h", consumer_stages=[1])
    else:
        segment.incoming.add(value="h", producer_stage=0, gradient_to_stage=0)
        segment.loss = "loss"
    request = stage_pb2.PrepareRequest(
        run=_RUN,
        generation=1,
        server=name,
        segments=[segment],
        peers=[
            stage_pb2.Peer(server=server, address=addresses[server], stages=[number])
            for number, server in enumerate(_STAGE_SERVERS)
        ],
        stages=2,
        optimizer=run_pb2.Optimizer(name="SGD"),
        loss_form=graph_pb2.LOSS_FORM_MEAN_OVER_ROWS,
    )
    return server.prepare(request)


def _stage_server(name: str, tls: TlsFiles | None, *, memory: bool) -> BenchmarkServer:
    return BenchmarkServer(name, ServiceSettings(metrics_listen="", tls=tls), memory=memory)


class GradwireReceiver:
    def __init__(self, tls: TlsFiles | None, *, memory: bool = False) -> None:
        self._server = _stage_server("receiver", tls, memory=memory)
        self.address = self._server.address
        self._run = _prepared("receiver", {"sender": "127.0.0.1:1", "receiver": self.address}, self._server)
        self._received = 0

    def receive(self, size: int) -> torch.Tensor:
        # What the compute thread does for each forward.
        mailbox, index = self._run.mailbox, self._received
        self._received += 1
        mailbox.begin(1, index)
        arrived, _ = mailbox.take(Key(1, index, "h", pb.DIRECTION_FORWARD, 0))
        tensor: torch.Tensor = self._run.device.claim(arrived)
        return tensor


class GradwireSender:
    def __init__(self, address: str, tls: TlsFiles | None, *, memory: bool = False) -> None:
        self._server = _stage_server("sender", tls, memory=memory)
        self._run = _prepared("sender", {"sender": self._server.address, "receiver": address}, self._server)
        self._sent = 0

    def send(self, tensor: torch.Tensor) -> None:
        key = Key(1, self._sent, "h", pb.DIRECTION_FORWARD, 0)
        self._sent += 1
        self._run.peers.send(("receiver",), key, tensor)


# --- gRPC with the generated classes, as it is usually written


class _Assembling(stage_pb2_grpc.StageServiceServicer):
    def __init__(self) -> None:
        self.whole: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()

    def Deliver(self, requests: Iterator[pb.TensorFrame], context: Any) -> Iterator[pb.Receipt]:  # noqa: N802
        buffer, received = np.empty(0, np.uint8), 0
        for frame in requests:
            if frame.HasField("header"):
                buffer, received = np.empty(frame.header.tensor.size_bytes, np.uint8), 0
            data = frame.chunk.data
            buffer[received : received + len(data)] = np.frombuffer(data, np.uint8)
            received += len(data)
            if received == buffer.nbytes:
                self.whole.put(torch.from_numpy(buffer).view(torch.float32))
                yield pb.Receipt(sequence=1)


def _with(options: Iterable[tuple[str, Any]], name: str, value: Any) -> list[tuple[str, Any]]:
    """Return options with one of them replaced: of two with one name, gRPC takes the first."""
    return list((dict(options) | {name: value}).items())


class GeneratedReceiver:
    def __init__(self, tls: TlsFiles | None) -> None:
        self._servicer = _Assembling()
        options = _with(SERVER_OPTIONS, "grpc.max_receive_message_length", 2**30)
        self._server = grpc.server(futures.ThreadPoolExecutor(4), options=options)
        add = stage_pb2_grpc.add_StageServiceServicer_to_server
        add(self._servicer, self._server)  # type: ignore[no-untyped-call]
        self.address = bind(self._server, "127.0.0.1:0", tls)
        self._server.start()

    def receive(self, size: int) -> torch.Tensor:
        return self._servicer.whole.get()


class GeneratedSender:
    def __init__(self, address: str, tls: TlsFiles | None, *, whole: bool) -> None:
        self._chunk = 2**30 if whole else CHUNK_BYTES
        self._queue: queue.Queue[torch.Tensor] = queue.Queue(4)
        options = _with(CHANNEL_OPTIONS, "grpc.max_send_message_length", 2**30)
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            authority, certificate, key = tls.read()
            self._channel = grpc.secure_channel(
                address, grpc.ssl_channel_credentials(authority, key, certificate), options=options
            )
        stub = stage_pb2_grpc.StageServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._receipts = stub.Deliver(self._frames(), wait_for_ready=True)
        threading.Thread(target=lambda: list(self._receipts), daemon=True).start()

    def send(self, tensor: torch.Tensor) -> None:
        self._queue.put(tensor)

    def _frames(self) -> Iterator[pb.TensorFrame]:
        key = pb.MessageKey(run=_RUN, generation=1, entry=1, value="h", direction=pb.DIRECTION_FORWARD)
        while True:
            tensor = self._queue.get()
            data = payload_of(tensor)
            for offset in range(0, data.nbytes, self._chunk):
                chunk = pb.TensorChunk(offset=offset, data=bytes(data[offset : offset + self._chunk]))
                if offset:
                    yield pb.TensorFrame(chunk=chunk)
                else:
                    yield pb.TensorFrame(header=pb.TensorHeader(key=key, tensor=tensor_info(tensor)), chunk=chunk)


# --- gRPC with nothing around it: bytes that are made beforehand, and that nobody reads or puts together


_CARRY = "/gradwire_benchmark.Bytes/Carry"


class BytesReceiver:
    def __init__(self) -> None:
        self._came: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._server = grpc.server(futures.ThreadPoolExecutor(4), options=SERVER_OPTIONS)
        handler = grpc.stream_unary_rpc_method_handler(self._carry)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("gradwire_benchmark.Bytes", {"Carry": handler}),)
        )
        self.address = bind(self._server, "127.0.0.1:0")
        self._server.start()

    def receive(self, size: int) -> torch.Tensor:
        while size > 0:
            size -= self._came.get()
        return torch.empty(0)

    def _carry(self, requests: Iterator[bytes], context: Any) -> bytes:
        for data in requests:
            self._came.put(len(data))
        return b""


class BytesSender:
    def __init__(self, address: str) -> None:
        self._queue: queue.Queue[int] = queue.Queue(4)
        self._chunks: dict[int, bytes] = {}
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        call = self._channel.stream_unary(_CARRY)
        threading.Thread(target=lambda: call(self._frames(), wait_for_ready=True), daemon=True).start()

    def send(self, tensor: torch.Tensor) -> None:
        self._queue.put(tensor.nbytes)

    def _frames(self) -> Iterator[bytes]:
        while True:
            left = self._queue.get()
            while left:
                size = min(left, CHUNK_BYTES)
                yield self._chunks.setdefault(size, bytes(size))
                left -= size


# --- torch.distributed, and a bare socket: into one buffer that is kept, the best that they can do


def _buffer(kept: dict[int, torch.Tensor], size: int) -> torch.Tensor:
    if size not in kept:
        kept[size] = torch.empty(size // 4)
    return kept[size]


def _join_group(rank: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)


class GlooReceiver:
    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.address = str(port)
        self._kept: dict[int, torch.Tensor] = {}
        # It waits for the sender, which does not know the address yet.
        self._joining = threading.Thread(target=_join_group, args=(0, port))
        self._joining.start()

    def receive(self, size: int) -> torch.Tensor:
        self._joining.join()
        buffer = _buffer(self._kept, size)
        dist.recv(buffer, 1)
        return buffer


class GlooSender:
    def __init__(self, address: str) -> None:
        _join_group(1, int(address))

    def send(self, tensor: torch.Tensor) -> None:
        dist.send(tensor, 0)


class TcpReceiver:
    def __init__(self, tls: TlsFiles | None) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._server.getsockname())
        self._kept: dict[int, torch.Tensor] = {}
        # It waits for the sender, which does not know the address yet.
        self._connecting = futures.ThreadPoolExecutor(1).submit(self._connect, tls)

    def receive(self, size: int) -> torch.Tensor:
        connection = self._connecting.result()
        buffer = _buffer(self._kept, size)
        view = memoryview(buffer.numpy().data).cast("B")
        while view.nbytes:
            view = view[connection.recv_into(view) :]
        return buffer

    def _connect(self, tls: TlsFiles | None) -> socket.socket:
        return _encrypted(self._server.accept()[0], tls, server=True)


class TcpSender:
    def __init__(self, address: str, tls: TlsFiles | None) -> None:
        host, port = address.split(":")
        connection = socket.create_connection((host, int(port)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = _encrypted(connection, tls, server=False)

    def send(self, tensor: torch.Tensor) -> None:
        self._connection.sendall(memoryview(tensor.numpy().data).cast("B"))


def _encrypted(connection: socket.socket, tls: TlsFiles | None, *, server: bool) -> socket.socket:
    if tls is None:
        return connection
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(tls.certificate, tls.key)
    context.load_verify_locations(tls.authority)
    context.verify_mode = ssl.CERT_REQUIRED
    return context.wrap_socket(connection, server_side=server, server_hostname=None if server else "localhost")


def open_receiver(way: str, tls: TlsFiles | None) -> Receiver:
    match way:
        case "gradwire":
            return GradwireReceiver(tls)
        case "gradwire-memory":
            return GradwireReceiver(tls, memory=True)
        case "grpc-bytes":
            return BytesReceiver()
        case "generated" | "generated-whole":
            return GeneratedReceiver(tls)
        case "gloo":
            return GlooReceiver()
    return TcpReceiver(tls)


def open_sender(way: str, address: str, tls: TlsFiles | None) -> Sender:
    match way:
        case "gradwire":
            return GradwireSender(address, tls)
        case "gradwire-memory":
            return GradwireSender(address, tls, memory=True)
        case "grpc-bytes":
            return BytesSender(address)
        case "generated" | "generated-whole":
            return GeneratedSender(address, tls, whole=way == "generated-whole")
        case "gloo":
            return GlooSender(address)
    return TcpSender(address, tls)
