"""Asynchronous sending: one `Deliver` stream to one peer, fed from a queue.

The sender's threads encode and send; `send` only queues. What the peer has received whole, it receipts. Knows bytes
only, and nothing of who sends what to whom.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from gradwire_protocol.errors import Aborted, GradwireError, InternalError, Unreachable, from_rpc_error
from gradwire_protocol.frames import encode_frames
from gradwire_protocol.v1 import tensors_pb2 as pb

DELIVER = "/gradwire_protocol.v1.StageService/Deliver"

# The bytes of a message, or a function that waits for them (a copy from a device), called on the sender's thread.
Payload = memoryview | Callable[[], memoryview] | None


@dataclass(frozen=True, slots=True)
class Delivered:
    """A message that the peer has receipted."""

    header: pb.TensorHeader
    size_bytes: int  # of the payload
    seconds: float  # from `send` to the receipt


class FrameSender:
    """Sends messages to one peer, in order, without making the caller wait for the network.

    Thread-safe. `on_frame` (for each frame that the network takes), `on_delivered` and `on_failure` are called on the
    sender's threads and must not block. maximum_queued_bytes: of payloads that are not receipted, above which `send`
    waits; None: it never does. checksums: every chunk carries one. `place`, called on a thread of the sender, may put a
    payload where the peer finds it by its header (shared memory); then it goes in no chunks.
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
        on_frame: Callable[[], None] | None = None,
        on_delivered: Callable[[Delivered], None] | None = None,
        on_failure: Callable[[GradwireError], None] | None = None,
    ) -> None:
        self._peer = peer
        self._maximum_queued_bytes = maximum_queued_bytes
        self._checksums = checksums
        self._place = place
        self._on_frame = on_frame or (lambda: None)
        self._on_delivered = on_delivered
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._queue: queue.SimpleQueue[tuple[pb.TensorHeader, Payload] | None] = queue.SimpleQueue()
        # Sent or queued, not receipted yet: (header, size, time of `send`).
        self._open: deque[tuple[pb.TensorHeader, int, float]] = deque()
        self._open_bytes = 0
        self._sequence = 0
        self._closing = False
        self._failure: GradwireError | None = None
        call = channel.stream_stream(method, request_serializer=None, response_deserializer=pb.Receipt.FromString)
        # gRPC consumes the iterator on a thread of its own: that is where encoding happens.
        self._stream = call(self._frames(), wait_for_ready=True)
        self._receipts = threading.Thread(target=self._read_receipts, name=f"receipts from {peer}", daemon=True)
        self._receipts.start()

    @property
    def unreceipted(self) -> tuple[int, int]:
        """Messages that the peer has not receipted, and the bytes of their payloads."""
        return len(self._open), self._open_bytes

    def has_room(self, header: pb.TensorHeader) -> bool:
        """Whether `send` would queue this message without waiting: one always fits."""
        if self._maximum_queued_bytes is None or not self._open:
            return True
        return self._open_bytes + header.tensor.size_bytes <= self._maximum_queued_bytes

    def send(self, header: pb.TensorHeader, payload: Payload = None) -> None:
        """Queue one message; sets the header's sequence. Waits for room; a failure, `close` and `cancel` end that."""
        size = header.tensor.size_bytes if header.HasField("tensor") else 0
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._closing or self.has_room(header))
            self._check()
            self._sequence += 1
            header.sequence = self._sequence
            self._open.append((header, size, time.monotonic()))
            self._open_bytes += size
            self._queue.put((header, payload))

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Wait until the peer has receipted everything that was sent."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._failure or not self._open, timeout_seconds):
                raise Unreachable(
                    f"{self._peer} does not take what is sent to it",
                    expected=f"all messages receipted within {timeout_seconds} s",
                    got=f"{len(self._open)} messages, {self._open_bytes} bytes still open",
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
        self._receipts.join(timeout_seconds)
        if self._receipts.is_alive():
            self._stream.cancel()
            self._receipts.join()

    def cancel(self) -> None:
        """End the stream at once; what is queued is dropped. Idempotent."""
        self._fail(Aborted(f"Sending to {self._peer} was cut off"), report=False)
        self._stream.cancel()

    def _check(self) -> None:
        if self._failure:
            raise self._failure
        if self._closing:
            raise Aborted(f"The sender to {self._peer} is closed")

    def _frames(self) -> Iterator[bytes]:
        while (item := self._queue.get()) is not None:
            header, payload = item
            try:
                data = payload() if callable(payload) else payload
                if self._place is not None and data is not None and self._place(header, data):
                    data = payload = None
                for frame in encode_frames(header, data, checksums=self._checksums):
                    yield frame
                    # gRPC comes for the next one when the network has taken this one.
                    self._on_frame()
            except Exception as error:  # noqa: BLE001  # gRPC would swallow it: it must end the stream with its cause
                self._fail(InternalError(f"Cannot encode {header.key.value!r} for {self._peer}: {error!r}"))
                self._stream.cancel()
                return
            # Dropped here, so that waiting in get() keeps no tensor alive.
            del item, payload, data, frame

    def _read_receipts(self) -> None:
        try:
            for receipt in self._stream:
                self._receipted(receipt.sequence)
        except grpc.RpcError as error:
            self._fail(from_rpc_error(error, target=self._peer))
            return
        with self._changed:
            open_messages = len(self._open)
        if open_messages:
            self._fail(Unreachable(f"{self._peer} ended the stream", got=f"{open_messages} messages without receipt"))

    def _receipted(self, sequence: int) -> None:
        now = time.monotonic()
        delivered = []
        with self._changed:
            while self._open and self._open[0][0].sequence <= sequence:
                header, size, since = self._open.popleft()
                self._open_bytes -= size
                delivered.append(Delivered(header, size, now - since))
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
