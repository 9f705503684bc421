"""A stream between two processes of one host: frames one way and receipts the other, over a connected unix socket.

What it carries is what a `Deliver` stream carries; a frame comes after its length, and no frame at all asks for the
receipts that are due. Receipts come several at once, each with the time of its message (both ends have one clock), so
that a small message costs one write and one read.

A pipeline sends the same few kinds of message over and over: headers that differ in entry, micro-batch and sequence
alone. The frame of the first of a kind is marked as such, and both ends count those; a later message, of one chunk, is
a *short* frame, which names its kind by that number. Its sequence is the next one.

Leaves to others: how the two got the socket (handover.py), what is sent (delivery.py), and what becomes of frames (the
stage server's intake).
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Hashable, Iterator
from typing import NamedTuple

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

# A kind that finds this many before it never travels in short frames.
MAXIMUM_KINDS = 1024


# What stands behind a length, by its two highest bits: an encoded TensorFrame; the same, of the first message of a
# kind; a ShortFrame.
WHOLE, FIRST, SHORT = 0, 1 << 31, 1 << 30
_FORMS = FIRST | SHORT
_LENGTH = struct.Struct("<I")
# 16 bytes behind the length: the payload lies on a multiple of that.
_SHORT = struct.Struct("<IIQ")  # number of the kind (the first is 0), micro-batch, entry
_SHORT_WITH_LENGTH = struct.Struct("<IIIQ")
_RECEIPT = struct.Struct("<Qd")  # sequence, time.monotonic() when the message was whole
_ERROR = 2**64 - 1  # in place of a sequence: the size of a google.rpc.Status follows in place of the time
_MAXIMUM_ERROR_BYTES = 2**16
_READ_BYTES = 2**16
_SOCKET_BYTES = 2**20
_MAXIMUM_DUE_BYTES = 2**20


def connected_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a new stream; the kernel holds as much on its way as it allows, up to 1 MiB."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
    return ends


class ShortFrame(NamedTuple):
    """A message of a kind that both ends know, but for its sequence."""

    kind: int
    entry: int
    micro_batch: int
    payload: memoryview

    @classmethod
    def decode(cls, data: bytes) -> ShortFrame:
        """FrameError."""
        if len(data) <= _SHORT.size:
            raise FrameError("A short frame is cut off", expected=f"more than {_SHORT.size} bytes", got=str(len(data)))
        kind, micro_batch, entry = _SHORT.unpack_from(data)
        return cls(kind, entry, micro_batch, memoryview(data)[_SHORT.size :])


class SendingEnd:
    """Writes frames and reads receipts. One thread for each, and whoever writes must be alone in it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._users = 2
        self._kinds: dict[Hashable, int] = {}

    def write(self, frame: bytes) -> None:
        """Write one frame, empty to ask for receipts; waits for room. OSError."""
        sent = self._connection.sendmsg([_LENGTH.pack(len(frame)), frame])
        if sent < _LENGTH.size + len(frame):
            self.write_rest((_LENGTH.pack(len(frame)) + frame)[sent:])

    def write_rest(self, rest: bytes) -> None:
        """Write what `try_write` has left. OSError."""
        self._connection.sendall(rest)

    def try_write(self, frame: bytes, kind: Hashable = None) -> bytes:
        """Write a frame as far as there is room at once; return what is left of it, to be written next. OSError.

        kind: the frame is the whole of a message with a payload, the first of this kind that is written here.
        """
        length = len(frame)
        if kind is not None and len(self._kinds) < MAXIMUM_KINDS:
            self._kinds[kind] = len(self._kinds)
            length |= FIRST
        return self._try(_LENGTH.pack(length) + frame)

    def number_of(self, kind: Hashable) -> int | None:
        """Return the number of a kind, once one of it was written."""
        return self._kinds.get(kind)

    def try_write_short(self, number: int, entry: int, micro_batch: int, payload: memoryview) -> bytes:
        """Write one more message of a kind as `try_write` does. payload: not empty, CHUNK_BYTES at most."""
        length = _SHORT.size + payload.nbytes | SHORT
        return self._try(_SHORT_WITH_LENGTH.pack(length, number, micro_batch, entry) + payload)

    def _try(self, data: bytes) -> bytes:
        try:
            sent = self._connection.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return data
        return b"" if sent == len(data) else data[sent:]

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
    """Reads frames and writes receipts, and waits for neither. For one thread at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._data = b""  # read, and not yielded yet, from _position on
        self._position = 0
        self._missing = 0  # of the frame that comes next, as far as its length is known
        self._due = bytearray()
        self._unreceipted_bytes = 0
        self._heard = time.monotonic()
        self.ended = False  # no more frames will come

    def fileno(self) -> int:
        return self._connection.fileno()

    def read(self) -> Iterator[tuple[int, bytes]]:
        """Read once, and yield the frames that are whole, each after its form. Whoever stops early gets
        the others next time.

        FrameError, or OSError where it was cut off.
        """
        yield from self._whole()
        try:
            part = self._connection.recv(max(_READ_BYTES, self._missing), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        self._heard = time.monotonic()
        if not part:
            if self._data:
                raise FrameError("A stream ended inside a frame", got=f"{len(self._data)} bytes of it")
            self.ended = True
        self._data += part
        yield from self._whole()

    def _whole(self) -> Iterator[tuple[int, bytes]]:
        """Yield what is whole; what is left is less than a frame, and the frames before it are kept alive no longer."""
        while len(self._data) - self._position >= _LENGTH.size:
            begin = self._position + _LENGTH.size
            (length,) = _LENGTH.unpack_from(self._data, self._position)
            form = length & _FORMS
            length ^= form
            if length > MAXIMUM_FRAME_BYTES:
                raise FrameError(
                    "A frame is too large", expected=f"{MAXIMUM_FRAME_BYTES} bytes at most", got=str(length)
                )
            if form == _FORMS:
                raise FrameError("A frame has no form", expected="whole, the first of a kind, or short", got=hex(form))
            self._missing = begin + length - len(self._data)
            if self._missing > 0:
                break
            self._position = begin + length
            if length or form:
                yield form, self._data[begin : begin + length]
            else:
                self.send_receipts()
        self._data, self._position = self._data[self._position :], 0

    def receipt(self, sequence: int, size_bytes: int) -> None:
        """A message is whole. size_bytes: of its payload. OSError."""
        self._unreceipted_bytes += size_bytes
        self._due += _RECEIPT.pack(sequence, time.monotonic())
        if len(self._due) >= RECEIPT_MESSAGES * _RECEIPT.size or self._unreceipted_bytes >= RECEIPT_BYTES:
            self.send_receipts()

    @property
    def quiet(self) -> bool:
        """Whether receipts are due, and nothing has come for a while."""
        return bool(self._due) and time.monotonic() - self._heard >= QUIET_SECONDS

    def send_receipts(self) -> None:
        """Send the receipts that are due, as far as there is room. OSError; FrameError if nobody reads them."""
        self._unreceipted_bytes = 0
        if not self._due:
            return
        try:
            sent = self._connection.send(self._due, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        del self._due[:sent]
        if len(self._due) > _MAXIMUM_DUE_BYTES:
            raise FrameError("A sender does not read its receipts", got=f"{len(self._due)} bytes of them")

    def fail(self, error: GradwireError) -> None:
        """Tell the sender why the stream ends, if it still listens."""
        status = to_status(error).SerializeToString()
        with contextlib.suppress(OSError):
            self._connection.send(bytes(self._due) + _RECEIPT.pack(_ERROR, len(status)) + status, socket.MSG_DONTWAIT)

    def close(self) -> None:
        self._connection.close()
