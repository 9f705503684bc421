"""One run's connections: entries to the coordinator, batches and weights to the servers, results from them.

Knows servers and messages; which entry means what is the trainer's business.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from gradwire.collecting import Collector, Result, Value, peer_name, verdict
from gradwire.drive import SILENCE_SECONDS, Drive
from gradwire_protocol.delivery import FrameSender, Payload
from gradwire_protocol.errors import Aborted, GradwireError, ModelError, Unreachable
from gradwire_protocol.torch_tensors import dense, payload_of, tensor_info
from gradwire_protocol.v1 import coordinator_pb2, graph_pb2, run_pb2
from gradwire_protocol.v1 import tensors_pb2 as tensors_pb

_CLOSE_SECONDS = 10.0
# How long the coordinator may take to have told all servers of the end.
_ABORT_SECONDS = 5.0
# How much of the state may be on its way to the servers before more of it is read.
_STREAM_BYTES = 64 * 2**20


class Session:
    """The connections of one run. Not for several threads at once, except `close`."""

    def __init__(
        self,
        layout: coordinator_pb2.CreateRunReply,
        *,
        channel: Any,
        target: str,
        open_channel: Callable[[str], Any],
        window: int,
        stall_seconds: float,
        checksums: bool = False,
    ) -> None:
        """stall_seconds: how long a server may send nothing of results that are all there."""
        self._layout = layout
        self._closed = False
        # Its channel, and how errors name it.
        self.coordinator = (channel, target)
        self._channels: dict[str, Any] = {}
        self._senders: dict[str, FrameSender] = {}
        self._drive = Drive(
            channel,
            layout.run,
            layout.generation,
            window,
            target,
            silence_seconds=SILENCE_SECONDS,
            on_failure=self._break_off,
        )
        self._collector = Collector(
            layout, self._drive, self._channels, stall_seconds=stall_seconds, checksums=checksums
        )
        try:
            for server in layout.servers:
                self._channels[server.server] = open_channel(server.address)
                self._senders[server.server] = FrameSender(
                    self._channels[server.server],
                    peer_name(server, layout),
                    checksums=checksums,
                    on_failure=self._sender_failed,
                )
        except BaseException:
            self.close()
            raise
        if self._drive.failure is not None:
            self._break_off()  # it came before there was anything to break off

    @property
    def servers(self) -> Sequence[coordinator_pb2.ServerLayout]:
        return self._layout.servers

    @property
    def stop_reason(self) -> str:
        """Why the run is to end before its next step; empty: it is not."""
        return self._drive.stop_reason

    def request_stop(self, reason: str) -> None:
        """Note that the run is to end before its next step. From any thread or signal."""
        self._drive.request_stop(reason)

    def reserve(self) -> int:
        """Wait for a free place in the window; return the number of the entry to deliver for, and then to submit."""
        return self._drive.reserve()

    def submit(self, entry: run_pb2.Entry) -> Future[run_pb2.EntryResult]:
        return self._drive.submit(entry)

    def wait_idle(self) -> None:
        """Wait until no entry is open. Raises the run's failure."""
        self._drive.wait_idle()

    def begin_generation(self, layout: coordinator_pb2.CreateRunReply) -> None:
        """Go on with another layout on the same servers. While no entry is open, and nothing is collected."""
        self._layout = layout
        self._drive.begin_generation(layout.generation)
        self._collector.begin_generation(layout.generation)

    @property
    def run(self) -> str:
        """The run's identifier."""
        return self._layout.run

    @property
    def first_server(self) -> coordinator_pb2.ServerLayout:
        """The first replica's first server of stage 0, which passes on what no server holds."""
        return next(server for server in self.servers if 0 in server.stages)

    def submit_save(self, entry: run_pb2.Entry) -> tuple[Future[run_pb2.EntryResult], Future[run_pb2.SaveOutcome]]:
        """Submit a SaveState entry; the second future tells how the writing ends."""
        return self._drive.submit_save(entry)

    def deliver_kept(self, entry: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Deliver what no server holds to the first server, for a SaveState entry that is submitted."""
        for name, tensor in tensors.items():
            self._send(self.first_server, self._key(entry, 0, name, tensors_pb.DIRECTION_STATE), tensor)

    def stream_state(self, entry: int, names: Iterable[str], read: Callable[[str], torch.Tensor]) -> None:
        """Deliver tensors one after the other, each to every server that holds it, for an entry that is submitted.

        `read` is called once for each tensor that any server holds. No more than one of them, and what makes up
        _STREAM_BYTES, is kept at a time.
        """
        self._stream(entry, ((name, "") for name in names), lambda name, _: read(name))

    def stream_optimizer_state(
        self, entry: int, names: Iterable[tuple[str, str]], read: Callable[[str, str], Value]
    ) -> None:
        """Deliver values of the optimizer's state, by (parameter, state), as `stream_state` delivers tensors."""
        self._stream(entry, names, read)

    def _stream(self, entry: int, names: Iterable[tuple[str, str]], read: Callable[[str, str], Value]) -> None:
        holders: dict[str, list[coordinator_pb2.ServerLayout]] = {}
        for server in self.servers:
            for name in server.tensors:
                holders.setdefault(name, []).append(server)
        waiting = 0
        for name, state in names:
            if name not in holders:
                continue
            failure = self._drive.wait_failure(0)
            if failure is not None:
                raise failure
            value = read(name, state)
            key = self._key(entry, 0, name, tensors_pb.DIRECTION_STATE)
            key.state = state
            for server in holders[name]:
                self._send(server, key, value)
            waiting += value.nbytes if isinstance(value, torch.Tensor) else 0
            del value
            if waiting >= _STREAM_BYTES:
                self._flush()
                waiting = 0

    def send_batch(
        self,
        entry: int,
        graph: graph_pb2.GraphKind,
        values: Mapping[str, Value],
        batched: Iterable[str],
        micro_batches: Sequence[run_pb2.MicroBatch],
    ) -> None:
        """Deliver the rows of each micro-batch to all servers of its replica whose segments read them.

        Does not wait: what servers do not take yet stays here, as parts of one copy of the batch, and the window bounds
        how many there are. If it waited, for a server that waits for its results to be collected, nobody would.
        """
        batched = frozenset(batched)
        readers = [(server, use.values) for server in self.servers for use in server.inputs if use.graph == graph]
        needed = {name for _, names in readers for name in names}
        # Copied, because sending goes on after this returns, and the user may fill the same tensor anew.
        whole = {name: _copied(values[name]) for name in needed}
        for part in micro_batches:
            rows = slice(part.first_row, part.first_row + part.rows)
            for server, names in readers:
                if server.replica != part.replica:
                    continue
                for name in names:
                    value = whole[name]
                    if name in batched and isinstance(value, torch.Tensor):
                        value = value[rows]
                    self._send(server, self._key(entry, part.index, name, tensors_pb.DIRECTION_BATCH), value)

    def collect(self, entry: int, servers: Sequence[coordinator_pb2.ServerLayout]) -> list[Result]:
        """Return all results that these servers have for an entry, when it is done everywhere."""
        parts: list[list[Result]] = [[] for _ in servers]
        self._collector.collect(entry, servers, [part.append for part in parts])
        return [result for part in parts for result in part]

    def collect_each(self, entry: int, take: Callable[[Result], None]) -> None:
        """Give `take` each result of all servers' own tensors for an entry, as they come, on several threads.

        May run on a thread beside the others of the session.
        """
        servers = [server for server in self.servers if server.owned_tensors]
        self._collector.collect(entry, servers, [take] * len(servers))

    def fail(self, error: GradwireError) -> GradwireError:
        """End the run, which cannot go on; return its failure.

        Of what may have befallen others first it is the coordinator's, if it gives one in time.
        """
        failure = self._verdict(error) if isinstance(error, Unreachable | Aborted) else error
        self._drive.fail(failure)
        return failure

    def abort(self) -> None:
        """End the run at once, whatever it is doing, and close all connections. Idempotent."""
        self._closed = True
        self._drive.abort(_ABORT_SECONDS)
        self._disconnect()

    def close(self) -> None:
        """End the run when what is open is done, and close all connections. Idempotent."""
        self._closed = True
        self._drive.close(_CLOSE_SECONDS)
        self._disconnect()

    def _disconnect(self) -> None:
        for sender in self._senders.values():
            sender.cancel()
        for channel in self._channels.values():
            channel.close()

    def _key(self, entry: int, micro_batch: int, value: str, direction: tensors_pb.Direction) -> tensors_pb.MessageKey:
        return tensors_pb.MessageKey(
            run=self._layout.run,
            generation=self._layout.generation,
            entry=entry,
            micro_batch=micro_batch,
            value=value,
            direction=direction,
        )

    def _send(self, server: coordinator_pb2.ServerLayout, key: tensors_pb.MessageKey, value: Value) -> None:
        header, payload = _message(key, value)
        try:
            self._senders[server.server].send(header, payload)
        except GradwireError as error:
            raise self._verdict(error) from None

    def _flush(self) -> None:
        """Wait until the servers have everything that was sent to them."""
        for sender in self._senders.values():
            try:
                sender.flush()
            except GradwireError as error:
                raise self._verdict(error) from None

    def _break_off(self) -> None:
        """The run has failed: end every wait for a server. Any thread."""
        for sender in list(self._senders.values()):
            sender.cancel()
        self._collector.break_off()

    def _sender_failed(self, error: GradwireError) -> None:
        """Called on a sender's thread: the run cannot go on, but leave the coordinator time to say why."""
        if self._closed:
            return

        def end_run() -> None:
            self._drive.fail(self._verdict(error))

        threading.Thread(target=end_run, name="verdict", daemon=True).start()

    def _verdict(self, error: GradwireError) -> GradwireError:
        return verdict(self._drive, error)


def _copied(value: Value) -> Value:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def _message(key: tensors_pb.MessageKey, value: Value) -> tuple[tensors_pb.TensorHeader, Payload]:
    """Return header and payload. A tensor on another device is copied to the host when its turn comes."""
    if isinstance(value, bool):
        return tensors_pb.TensorHeader(key=key, boolean=value), None
    if isinstance(value, int):
        return tensors_pb.TensorHeader(key=key, integer=value), None
    if isinstance(value, float):
        return tensors_pb.TensorHeader(key=key, real=value), None
    if value.is_meta:
        raise ModelError(
            f"{key.value} has no contents: it is on the meta device",
            expected="a model with its weights in memory",
            remedy="give the trainer weights=…, or build the model on the CPU",
        )
    tensor = dense(value.detach())
    header = tensors_pb.TensorHeader(key=key, tensor=tensor_info(tensor))
    return header, lambda: payload_of(tensor.cpu())
