"""Collects the results of entries from the servers of a run: predictions, weights, gradients.

A wait for results ends when the run does, and when a server sends none of results that are all there. Which entry means
what is for others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import torch

from gradwire.drive import Drive
from gradwire.liveness import TICK_SECONDS
from gradwire_protocol.activities import stage_names
from gradwire_protocol.errors import Aborted, GradwireError, Stalled, Unreachable, from_rpc_error
from gradwire_protocol.frames import Admission, FrameAssembler, Message
from gradwire_protocol.torch_tensors import tensor_from
from gradwire_protocol.v1 import coordinator_pb2, stage_pb2

Value = torch.Tensor | int | float | bool

_COLLECT = "/gradwire_protocol.v1.StageService/Collect"
# A broken link to a server mostly means that the server is gone; the coordinator then says so, and says more.
_VERDICT_SECONDS = 15.0


@dataclass(frozen=True)
class Result:
    """One collected value."""

    value: str
    micro_batch: int
    content: Value | None
    # Name of the optimizer's state, where it is a value of that.
    state: str = ""


@dataclass(eq=False)
class _Call:
    """A call that collects the results of one entry from one server."""

    server: coordinator_pb2.ServerLayout
    entry: int
    call: Any
    # How often in a row nothing had come although the entry was finished; None while something is dealt with.
    silent_ticks: int | None = 0
    failure: GradwireError | None = None


class Collector:
    """Collects for one run, on any threads. `drive` tells when an entry is finished, and why the run has failed.

    stall_seconds: how long a server may send nothing of results that are all there. checksums: every chunk has one.
    """

    def __init__(
        self,
        layout: coordinator_pb2.CreateRunReply,
        drive: Drive,
        open_channels: dict[str, Any],
        *,
        stall_seconds: float,
        checksums: bool,
    ) -> None:
        self._layout = layout
        self._run = layout.run
        self._generation = layout.generation
        self._drive = drive
        self._channels = open_channels
        self._stall_seconds = stall_seconds
        self._admission = Admission.KEEP_CHECKED if checksums else Admission.KEEP
        self._lock = threading.Lock()
        self._open: list[_Call] = []
        drive.liveness.add(self._check)

    def begin_generation(self, generation: int) -> None:
        """What is collected from now on is of this generation. While nothing is."""
        self._generation = generation

    def collect(
        self,
        entry: int,
        servers: Sequence[coordinator_pb2.ServerLayout],
        takes: Sequence[Callable[[Result], None]],
    ) -> None:
        """Give `takes`, one for each server, the results that it has for an entry, as they come, on several threads."""
        request = stage_pb2.CollectRequest(run=self._run, generation=self._generation, entry=entry)
        calls = [_Call(server, entry, self._method(server)(request)) for server in servers]
        with self._lock:
            self._open += calls
        # At the same time: a server whose results nobody takes can hold the others up.
        with ThreadPoolExecutor(max(1, len(calls)), thread_name_prefix="collect") as pool:
            try:
                # A run that failed just before has broken off only the calls that there were.
                failure = self._drive.failure
                if failure is not None:
                    raise failure
                list(pool.map(self._read, calls, takes))
            except BaseException:
                for item in calls:
                    item.call.cancel()
                raise
            finally:
                with self._lock:
                    self._open = [item for item in self._open if item not in calls]

    def break_off(self) -> None:
        """End every wait: the run has failed. Any thread."""
        for item in self._calls():
            item.call.cancel()

    def _calls(self) -> list[_Call]:
        with self._lock:
            return list(self._open)

    def _method(self, server: coordinator_pb2.ServerLayout) -> Any:
        return self._channels[server.server].unary_stream(
            _COLLECT, request_serializer=stage_pb2.CollectRequest.SerializeToString, response_deserializer=None
        )

    def _read(self, item: _Call, take: Callable[[Result], None]) -> None:
        assembler = FrameAssembler(admit=lambda header, size: self._admission)
        try:
            for frame in item.call:
                # While it is dealt with, nothing is waited for.
                item.silent_ticks = None
                message = assembler.feed(frame)
                if message is not None:
                    key = message.header.key
                    take(Result(key.value, key.micro_batch, _content(message), key.state))
                item.silent_ticks = 0
        except grpc.RpcError as error:
            if item.failure is not None:
                self._drive.fail(item.failure)
            raise self._error(item, from_rpc_error(error, target=self._name(item))) from None

    def _name(self, item: _Call) -> str:
        return peer_name(item.server, self._layout)

    def _error(self, item: _Call, error: GradwireError) -> GradwireError:
        """Return the run's failure, where the server may only have suffered from it; else what the server says."""
        if isinstance(error, Unreachable | Aborted):
            return verdict(self._drive, error)
        message = f"Cannot collect the results of entry {item.entry} from {self._name(item)}: {error.message}"
        return type(error)(message, expected=error.expected, got=error.got, remedy=error.remedy)

    def _check(self) -> None:
        """Once a second: break off where all servers have finished an entry, and one sends nothing of its results."""
        for item in self._calls():
            if item.silent_ticks is None or self._drive.finished_number < item.entry:
                continue
            item.silent_ticks += 1
            silent_seconds = item.silent_ticks * TICK_SECONDS
            if silent_seconds >= self._stall_seconds and item.failure is None:
                item.failure = Stalled(
                    f"{self._name(item)} has sent nothing of the results of entry {item.entry} for "
                    f"{silent_seconds:.0f} s",
                    expected=f"results within {self._stall_seconds:g} s, the plan's stall_seconds: the entry is done",
                    remedy="check the network between this process and that server",
                )
                item.call.cancel()


def verdict(drive: Drive, error: GradwireError) -> GradwireError:
    """Return the run's one failure: the coordinator's, if it gives one in time, else `error`."""
    return drive.wait_failure(_VERDICT_SECONDS) or error


def peer_name(server: coordinator_pb2.ServerLayout, layout: coordinator_pb2.CreateRunReply) -> str:
    """Return how errors name a server of a run: "stage 1 on b at 10.0.0.2:7071".

    Where there are several replicas, or several servers a stage, it has its own of these, too.
    """
    if server.parameter_server:
        number = server.stages[0] - min(other.stages[0] for other in layout.servers if other.parameter_server)
        return f"parameter server {number} on {server.server} at {server.address}"
    replica = server.replica if any(other.replica for other in layout.servers) else None
    shard = server.shard if any(other.shard for other in layout.servers) else None
    return f"{stage_names(server.stages, replica, shard)} on {server.server} at {server.address}"


def _content(message: Message) -> Value | None:
    """Return what a message carries, as the user's own: a copy that may be written to."""
    kind = message.header.WhichOneof("value")
    if kind == "tensor":
        return tensor_from(message).clone()
    if kind == "absent":
        return None
    content: Value = getattr(message.header, str(kind))
    return content
