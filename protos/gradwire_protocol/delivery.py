"""Asynchronous sending: one stream to one peer, fed from a queue.

The stream is a `Deliver` call, or a unix socket where both ends are on one host (local_stream.py). The sender's threads
encode and send; `send` only queues, unless a small message can go on its way at once. What the peer has received whole,
it receipts. Knows bytes only, and nothing of who sends what to whom.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from gradwire_protocol.errors import Aborted, GradwireError, InternalError, Unreachable, from_rpc_error
from gradwire_protocol.frames import encode_first_frame, encode_frames
from gradwire_protocol.local_stream import SendingEnd
from gradwire_protocol.unreceipted import Delivered, Open, Unreceipted
from gradwire_protocol.v1 import tensors_pb2 as pb

DELIVER = "/gradwire_protocol.v1.StageService/Deliver"

# The bytes of a message, or a function that waits for them (a copy from a device), called on the sender's thread.
Payload = memoryview | Callable[[], memoryview] | None


@dataclass(frozen=True, slots=True)
class _Queued:
    """A message for the thread that writes."""

    header: pb.TensorHeader
    payload: Payload
    open: Open


@dataclass(frozen=True, slots=True)
class _Rest:
    """What is left of frames that have been written in part."""

    data: bytes


# In the queue of a local stream: ask for the receipts that are due.
_ASK = _Rest(b"")


class FrameSender:
    """Sends messages to one peer, in order, without making the caller wait for the network.

    Thread-safe. `on_frame` (for each frame that the network takes), `on_delivered` and `on_failure` are called on the
    sender's threads and must not block. maximum_queued_bytes: of payloads that are not receipted, above which `send`
    waits, in the context that `waiting` makes; None: it never does. checksums: every chunk carries one. `place`, called
    on a thread of the sender, may put a payload where the peer finds it by its header (shared memory); then it goes in
    no chunks. `connect`, called on a thread of the sender, returns a socket to the peer if it is on this host, else
    None; over it, payloads of up to `at_once_bytes`, CHUNK_BYTES at most, that are there are written by `send` itself,
    which saves a change of threads, and not placed; larger ones are tried with `place_at_once`, which does what `place`
    does, but does not wait. `before_frame`, called on a thread of the sender before each frame that goes over the
    network, may wait a little.
    After a failure every `send` and `flush` raises it; the sender does not reconnect.
    """

    def __init__(
        self,
        channel: Any,
        peer: str,
        *,
        method: str = DELIVER,
        maximum_queued_bytes: int | None = None,
        checksums: bool = False,
        place: Callable[[pb.TensorHeader, memoryview], bool] | None = None,
        connect: Callable[[], socket.socket | None] | None = None,
        at_once_bytes: int = 0,
        place_at_once: Callable[[pb.TensorHeader, memoryview], bool] | None = None,
        before_frame: Callable[[], None] | None = None,
        waiting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        on_frame: Callable[[], None] | None = None,
        on_delivered: Callable[[Delivered], None] | None = None,
        on_failure: Callable[[GradwireError], None] | None = None,
    ) -> None:
        self._peer = peer
        self._checksums = checksums
        self._place = place
        self._at_once_bytes = at_once_bytes
        self._place_at_once = place_at_once
        self._before_frame = before_frame or (lambda: None)
        self._waiting = waiting
        self._on_frame = on_frame or (lambda: None)
        self._on_delivered = on_delivered
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._queue: queue.SimpleQueue[_Queued | _Rest | None] = queue.SimpleQueue()
        self._unwritten = 0  # items of the queue, until they are written
        self._open = Unreceipted(maximum_queued_bytes)
        self._closing = False
        self._failure: GradwireError | None = None
        self._call = channel.stream_stream(method, request_serializer=None, response_deserializer=pb.Receipt.FromString)
        self._stream: Any = None  # the call's, or a SendingEnd; None: it is still to be seen which
        self._local: SendingEnd | None = None
        self._ended = threading.Event()  # no receipts will come any more
        if connect is None:
            self._open_call()
        else:
            self._start("writer", lambda: self._open_local(connect))

    @property
    def unreceipted(self) -> tuple[int, int]:
        """Messages that the peer has not receipted, and the bytes of their payloads."""
        return len(self._open), self._open.size_bytes

    @property
    def is_held_up(self) -> bool:
        """Whether a message takes longer over the network than it needs to: others are in its way. Any thread."""
        with self._changed:
            return self._open.is_held_up

    def send(self, header: pb.TensorHeader, payload: Payload = None, kind: Hashable = None) -> None:
        """Queue one message; the header is the caller's again when this returns, with its sequence set.

        Waits for room; a failure, `close` and `cancel` end that. kind: the same for headers that differ in entry,
        micro-batch and sequence alone; None: unknown.
        """
        info = header.tensor
        size = info.size_bytes
        with self._changed:
            if not self._open.has_room(size):
                self._ask()
                with self._waiting():
                    self._changed.wait_for(lambda: self._failure or self._closing or self._open.has_room(size))
            self._check()
            message = self._open.add(header.key.direction, info.codec, size)
            header.sequence = message.sequence
            local = self._local
            if local is not None and not self._unwritten and not callable(payload):
                if size <= self._at_once_bytes:
                    self._write_at_once(local, header, payload, kind)
                    return
                if self._place_at_once is not None and payload is not None and self._place_at_once(header, payload):
                    message.shared = True
                    self._write_at_once(local, header, None, None)
                    # The header is the caller's: the next message of its kind lies elsewhere.
                    info.ClearField("shared")
                    return
            kept = pb.TensorHeader()
            kept.CopyFrom(header)
            self._put(_Queued(kept, payload, message))

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Wait until the peer has receipted everything that was sent."""
        with self._changed:
            self._ask()
            if not self._changed.wait_for(lambda: self._failure or not self._open, timeout_seconds):
                raise Unreachable(
                    f"{self._peer} does not take what is sent to it",
                    expected=f"all messages receipted within {timeout_seconds} s",
                    got=f"{len(self._open)} messages, {self._open.size_bytes} bytes still open",
                    remedy="check the network and the peer's log",
                )
            if self._failure:
                raise self._failure

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Send what is queued, end the stream, and cut it off if that takes longer than the timeout. Idempotent."""
        with self._changed:
            if not self._closing:
                self._closing = True
                self._queue.put(None)
                self._changed.notify_all()
        if not self._ended.wait(timeout_seconds):
            self.cancel()
            self._ended.wait()

    def cancel(self) -> None:
        """End the stream at once; what is queued is dropped. Idempotent."""
        self._fail(Aborted(f"Sending to {self._peer} was cut off"), report=False)
        with self._changed:
            stream = self._stream
        if stream is not None:  # otherwise the thread that opens it sees the failure
            stream.cancel()

    def _start(self, role: str, target: Callable[[], None]) -> None:
        threading.Thread(target=target, name=f"{role} of {self._peer}", daemon=True).start()

    def _check(self) -> None:
        if self._failure:
            raise self._failure
        if self._closing:
            raise Aborted(f"The sender to {self._peer} is closed")

    def _put(self, item: _Queued | _Rest) -> None:
        self._unwritten += 1
        self._queue.put(item)

    def _ask(self) -> None:
        """Have receipts come that the peer holds back, where it may. With the lock."""
        if self._local is not None and self._open:
            self._put(_ASK)

    def _frames_of(self, item: _Queued) -> Iterator[bytes]:
        header, payload = item.header, item.payload
        data = payload() if callable(payload) else payload
        if self._place is not None and data is not None and self._place(header, data):
            item.open.shared, data = True, None
        yield from encode_frames(header, data, checksums=self._checksums)

    def _cannot_encode(self, header: pb.TensorHeader, error: Exception) -> None:
        self._fail(InternalError(f"Cannot encode {header.key.value!r} for {self._peer}: {error!r}"))
        self._stream.cancel()

    # Over a call.

    def _open_call(self) -> None:
        # gRPC consumes the iterator on a thread of its own: that is where encoding happens.
        stream = self._call(self._frames(), wait_for_ready=True)
        with self._changed:
            self._stream, over = stream, self._failure is not None
        if over:
            stream.cancel()
        self._start("receipts", lambda: self._read_receipts(stream))

    def _frames(self) -> Iterator[bytes]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, _Rest):
                continue
            try:
                for frame in self._frames_of(item):
                    self._before_frame()
                    yield frame
                    # gRPC comes for the next one when the network has taken this one.
                    self._on_frame()
            except Exception as error:  # noqa: BLE001  # gRPC would swallow it: it must end the stream with its cause
                self._cannot_encode(item.header, error)
                return
            # Dropped here, so that waiting in get() keeps no tensor alive.
            del item, frame

    def _read_receipts(self, stream: Any) -> None:
        try:
            for receipt in stream:
                self._receipted([(receipt.sequence, time.monotonic())])
            self._over(f"{self._peer} ended the stream", ended_well=True)
        except grpc.RpcError as error:
            self._fail(from_rpc_error(error, target=self._peer))
        finally:
            self._ended.set()

    # Over a socket.

    def _open_local(self, connect: Callable[[], socket.socket | None]) -> None:
        """Connect, and write what is queued; without a socket, the rest is the call's."""
        try:
            connection = connect()
        except Exception as error:  # noqa: BLE001  # on a thread of its own nobody would see it, and all would wait
            self._fail(InternalError(f"Cannot look for a way to {self._peer}: {error!r}"))
            self._ended.set()
            return
        if connection is None:
            if self._failure is None:
                self._open_call()
            else:  # it was cut off meanwhile: nothing of it may be sent
                self._ended.set()
            return
        local = SendingEnd(connection)
        self._start("receipts", lambda: self._read_local_receipts(local))
        with self._changed:
            self._stream = self._local = local
            over = self._failure is not None
        if over:
            local.cancel()
        try:
            self._write_queued(local)
            local.end()
        except OSError:
            # Who reads receipts sees it too, with the peer's reason if there is one.
            pass
        finally:
            local.release()

    def _write_queued(self, local: SendingEnd) -> None:
        while (item := self._queue.get()) is not None:
            if item is _ASK:
                local.write(b"")
            elif isinstance(item, _Rest):
                local.write_rest(item.data)
                self._on_frame()
            else:
                frames = self._frames_of(item)
                while True:
                    try:
                        frame = next(frames, None)
                    except Exception as error:  # noqa: BLE001  # whatever it is must end the stream with its cause
                        self._cannot_encode(item.header, error)
                        return
                    if frame is None:
                        break
                    local.write(frame)
                    self._on_frame()
                del frames, frame
            # Dropped here, so that waiting in get() keeps no tensor alive.
            del item
            with self._changed:
                self._unwritten -= 1

    def _write_at_once(
        self, local: SendingEnd, header: pb.TensorHeader, payload: memoryview | None, kind: Hashable
    ) -> None:
        """Write a message on the thread of `send`; what finds no room is left to the thread that writes."""
        if not payload or self._checksums:
            kind = None
        number = None if kind is None else local.number_of(kind)
        try:
            if number is None or payload is None:
                rest = local.try_write(encode_first_frame(header, payload, checksums=self._checksums), kind)
            else:
                rest = local.try_write_short(number, header.key.entry, header.key.micro_batch, payload)
        except OSError:
            return  # who reads receipts sees it too
        if rest:
            self._put(_Rest(rest))
        else:
            self._on_frame()

    def _read_local_receipts(self, local: SendingEnd) -> None:
        try:
            for receipts in local.receipts():
                self._receipted(receipts)
            self._over(f"Cannot reach {self._peer}: its end of the connection was closed", ended_well=False)
        except OSError as error:
            self._over(f"Cannot reach {self._peer}: {error}", ended_well=False)
        except GradwireError as error:
            self._fail(error)
        finally:
            local.cancel()  # so that nobody writes for nobody
            local.release()
            self._ended.set()

    # What comes back.

    def _over(self, what: str, *, ended_well: bool) -> None:
        """No receipts will come any more: a failure, unless that was asked for and all are there."""
        with self._changed:
            open_messages, closing = len(self._open), self._closing
        if open_messages or not (ended_well or closing):
            self._fail(Unreachable(what, got=f"{open_messages} messages without receipt"))

    def _receipted(self, receipts: Sequence[tuple[int, float]]) -> None:
        with self._changed:
            delivered = self._open.receipted(receipts, over_network=self._local is None)
            self._changed.notify_all()
        if self._on_delivered:
            for message in delivered:
                self._on_delivered(message)

    def _fail(self, error: GradwireError, *, report: bool = True) -> None:
        with self._changed:
            if self._failure:
                return
            self._failure = error
            self._queue.put(None)
            self._changed.notify_all()
            report = report and not (self._closing and not self._open)
        if report and self._on_failure:
            self._on_failure(error)
