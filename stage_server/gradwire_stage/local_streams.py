"""Takes the sockets that servers of the same host offer for their messages, in place of Deliver calls, and reads them.

Whoever waits reads: while the compute thread waits for a message it reads all sockets itself, since waking one thread
after another takes longer than a small message. While it computes, a thread of its own reads in its place; that one
keeps off as long as the compute thread comes by often, or both would wake for each message. Nobody waits for room with
a message in hand: what a mailbox holds back stays where it is until the compute thread goes on.

Leaves to others: offering sockets (local_connector.py), and what a frame brings (intake.py).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import structlog

from gradwire_protocol.errors import GradwireError, InternalError, LimitExceeded
from gradwire_protocol.handover import take_over
from gradwire_protocol.local_stream import FIRST, QUIET_SECONDS, SHORT, ReceivingEnd
from gradwire_protocol.shared_block import TICKET_BYTES, BlockError, unsupported
from gradwire_protocol.stream_limit import StreamLimit
from gradwire_protocol.v1 import stage_pb2
from gradwire_stage.bell import Bell, PlainBell
from gradwire_stage.intake import Intake
from gradwire_stage.mailbox import HeldError
from gradwire_stage.shared_memory import SharedMemory

_TAKE_OVER_SECONDS = 4.0
# So long after the compute thread has come by, it is taken to come again; and so often is looked whether it has.
_ATTENDED_SECONDS = 0.05

_log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class _Stream:
    """One socket, and what becomes of what comes over it."""

    server: str
    end: ReceivingEnd
    intake: Intake
    # A frame that found no room, after its form; nothing is read behind it.
    held: tuple[int, bytes] | None = None


class LocalStreams:
    """The sockets that other servers send over to this one. Thread-safe.

    make_intake: makes what takes the frames of a stream. limit: on streams, those of gRPC included.
    """

    def __init__(self, memory: SharedMemory, make_intake: Callable[[], Intake], limit: StreamLimit) -> None:
        self._memory = memory
        self._make_intake = make_intake
        self._unsupported = unsupported()
        # None where no socket will ever be taken.
        self._reader = None if memory.settings is None or self._unsupported else _Reader(limit)

    @property
    def bell(self) -> Bell:
        """Where the compute thread waits for messages."""
        return self._reader or PlainBell()

    @property
    def count(self) -> int:
        """How many are open."""
        return 0 if self._reader is None else self._reader.count

    def take_over(self, request: stage_pb2.OfferStreamRequest, servers: Collection[str]) -> stage_pb2.OfferStreamReply:
        """Take the socket that one of the servers offers, and read from it; or say why not."""
        try:
            self._take_over(request, servers)
        except BlockError as error:
            return stage_pb2.OfferStreamReply(reason=error.reason, explanation=str(error))
        return stage_pb2.OfferStreamReply(accepted=True)

    def close(self) -> None:
        """End all streams; no more are taken."""
        if self._reader is not None:
            self._reader.close()

    def _take_over(self, request: stage_pb2.OfferStreamRequest, servers: Collection[str]) -> None:
        settings = self._memory.settings
        if settings is None:
            raise BlockError("off", "shared memory is switched off on the receiving server")
        if self._reader is None:
            raise BlockError("unsupported", str(self._unsupported))
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
        try:
            self._reader.add(_Stream(request.server, ReceivingEnd(connection), self._make_intake()))
        except BlockError:
            connection.close()
            raise


class _Reader:
    """Reads all sockets, on the compute thread while that waits and on a thread of its own otherwise. A bell."""

    def __init__(self, limit: StreamLimit) -> None:
        self._limit = limit
        self._reading = threading.Lock()  # held by whoever reads; guards all below
        self._streams: dict[int, _Stream] = {}  # by descriptor
        self._held: list[_Stream] = []
        self._closed = False
        self._rung = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # What each of the two threads waits for.
        self._computing, self._watching = select.poll(), select.poll()
        self._computing.register(self._rung, select.POLLIN)
        self._waiting = False  # whether the compute thread waits here
        self._attended = 0.0  # when it was here last (time.monotonic)
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()

    @property
    def count(self) -> int:
        return len(self._streams)

    def add(self, stream: _Stream) -> None:
        """Read a stream from now on. BlockError."""
        with self._reading:
            if self._closed:
                raise BlockError("other-run", "the server ends")
            try:
                self._limit.__enter__()
            except LimitExceeded as error:
                raise BlockError("limit", str(error)) from error
            self._streams[stream.end.fileno()] = stream
            self._listen(stream)
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="local streams", daemon=True)
                self._thread.start()
        self.ring()  # for the compute thread to wait for this stream, too

    def close(self) -> None:
        """End all streams; no more are taken. Idempotent."""
        with self._reading:
            self._closed = True
            for stream in list(self._streams.values()):
                self._end(stream)
        self._ending.set()

    # --- the compute thread's bell

    def ring(self) -> None:
        os.eventfd_write(self._rung, 1)

    def look(self) -> None:
        if self._streams:
            self._attended = time.monotonic()
            with self._reading:
                self._feed_held()
                self._read(self._computing.poll(0))

    def wait(self) -> None:
        self._waiting = True
        try:
            if self._held:
                with self._reading:
                    if self._feed_held():
                        return
            ready = self._computing.poll()
        finally:
            self._waiting = False
            self._attended = time.monotonic()
        with self._reading:
            self._read(ready)
            for descriptor, _ in ready:
                if descriptor == self._rung:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._rung)

    # --- the other thread

    def _watch(self) -> None:
        while not self._closed:
            if self._waiting or time.monotonic() - self._attended < _ATTENDED_SECONDS:
                self._ending.wait(_ATTENDED_SECONDS)
                ready = []
            elif self._streams:
                ready = self._watching.poll(1e3 * QUIET_SECONDS)
            else:
                self._ending.wait(QUIET_SECONDS)
                ready = []
            with self._reading:
                self._feed_held()
                self._read(ready)
                for stream in list(self._streams.values()):
                    if stream.end.quiet:
                        self._guarded(stream, _send_receipts)

    # --- with the lock

    def _read(self, ready: Collection[tuple[int, int]]) -> None:
        for descriptor, _ in ready:
            stream = self._streams.get(descriptor)
            if stream is not None and stream.held is None:
                self._guarded(stream, self._read_stream)

    def _read_stream(self, stream: _Stream) -> None:
        for form, frame in stream.end.read():
            if not self._feed(stream, form, frame):
                self._held.append(stream)
                self._ignore(stream)
                return
            del frame  # not kept alive while the next one is made
        if stream.end.ended:
            stream.intake.finish()
            stream.end.send_receipts()
            self._end(stream)

    def _feed_held(self) -> bool:
        """Try those again that found no room; return whether one of them did."""
        if not self._held:
            return False
        waiting, self._held = self._held, []
        for stream in waiting:
            self._guarded(stream, self._go_on)
        return len(self._held) < len(waiting)

    def _go_on(self, stream: _Stream) -> None:
        held, stream.held = stream.held, None
        if held is not None and not self._feed(stream, *held):
            self._held.append(stream)
            return
        self._listen(stream)
        # What was read with it.
        self._read_stream(stream)

    def _feed(self, stream: _Stream, form: int, frame: bytes) -> bool:
        """Take one frame; False: it found no room, and is kept."""
        try:
            whole = (
                stream.intake.feed_short(frame)
                if form == SHORT
                else stream.intake.feed(frame, wait=False, first=form == FIRST)
            )
        except HeldError:
            stream.held = form, frame
            return False
        if whole is not None:
            stream.end.receipt(*whole)
        return True

    def _guarded(self, stream: _Stream, act: Callable[[_Stream], None]) -> None:
        """Do something with a stream; what fails ends it, and it alone."""
        try:
            act(stream)
            return
        except OSError as error:
            _log.info("a stream from a server was cut off", peer=stream.server, reason=str(error))
        except GradwireError as error:
            _log.info("a stream from a server was ended", peer=stream.server, reason=str(error))
            stream.end.fail(error)
        except Exception as error:  # noqa: BLE001  # whatever it is, the sender must hear of it
            _log.exception("taking messages failed", peer=stream.server)
            stream.end.fail(InternalError("Taking messages failed", got=repr(error)))
        self._end(stream)

    def _end(self, stream: _Stream) -> None:
        if self._streams.pop(stream.end.fileno(), None) is None:
            return
        if stream in self._held:
            self._held.remove(stream)
        self._ignore(stream)
        stream.intake.close()
        stream.end.close()
        self._limit.__exit__()

    def _listen(self, stream: _Stream) -> None:
        self._computing.register(stream.end, select.POLLIN)
        self._watching.register(stream.end, select.POLLIN)

    def _ignore(self, stream: _Stream) -> None:
        """Wait for it no more, not even for its end; nothing if nobody does."""
        for waits in (self._computing, self._watching):
            with contextlib.suppress(KeyError):
                waits.unregister(stream.end)


def _send_receipts(stream: _Stream) -> None:
    stream.end.send_receipts()
