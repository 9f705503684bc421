"""Takes the sockets that servers of the same host offer for their messages, in place of Deliver calls.

Leaves to others: offering them (local_connector.py), and what a frame brings (intake.py).
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Collection
from contextlib import closing

import structlog

from gradwire_protocol.errors import GradwireError, InternalError
from gradwire_protocol.handover import take_over
from gradwire_protocol.local_stream import ReceivingEnd
from gradwire_protocol.shared_block import TICKET_BYTES, BlockError, unsupported
from gradwire_protocol.v1 import stage_pb2
from gradwire_stage.intake import Intake, StreamLimit
from gradwire_stage.shared_memory import SharedMemory

_TAKE_OVER_SECONDS = 4.0

_log = structlog.get_logger(__name__)


class LocalStreams:
    """The sockets that other servers send over to this one, each read by a thread. Thread-safe.

    make_intake: makes what takes the frames of a stream. limit: on streams, those of gRPC included.
    """

    def __init__(self, memory: SharedMemory, make_intake: Callable[[], Intake], limit: StreamLimit) -> None:
        self._memory = memory
        self._make_intake = make_intake
        self._limit = limit
        self._lock = threading.Lock()
        self._open: set[ReceivingEnd] = set()
        self._closed = False

    @property
    def count(self) -> int:
        """How many are open."""
        return len(self._open)

    def take_over(self, request: stage_pb2.OfferStreamRequest, servers: Collection[str]) -> stage_pb2.OfferStreamReply:
        """Take the socket that one of the servers offers, and read from it; or say why not."""
        try:
            self._take_over(request, servers)
        except BlockError as error:
            return stage_pb2.OfferStreamReply(reason=error.reason, explanation=str(error))
        return stage_pb2.OfferStreamReply(accepted=True)

    def close(self) -> None:
        """End all streams; no more are taken."""
        with self._lock:
            self._closed = True
            streams = list(self._open)
        for stream in streams:
            stream.cancel()

    def _take_over(self, request: stage_pb2.OfferStreamRequest, servers: Collection[str]) -> None:
        settings = self._memory.settings
        if settings is None:
            raise BlockError("off", "shared memory is switched off on the receiving server")
        if (reason := unsupported()) is not None:
            raise BlockError("unsupported", reason)
        if request.server not in servers:
            raise BlockError("other-run", f"server {request.server[:64]!r} is not a peer in this run")
        if len(request.ticket) != TICKET_BYTES:
            raise BlockError("failed", "the offer is malformed: its ticket")
        descriptor = take_over(settings.directory, request.socket, request.ticket, _TAKE_OVER_SECONDS)
        try:
            connection = socket.socket(fileno=descriptor)
        except OSError as error:
            os.close(descriptor)
            raise BlockError("failed", f"what was handed over is no socket: {error}") from error
        stream = ReceivingEnd(connection)
        with self._lock:
            if self._closed:
                stream.close()
                raise BlockError("other-run", "the server ends")
            self._open.add(stream)
        threading.Thread(
            target=self._serve, args=(stream, request.server), name=f"stream from {request.server}", daemon=True
        ).start()

    def _serve(self, stream: ReceivingEnd, server: str) -> None:
        try:
            with self._limit, closing(self._make_intake()) as intake:
                for frame in stream.frames():
                    whole = intake.feed(frame)
                    # Not kept alive while the next one is waited for.
                    del frame
                    if whole is not None:
                        stream.receipt(whole.sequence, whole.tensor.size_bytes)
                intake.finish()
                stream.send_receipts()
        except OSError as error:
            _log.info("a stream from a server was cut off", peer=server, reason=str(error))
        except GradwireError as error:
            _log.info("a stream from a server was ended", peer=server, reason=str(error))
            stream.fail(error)
        except Exception as error:  # noqa: BLE001  # whatever it is, the sender must hear of it
            _log.exception("taking messages failed", peer=server)
            stream.fail(InternalError("Taking messages failed", got=repr(error)))
        finally:
            with self._lock:
                self._open.discard(stream)
            stream.close()
