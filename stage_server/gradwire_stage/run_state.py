"""Everything that a server holds for one run, built from the coordinator's request.

Takes messages in and lets them out; what is done with them, and when, is the executor's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from gradwire_protocol.activities import stage_names, wait_words
from gradwire_protocol.channels import OpenChannel
from gradwire_protocol.checkpoint.root import CheckpointRoot
from gradwire_protocol.checksums import check_available
from gradwire_protocol.errors import GradwireError
from gradwire_protocol.frames import Message, decoded_bytes
from gradwire_protocol.torch_tensors import TORCH_TYPES, dense
from gradwire_protocol.unreceipted import Delivered
from gradwire_protocol.v1 import graph_pb2, stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage import timeline as phases
from gradwire_stage.activity import Progress
from gradwire_stage.arrivals import Arrivals, is_answered, key_of
from gradwire_stage.bell import Bell
from gradwire_stage.checkpoint_writer import CheckpointWriter
from gradwire_stage.checks import check_bounds, check_memory, check_prepare
from gradwire_stage.codecs.registry import unpack
from gradwire_stage.device import Device
from gradwire_stage.exchange.agreements import make_agreement
from gradwire_stage.headers import Value, make_header
from gradwire_stage.kept_state import KeptState
from gradwire_stage.keys import FROM_CLIENT, Key
from gradwire_stage.known_kinds import KnownKind
from gradwire_stage.mailbox import CREDIT_BYTES, Inflow, Mailbox, Reservation
from gradwire_stage.metrics import StageMetrics
from gradwire_stage.optimizer import StageOptimizer
from gradwire_stage.outbox import Outbox, Result
from gradwire_stage.peers import ABSENT, SEND_BYTES, Incoming, Peers
from gradwire_stage.places import Places
from gradwire_stage.routes import routes_of
from gradwire_stage.segment import BuiltSegment
from gradwire_stage.shared_memory import SharedMemory
from gradwire_stage.shared_receiver import SharedReceiver
from gradwire_stage.torch_transport import TorchTransport, make_torch_transports

# In an activity.
_SHOWN_PEERS = 64
# How long the last messages may take to arrive at peers when a run ends in good order.
_FLUSH_SECONDS = 5.0


def _make_tensor(spec: graph_pb2.TensorSpec, device: torch.device, kept: KeptState | None) -> torch.Tensor:
    """Return a tensor of the model: the one that was kept, or an empty one."""
    present = None if kept is None else kept.tensor(spec)
    if present is not None:
        return present
    tensor = torch.empty(tuple(spec.shape), dtype=TORCH_TYPES[spec.data_type], device=device)
    if spec.kind == graph_pb2.TENSOR_KIND_PARAMETER:
        return torch.nn.Parameter(tensor, requires_grad=spec.requires_grad)
    return tensor


class RunState:
    """One run on this server. Building it checks the request; errors are typed.

    `fail` may be called on any thread, by what fails outside the compute thread.
    """

    def __init__(
        self,
        request: stage_pb2.PrepareRequest,
        *,
        server: str,
        device: Device,
        memory_bytes: int,
        mailbox_bytes: int,
        outbox_bytes: int,
        credit_bytes: int = CREDIT_BYTES,
        send_bytes: int = SEND_BYTES,
        open_channel: OpenChannel,
        metrics: StageMetrics,
        fail: Callable[[GradwireError], None],
        weights_root: Path | None = None,
        checkpoint_root: Path | None = None,
        operators: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
        shared_memory: SharedMemory,
        tensor_bytes: int,
        bell: Bell | None = None,
        kept: KeptState | None = None,
    ) -> None:
        own = check_prepare(request, server)
        if request.checksums:
            check_available(f"Stage server {server}")
        check_bounds(request, mailbox_bytes)
        self.state_bytes = check_memory(request, memory_bytes)
        self.run = request.run
        self.generation = request.generation
        self.stages = tuple(own.stages)
        self.first_stage = self.stages[0]
        self.replica = own.replica
        self.server = server
        self.device = device
        self.weights_root = weights_root
        self.loss_form = request.loss_form
        self.recompute = request.recompute
        self.places = Places(request, own)
        self.placements = {placement.spec.name: placement for placement in request.tensors}
        self.tensors = {
            name: _make_tensor(placement.spec, device.torch_device, kept) for name, placement in self.placements.items()
        }
        # What trains here.
        self.parameters = {
            name: tensor
            for name, tensor in self.tensors.items()
            if isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad
        }
        # Of which this server has a part.
        self.split_names = frozenset(
            name for name, placement in self.placements.items() if placement.spec.HasField("split")
        )
        self.holders = {
            name: self.places.holders(placement.holder_stages) for name, placement in self.placements.items()
        }
        # Which other servers of the pipeline hold, too.
        self.tied_names = frozenset(name for name, holders in self.holders.items() if len(holders) > 1)
        self.segments = {
            (segment.graph, segment.stage): BuiltSegment(
                *(segment, self.tensors, device.torch_device, request.seed, TORCH_TYPES.get(request.precision)),
                custom=operators,
                shards=self.places.shards,
            )
            for segment in request.segments
        }
        # Stages with a segment here, by graph: one without nodes has none, and no actions.
        self.active_stages: dict[int, list[int]] = {}
        for segment in request.segments:
            self.active_stages.setdefault(segment.graph, []).append(segment.stage)
        self.routes = routes_of(request, self.places.server_of_stage)
        # The stage that makes the loss, by graph, where it is here.
        self.loss_stage = {segment.graph: segment.stage for segment in request.segments if segment.loss}
        # What moves the sums of shards, and those of replicas, where that is not messages.
        self.shard_transport, self.replica_transport = make_torch_transports(self, request)
        self.agreement = make_agreement(self, request)
        self.optimizer = StageOptimizer(request.optimizer, self.agreement.updated)
        # Of the generation before, until the first entry has taken it over.
        self.kept = kept
        self.weight_version = 0 if kept is None else kept.weight_version
        self.progress = Progress()
        self._aborted: GradwireError | None = None
        self.checkpoint_root = CheckpointRoot(checkpoint_root, f"Stage server {server}")
        self.checkpoints = CheckpointWriter(
            self.checkpoint_root,
            stage=self.first_stage,
            who=f"{self.name} (server {server})",
            advance=self.progress.advance,
        )
        self.metrics = metrics.of_run(self.run, self.stages, self.replica, self.places.shard)
        self._dropped = metrics.dropped
        self.checksums = request.checksums
        self._arrivals = Arrivals(request, self.places)
        self.mailbox: Mailbox[Incoming] = Mailbox(
            mailbox_bytes,
            self._drop,
            credit_bytes=credit_bytes,
            # A client, and peers with a stream for each class of traffic; twice, for some may not be gone yet.
            maximum_streams=4 * len(request.peers) + 4,
            lasting=frozenset({pb.DIRECTION_WEIGHTS}),
            bounds=self._arrivals.bounds,
            stream_of=self._arrivals.stream,
            bell=bell,
        )
        self.outbox = Outbox(outbox_bytes)
        self.shared = SharedReceiver(shared_memory, self.places.everyone_else, tensor_bytes)
        self.peers = Peers(
            run=self.run,
            generation=self.generation,
            own=server,
            addresses={peer.server: peer.address for peer in request.peers},
            open_channel=open_channel,
            mailbox=self.mailbox,
            device=device,
            shared_memory=shared_memory,
            send_bytes=send_bytes,
            checksums=self.checksums,
            pause=self._pause,
            on_frame=self.progress.advance,
            on_sent=self._sent,
            on_failure=fail,
        )
        self.metrics.start()
        self.metrics.parameter_bytes(self.state_bytes)

    @property
    def name(self) -> str:
        """What errors call this server: "stage 2", and its shard where there are several."""
        return stage_names(self.stages, None, self.places.shard if self.places.shards > 1 else None)

    def note_frame(self, direction: pb.Direction) -> None:
        """Count a frame that has come: a large message on a slow link is progress, too."""
        if direction in FROM_CLIENT:
            self.progress.advance_client()
        else:
            self.progress.advance()

    def admit(self, header: pb.TensorHeader, payload_bytes: int, inflow: Inflow, *, wait: bool) -> Reservation | None:
        """Take room for a message of this run and generation, waiting for it; None: it is to be dropped.

        FrameError if it cannot be meant for this server, LimitExceeded if it is too much; without `wait`, HeldError.
        """
        key = key_of(header)
        self._arrivals.check(key)
        return self.mailbox.reserve(key, payload_bytes, inflow, answered=is_answered(header), wait=wait)

    def kind_of(self, header: pb.TensorHeader) -> KnownKind:
        """Return what is to be known of messages that differ from an admitted one in entry and micro-batch alone."""
        return KnownKind(header, self._arrivals.sender(key_of(header)))

    def receive(self, kind: KnownKind, entry: int, micro_batch: int, payload: memoryview, inflow: Inflow) -> None:
        """Take a whole message of a known kind, as `admit` and `accept` take others; its key has been checked.

        payload: as many bytes as the kind has. HeldError where it would have to wait for room, LimitExceeded.
        """
        key = kind.key._replace(entry=entry, micro_batch=micro_batch)
        reservation = self.mailbox.reserve(key, kind.size_bytes, inflow, answered=kind.answered, wait=False)
        self.note_frame(key.direction)
        if reservation is None:
            return
        tensor, encoded = kind.unpack(payload)
        self.metrics.received(kind.sender, key.direction, kind.codec, kind.size_bytes, kind.decoded_bytes)
        self.mailbox.fill(reservation, (self.device.receive(tensor, encoded), kind.wants_gradient))

    def accept(self, message: Message, reservation: Reservation) -> None:
        """Take a whole message that was admitted."""
        header = message.header
        content = self._content(message)
        sender = self._arrivals.sender(reservation.key)
        info = header.tensor
        decoded = decoded_bytes(info) if header.HasField("tensor") else 0
        self.metrics.received(sender, header.key.direction, info.codec, info.size_bytes, decoded)
        self.progress.advance()
        # Last: it wakes the compute thread, which then need not wait for this one.
        self.mailbox.fill(reservation, content)

    def result(
        self, entry: int, micro_batch: int, name: str, value: Value | None, *, stage: int, state: str = ""
    ) -> Result:
        """Return what carries a value to the client. Nobody may write to a tensor afterwards."""
        if isinstance(value, torch.Tensor):
            value = dense(value.detach())
        header = make_header(
            self.run, self.generation, Key(entry, micro_batch, name, pb.DIRECTION_RESULT, stage, state), value
        )
        return Result(header, self.device.payload(value) if isinstance(value, torch.Tensor) else None)

    def activity(self) -> stage_pb2.Activity:
        """Return what the run is doing now. Any thread."""
        # Read first: what follows is then never newer than it, so that a state that stands still is shown as it is.
        progress, client_progress = self.progress.count, self.progress.client_count
        wait, since = self._wait()
        return stage_pb2.Activity(
            run=self.run,
            generation=self.generation,
            stages=self.stages,
            entry=self.progress.entry,
            action=self.progress.text(),
            waiting_for="" if wait is None else wait_words(wait, self.progress.entry),
            waiting_seconds=0.0 if wait is None else time.monotonic() - since,
            progress=progress,
            parameter_server=self.places.is_parameter_server,
            phase=self.progress.phase,
            wait=wait,
            client_progress=client_progress,
            unreceipted=[
                stage_pb2.Unreceipted(server=server, messages=messages, size_bytes=size_bytes)
                for server, (messages, size_bytes) in itertools.islice(self.peers.unreceipted().items(), _SHOWN_PEERS)
            ],
        )

    def _wait(self) -> tuple[stage_pb2.Wait | None, float]:
        """Return what the compute thread waits for, and since when (time.monotonic)."""
        transports = (each.waiting for each in self._torch_transports)
        waiting = next((wait for wait in (self.mailbox.waiting, *transports) if wait is not None), None)
        if waiting is not None:
            key = waiting.key
            from_client = key.direction in FROM_CLIENT
            owner = "" if from_client else self._arrivals.sender(key)
            wait = stage_pb2.Wait(
                kind=stage_pb2.WAIT_KIND_MESSAGE, message=key.to_proto(), server=owner, stage=key.source_stage
            )
            return wait, waiting.since
        room = self.peers.waiting
        if room is not None:
            stage = self.places.first_stages[room.server]
            return stage_pb2.Wait(kind=stage_pb2.WAIT_KIND_ROOM, server=room.server, stage=stage), room.since
        since = self.outbox.waiting_since
        if since is not None:
            return stage_pb2.Wait(kind=stage_pb2.WAIT_KIND_COLLECT), since
        since = self.checkpoints.waiting_since
        if since is not None:
            return stage_pb2.Wait(kind=stage_pb2.WAIT_KIND_DISK, server=self.server, stage=self.first_stage), since
        return None, 0.0

    @property
    def _torch_transports(self) -> list[TorchTransport]:
        return [each for each in (self.shard_transport, self.replica_transport) if each is not None]

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Charge a wait of the compute thread for room at a peer to the exchange."""
        timeline = self.progress.timeline
        previous = None if timeline is None else timeline.switch(phases.WAIT_EXCHANGE)
        yield
        if timeline is not None and previous is not None:
            timeline.switch(previous)

    def check(self) -> None:
        """Raise why the run has been ended. For the compute thread, between two things that take time."""
        if self._aborted is not None:
            raise self._aborted

    def abort(self, reason: GradwireError) -> None:
        """End every wait with `reason`, and all streams to peers at once. Any thread; idempotent."""
        self._aborted = reason
        self.mailbox.close(reason)
        self.outbox.close(reason)
        self.checkpoints.close(reason)
        self.shared.close()
        self.peers.cancel()
        for transport in self._torch_transports:
            transport.abort()

    def finish(self, reason: GradwireError) -> None:
        """Let what was sent arrive, then close everything; late calls end with `reason`."""
        self.peers.close(_FLUSH_SECONDS)
        self.mailbox.close(reason)
        self.outbox.close(reason)
        self.checkpoints.close(reason)
        self.shared.close()

    def free(self) -> None:
        """Let go of everything that takes memory, and of the run's metrics. After the compute thread's last use."""
        self.kept = None
        self.agreement.close()
        for transport in self._torch_transports:
            transport.close()
        self.segments.clear()
        self.tensors.clear()
        self.parameters.clear()
        self.optimizer.close()
        self.metrics.remove()

    def owns(self, name: str) -> bool:
        """Whether a tensor is this server's to count and to give away: of its pipeline, the first that holds it.

        What a parameter server updates is that one's.
        """
        updater = self.placements[name].parameter_server
        return (updater or self.holders[name][0][1]) == self.server

    def _content(self, message: Message) -> Incoming:
        header = message.header
        match header.WhichOneof("value"):
            case "integer":
                return header.integer
            case "real":
                return header.real
            case "boolean":
                return header.boolean
            case "absent":
                return ABSENT
        tensor, encoded = unpack(message)
        return self.device.receive(tensor, encoded), header.tensor.requires_grad

    def _drop(self, reason: str) -> None:
        self._dropped.labels(reason).inc()

    def _sent(self, server: str, delivered: Delivered) -> None:
        if delivered.shared:
            self.metrics.shared(server, delivered.size_bytes)
        self.metrics.sent(server, delivered.direction, delivered.codec, delivered.size_bytes, delivered.seconds)
        self.progress.advance()
