"""A stream between two processes of one host: frames one way and receipts the other, over a connected unix socket.

What it carries is what a `Deliver` stream carries; a frame comes after its length, and no frame at all asks for the
receipts that are due. Receipts come several at once, each with the time of its message (both ends have one clock), so
that a small message costs one write and one read. Leaves to others: how the two got the socket (handover.py), what is
sent (delivery.py), and what becomes of frames (the stage server's intake).
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence

from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from gradwire_protocol.errors import FrameError, GradwireError, InternalError, from_status, to_status
from gradwire_protocol.frames import MAXIMUM_CHUNK_BYTES

# Beside its chunk a frame has its header, which is far smaller than this.
MAXIMUM_FRAME_BYTES = MAXIMUM_CHUNK_BYTES + 2**16
# Receipts are due after so many messages, or bytes of payload, or when nothing has come for a while.
RECEIPT_MESSAGES = 16
RECEIPT_BYTES = 2**18
QUIET_SECONDS = 0.1

_LENGTH = struct.Struct("<I")
_RECEIPT = struct.Struct("<Qd")  # sequence, time.monotonic() when the message was whole
_ERROR = 2**64 - 1  # in place of a sequence: the size of a google.rpc.Status follows in place of the time
_MAXIMUM_ERROR_BYTES = 2**16
_READ_BYTES = 2**16
_SOCKET_BYTES = 2**20


def connected_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a new stream; the kernel holds as much on its way as it allows, up to 1 MiB."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
    return ends


class SendingEnd:
    """Writes frames and reads receipts. One thread for each, and whoever writes must be alone in it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._users = 2

    def write(self, frame: bytes) -> None:
        """Write one frame, empty to ask for receipts; waits for room. OSError."""
        sent = self._connection.sendmsg([_LENGTH.pack(len(frame)), frame])
        if sent < _LENGTH.size + len(frame):
            self.write_rest((_LENGTH.pack(len(frame)) + frame)[sent:])

    def write_rest(self, rest: bytes) -> None:
        """Write what `try_write` has left. OSError."""
        self._connection.sendall(rest)

    def try_write(self, frames: Sequence[bytes]) -> bytes:
        """Write frames as far as there is room at once; return what is left of them. OSError."""
        parts = [part for frame in frames for part in (_LENGTH.pack(len(frame)), frame)]
        try:
            sent = self._connection.sendmsg(parts, (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        return b"" if sent == sum(map(len, parts)) else b"".join(parts)[sent:]

    def receipts(self) -> Iterator[list[tuple[int, float]]]:
        """Yield (sequence, time of arrival) of messages as their receipts come; raise the receiver's typed error."""
        data = b""
        while part := self._connection.recv(_READ_BYTES):
            data += part
            found: list[tuple[int, float]] = []
            for position in range(0, len(data) - _RECEIPT.size + 1, _RECEIPT.size):
                sequence, arrived = _RECEIPT.unpack_from(data, position)
                if sequence == _ERROR:
                    if found:
                        yield found
                    raise self._read_error(data[position + _RECEIPT.size :], int(arrived))
                found.append((sequence, arrived))
            data = data[len(found) * _RECEIPT.size :]
            if found:
                yield found

    def end(self) -> None:
        """No more frames will come. OSError."""
        self._connection.shutdown(socket.SHUT_WR)

    def cancel(self) -> None:
        """End the stream at once, both ways; whoever waits in it goes on. Any thread; idempotent."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """One of the two threads needs it no more; after the second it is closed."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._connection.close()

    def _read_error(self, data: bytes, size: int) -> GradwireError:
        while len(data) < min(size, _MAXIMUM_ERROR_BYTES) and (part := self._connection.recv(_READ_BYTES)):
            data += part
        try:
            error = from_status(status_pb2.Status.FromString(data))
        except DecodeError:
            error = None
        return error or InternalError("The receiver of a stream ended it, and its reason cannot be read")


class ReceivingEnd:
    """Reads frames and writes receipts, on one thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        seconds, parts = divmod(QUIET_SECONDS, 1)
        quiet = struct.pack("ll", int(seconds), int(parts * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, quiet)
        self._due = bytearray()
        self._unreceipted_bytes = 0

    def frames(self) -> Iterator[bytes]:
        """Yield frames until the sender ends the stream; FrameError, or OSError where it was cut off."""
        data, position = b"", 0
        while True:
            while len(data) - position >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(data, position)
                if length > MAXIMUM_FRAME_BYTES:
                    raise FrameError(
                        "A frame is too large", expected=f"{MAXIMUM_FRAME_BYTES} bytes at most", got=str(length)
                    )
                end = position + _LENGTH.size + length
                if end > len(data):
                    missing = end - len(data)
                    if missing > _READ_BYTES:
                        data, position = data[position:] + self._read_exactly(missing), 0
                        continue
                    break
                if length:
                    yield data[position + _LENGTH.size : end]
                else:
                    self.send_receipts()
                position = end
            # What is left is less than a frame; the frames before it are kept alive no longer.
            data, position = data[position:], 0
            part = self._read()
            if not part:
                if data:
                    raise FrameError("A stream ended inside a frame", got=f"{len(data)} bytes of it")
                return
            data += part

    def receipt(self, sequence: int, size_bytes: int) -> None:
        """A message is whole. size_bytes: of its payload. OSError."""
        self._unreceipted_bytes += size_bytes
        self._due += _RECEIPT.pack(sequence, time.monotonic())
        if len(self._due) >= RECEIPT_MESSAGES * _RECEIPT.size or self._unreceipted_bytes >= RECEIPT_BYTES:
            self.send_receipts()

    def send_receipts(self) -> None:
        """Send the receipts that are due. OSError."""
        if self._due:
            self._connection.sendall(self._due)
            self._due.clear()
        self._unreceipted_bytes = 0

    def fail(self, error: GradwireError) -> None:
        """Tell the sender why the stream ends, if it still listens."""
        status = to_status(error).SerializeToString()
        with contextlib.suppress(OSError):
            self._connection.sendall(bytes(self._due) + _RECEIPT.pack(_ERROR, len(status)) + status)

    def cancel(self) -> None:
        """End the stream at once; whoever reads goes on. Any thread; idempotent."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._connection.close()

    def _read(self) -> bytes:
        """Return the next bytes, at least one; none at the end of the stream. Sends receipts when nothing comes."""
        while True:
            try:
                return self._connection.recv(_READ_BYTES)
            except BlockingIOError:  # nothing for QUIET_SECONDS
                self.send_receipts()

    def _read_exactly(self, size: int) -> bytes:
        parts = []
        while size:
            try:
                part = self._connection.recv(size, socket.MSG_WAITALL)
            except BlockingIOError:
                self.send_receipts()
                continue
            if not part:
                raise FrameError("A stream ended inside a frame", got=f"{size} bytes are missing")
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
