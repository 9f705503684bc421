"""Everything that a server holds for one run, built from the coordinator's request.

Takes messages in and lets them out; what is done with them, and when, is the executor's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gradwire_protocol.delivery import Delivered
from gradwire_protocol.errors import FrameError, GradwireError
from gradwire_protocol.frames import Message
from gradwire_protocol.torch_tensors import TORCH_TYPES, dense, tensor_from
from gradwire_protocol.v1 import graph_pb2, stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.activity import Progress
from gradwire_stage.checks import check_memory, check_prepare
from gradwire_stage.device import Device
from gradwire_stage.mailbox import Key, Mailbox
from gradwire_stage.metrics import StageMetrics
from gradwire_stage.optimizer import StageOptimizer, state_factor
from gradwire_stage.outbox import Outbox, Result
from gradwire_stage.peers import ABSENT, Incoming, Peers, Value, make_header
from gradwire_stage.routes import routes_of
from gradwire_stage.segment import BuiltSegment

_CLIENT = "client"
_FROM_CLIENT = frozenset({pb.DIRECTION_BATCH, pb.DIRECTION_STATE})
# How long the last messages may take to arrive at peers when a run ends in good order.
_FLUSH_SECONDS = 5.0


def _empty_tensor(spec: graph_pb2.TensorSpec, device: torch.device) -> torch.Tensor:
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
        open_channel: Callable[[str], Any],
        metrics: StageMetrics,
        fail: Callable[[GradwireError], None],
        weights_root: Path | None = None,
    ) -> None:
        own = check_prepare(request, server)
        self.state_bytes = check_memory(request, memory_bytes, state_factor(request.optimizer.name))
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
        pipeline = sorted(
            (peer for peer in request.peers if peer.replica == own.replica), key=lambda peer: peer.stages[0]
        )
        self.server_of_stage = {stage: peer.server for peer in pipeline for stage in peer.stages}
        # First stage and name of every server of the pipeline, in stage order: the order in which sums are made.
        self.servers = tuple((peer.stages[0], peer.server) for peer in pipeline)
        self.other_servers = tuple(name for _, name in self.servers if name != server)
        self.last_server = self.server_of_stage[request.stages - 1]
        self.last_stage = request.stages - 1
        self.placements = {placement.spec.name: placement for placement in request.tensors}
        self.tensors = {
            name: _empty_tensor(placement.spec, device.torch_device) for name, placement in self.placements.items()
        }
        # What trains here.
        self.parameters = {
            name: tensor
            for name, tensor in self.tensors.items()
            if isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad
        }
        self.holders = {name: self._holders(placement.holder_stages) for name, placement in self.placements.items()}
        self.segments = {
            (segment.graph, segment.stage): BuiltSegment(
                segment, self.tensors, device.torch_device, request.seed, TORCH_TYPES.get(request.precision)
            )
            for segment in request.segments
        }
        # Stages with a segment here, by graph: one without nodes has none, and no actions.
        self.active_stages: dict[int, list[int]] = {}
        for segment in request.segments:
            self.active_stages.setdefault(segment.graph, []).append(segment.stage)
        self.routes = routes_of(request, self.server_of_stage)
        # The stage that makes the loss, by graph, where it is here.
        self.loss_stage = {segment.graph: segment.stage for segment in request.segments if segment.loss}
        self.optimizer = StageOptimizer(request.optimizer, self.parameters)
        self.weight_version = 0
        self.progress = Progress()
        self.metrics = metrics.of_run(self.run, self.stages, self.replica)
        self._dropped = metrics.dropped
        self.mailbox: Mailbox[Incoming] = Mailbox(mailbox_bytes, self._drop)
        self.outbox = Outbox(outbox_bytes)
        self.peers = Peers(
            run=self.run,
            generation=self.generation,
            own=server,
            addresses={peer.server: peer.address for peer in request.peers},
            open_channel=open_channel,
            mailbox=self.mailbox,
            device=device,
            on_sent=self._sent,
            on_failure=fail,
        )
        self.metrics.start()
        self.metrics.parameter_bytes(self.state_bytes)

    def accept(self, message: Message) -> None:
        """Take a whole message of this run and generation. FrameError if it cannot be meant for a server."""
        header = message.header
        source = header.key
        key = Key(source.entry, source.micro_batch, source.value, source.direction, source.source_stage, source.state)
        size = header.tensor.size_bytes
        if key.state and key.direction != pb.DIRECTION_STATE:
            raise FrameError("Only state has names of the optimizer's values", expected="no state", got=str(key))
        if key.direction in _FROM_CLIENT:
            peer = _CLIENT
        elif key.direction == pb.DIRECTION_RESULT or key.source_stage not in self.server_of_stage:
            raise FrameError(
                "A message does not come from a stage of this run",
                expected=f"stage 0 to {self.last_stage}, and no result",
                got=str(key),
            )
        else:
            peer = self.server_of_stage[key.source_stage]
        self.mailbox.put(key, self._content(message), size)
        self.metrics.received(peer, key.direction, size)
        self.progress.advance()

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
        waiting, waiting_for = self.mailbox.waiting, ""
        since = None if waiting is None else waiting.since
        if waiting is not None:
            waiting_for = str(waiting.key)
        elif (since := self.outbox.waiting_since) is not None:
            waiting_for = f"the client to collect the results of entry {self.progress.entry}"
        return stage_pb2.Activity(
            run=self.run,
            generation=self.generation,
            stages=self.stages,
            entry=self.progress.entry,
            action=self.progress.text(),
            waiting_for=waiting_for,
            waiting_seconds=0.0 if since is None else time.monotonic() - since,
            progress=self.progress.count,
        )

    def abort(self, reason: GradwireError) -> None:
        """End every wait with `reason`, and all streams to peers at once. Any thread; idempotent."""
        self.mailbox.close(reason)
        self.outbox.close(reason)
        self.peers.cancel()

    def finish(self, reason: GradwireError) -> None:
        """Let what was sent arrive, then close everything; late calls end with `reason`."""
        self.peers.close(_FLUSH_SECONDS)
        self.mailbox.close(reason)
        self.outbox.close(reason)

    def free(self) -> None:
        """Let go of everything that takes memory, and of the run's metrics. After the compute thread's last use."""
        self.segments.clear()
        self.tensors.clear()
        self.parameters.clear()
        self.optimizer.close()
        self.metrics.remove()

    def owns(self, name: str) -> bool:
        """Whether this server counts a tensor in the norm, and delivers it to the client."""
        return self.holders[name][0][1] == self.server

    def _holders(self, stages: Sequence[int]) -> tuple[tuple[int, str], ...]:
        """First holding stage and name of each server that holds a tensor, in stage order."""
        first: dict[str, int] = {}
        for stage in stages:
            first.setdefault(self.server_of_stage[stage], stage)
        return tuple((stage, server) for server, stage in first.items())

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
        tensor = tensor_from(message)
        wanted = header.tensor.requires_grad
        if wanted and not (tensor.is_floating_point() or tensor.is_complex()):
            raise FrameError(f"{header.key.value!r} cannot have a gradient", got=str(tensor.dtype))
        return self.device.receive(tensor), wanted

    def _drop(self, reason: str) -> None:
        self._dropped.labels(reason).inc()

    def _sent(self, server: str, delivered: Delivered) -> None:
        self.metrics.sent(server, delivered.header.key.direction, delivered.size_bytes, delivered.seconds)
        self.progress.advance()
