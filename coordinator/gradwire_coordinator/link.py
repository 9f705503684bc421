"""The coordinator's line to one server of a run: Prepare, one Execute stream, Release.

Leaves to others: what is sent and what failures mean (`run.py`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import grpc

from gradwire_coordinator.server_place import ServerPlace
from gradwire_protocol.errors import GradwireError, from_rpc_error
from gradwire_protocol.v1 import run_pb2, stage_pb2, stage_pb2_grpc

# Building segments takes seconds for a large graph.
PREPARE_SECONDS = 120.0
RELEASE_SECONDS = 2.0
RELEASE_AGAIN_SECONDS = 1.0


def _stub(channel: Any) -> Any:
    return stage_pb2_grpc.StageServiceStub(channel)  # type: ignore[no-untyped-call]


class Link:
    """A channel to one server, with at most one Execute stream. Thread-safe."""

    def __init__(
        self, position: int, place: ServerPlace, server: str, address: str, connect: Callable[[str], Any]
    ) -> None:
        """position: of the server in the run's lists."""
        self.position = position
        self.place = place
        self.server = server
        self.address = address
        self._channel = connect(address)
        self._connect = connect
        self._stub = _stub(self._channel)
        self._outgoing: queue.SimpleQueue[stage_pb2.ExecuteRequest | None] = queue.SimpleQueue()
        self._call: Any = None
        self._thread: threading.Thread | None = None

    @property
    def target(self) -> str:
        """This server, for messages."""
        return f"{self.place.name} (server {self.server} at {self.address})"

    def prepare(self, request: stage_pb2.PrepareRequest) -> stage_pb2.PrepareReply:
        """Have the server build its segments; the server's own error, or Unreachable."""
        try:
            reply: stage_pb2.PrepareReply = self._stub.Prepare(request, timeout=PREPARE_SECONDS)
        except grpc.RpcError as error:
            raise from_rpc_error(error, target=self.target) from error
        return reply

    def open(
        self,
        on_report: Callable[[Link, run_pb2.EntryReport], None],
        on_saved: Callable[[Link, run_pb2.SavedPart], None],
        on_end: Callable[[Link, Exception | None], None],
    ) -> None:
        """Open the Execute stream.

        A thread calls `on_report` for each report, `on_saved` for each part of a checkpoint, and `on_end` once, with
        the error.
        """
        self._call = self._stub.Execute(iter(self._outgoing.get, None))

        def follow() -> None:
            failure: Exception | None = None
            try:
                for reply in self._call:
                    if reply.HasField("saved"):
                        on_saved(self, reply.saved)
                    else:
                        on_report(self, reply.report)
            except Exception as error:  # noqa: BLE001  # whatever ends the stream is handed on
                failure = error
            on_end(self, failure)

        self._thread = threading.Thread(target=follow, name=f"reports of {self.server}", daemon=True)
        self._thread.start()

    def send(self, request: stage_pb2.ExecuteRequest) -> None:
        """Queue an entry for the server; never waits."""
        self._outgoing.put(request)

    def release(self, run: str, generation: int, reason: str) -> GradwireError | None:
        """Free the server; return the error if it did not answer in time (then its broken stream frees it)."""
        request = stage_pb2.ReleaseRequest(run=run, generation=generation, reason=reason)
        try:
            self._stub.Release(request, timeout=RELEASE_SECONDS)
            return None
        except grpc.RpcError:
            # The connection may be dead, and the server alive: it would hold the run until it finds out itself.
            with closing(self._connect(self.address)) as channel:
                try:
                    _stub(channel).Release(request, timeout=RELEASE_AGAIN_SECONDS)
                except grpc.RpcError as error:
                    return from_rpc_error(error, target=self.target)
        return None

    def close(self) -> None:
        """End the stream and the channel. The thread of the reports ends by itself."""
        self._outgoing.put(None)
        if self._call is not None:
            self._call.cancel()
        self._channel.close()

    def join(self) -> None:
        """Wait for the thread of the reports, from any other thread."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
