"""Tensor frames: messages cut into `TensorFrame` bytes, and put together again under limits.

The hot path writes and reads the chunk's few bytes of protobuf by hand (chunk_bytes.py), which is ten times faster;
headers, and every frame that is not laid out exactly as `encode_frames` does it, go through the generated class. Knows
bytes only: torch_tensors.py makes tensors of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from gradwire_protocol.activities import message_words
from gradwire_protocol.checksums import crc32c
from gradwire_protocol.chunk_bytes import MAXIMUM_PADDING, decode_chunk, encode_chunk, header_field
from gradwire_protocol.codecs import FLOATING, check_encoded
from gradwire_protocol.errors import FrameError, LimitExceeded
from gradwire_protocol.v1 import tensors_pb2 as pb

CHUNK_BYTES = 2**20
MAXIMUM_CHUNK_BYTES = 4 * 2**20
MAXIMUM_DIMENSIONS = 32
MAXIMUM_RUN_CHARACTERS = 64
MAXIMUM_VALUE_BYTES = 512
MAXIMUM_STATE_BYTES = 64
_MAXIMUM_KNOWN = 1024

ELEMENT_BYTES: dict[int, int] = {
    pb.DATA_TYPE_FLOAT64: 8,
    pb.DATA_TYPE_FLOAT32: 4,
    pb.DATA_TYPE_FLOAT16: 2,
    pb.DATA_TYPE_BFLOAT16: 2,
    pb.DATA_TYPE_INT64: 8,
    pb.DATA_TYPE_INT32: 4,
    pb.DATA_TYPE_INT16: 2,
    pb.DATA_TYPE_INT8: 1,
    pb.DATA_TYPE_UINT8: 1,
    pb.DATA_TYPE_BOOL: 1,
    pb.DATA_TYPE_COMPLEX64: 8,
    pb.DATA_TYPE_COMPLEX128: 16,
}

_DIFFERENTIABLE = frozenset({*FLOATING, pb.DATA_TYPE_COMPLEX64, pb.DATA_TYPE_COMPLEX128})
_DIRECTIONS = frozenset(pb.Direction.values()) - {pb.DIRECTION_UNSPECIFIED}


def decoded_bytes(info: pb.TensorInfo) -> int:
    """Return the bytes that the tensor of a checked header takes without its codec."""
    return info.size_bytes if info.codec == pb.CODEC_NONE else ELEMENT_BYTES[info.data_type] * math.prod(info.shape)


@dataclass(frozen=True, slots=True)
class Message:
    """A whole message: its header, and its payload if it carries a tensor that is not empty.

    Nobody may write to the payload: it can lie inside the bytes that gRPC handed over.
    """

    header: pb.TensorHeader
    payload: memoryview | None
    # False: it was skipped, and its payload with it.
    kept: bool = True


class Frame(NamedTuple):
    """A decoded TensorFrame; None for what is not there."""

    header: pb.TensorHeader | None
    offset: int
    data: memoryview | None
    checksum: int | None


class Admission(Enum):
    """What becomes of a message whose header has come."""

    KEEP = "keep"
    # Keep it if every chunk has the right checksum.
    KEEP_CHECKED = "keep checked"
    # Check its chunks, and let them go.
    SKIP = "skip"


def encode_frames(header: pb.TensorHeader, payload: memoryview | None, *, checksums: bool = False) -> Iterator[bytes]:
    """Yield the encoded TensorFrames of one message: header and first chunk in one, 1 MiB chunks after that.

    `payload` must have the header's `size_bytes`; None or empty for messages without one.
    """
    yield encode_first_frame(header, payload, checksums=checksums)
    if payload is not None and payload.nbytes > CHUNK_BYTES:
        flat = payload.cast("B")
        for offset in range(CHUNK_BYTES, len(flat), CHUNK_BYTES):
            data = flat[offset : offset + CHUNK_BYTES]
            yield encode_chunk(b"", offset, data, crc32c(data) if checksums else None)


def encode_first_frame(header: pb.TensorHeader, payload: memoryview | None, *, checksums: bool = False) -> bytes:
    """Encode a message's first frame, which is the only one up to CHUNK_BYTES."""
    encoded = header.SerializeToString()
    if not payload:
        return header_field(encoded)
    data = payload.cast("B")[:CHUNK_BYTES]
    return encode_chunk(encoded, 0, data, crc32c(data) if checksums else None)


def decode_frame(data: bytes) -> Frame:
    """Decode one TensorFrame, its chunk's data without a copy. FrameError."""
    exact = decode_chunk(data)
    try:
        if exact is not None:
            header = pb.TensorHeader.FromString(exact.header) if exact.header else None
            return Frame(header, exact.offset, exact.data, exact.checksum)
        frame = pb.TensorFrame.FromString(data)
    except DecodeError as error:
        raise FrameError("A frame is not a TensorFrame message", got=f"{len(data)} bytes: {error}") from error
    if len(frame.chunk.padding) > MAXIMUM_PADDING:
        raise FrameError(
            "A chunk has too much padding",
            expected=f"{MAXIMUM_PADDING} bytes at most",
            got=str(len(frame.chunk.padding)),
        )
    return Frame(
        frame.header if frame.HasField("header") else None,
        frame.chunk.offset,
        memoryview(frame.chunk.data) if frame.HasField("chunk") else None,
        frame.chunk.checksum if frame.chunk.HasField("checksum") else None,
    )


def check_strides(shape: Sequence[int], strides: Sequence[int]) -> None:
    """Refuse strides that are not a permutation of the contiguous ones."""
    if len(strides) != len(shape):
        raise FrameError("Strides do not fit the shape", expected=f"{len(shape)} of them", got=str(len(strides)))
    expected = 1
    # Dimensions of size 1 may have any stride: it is never used.
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != expected:
            raise FrameError(
                "Strides leave gaps or overlap",
                expected="a permutation of the contiguous strides",
                got=f"{list(strides)} for shape {list(shape)}",
            )
        expected *= size


def check_header(header: pb.TensorHeader, maximum_tensor_bytes: int) -> int:
    """Check a header against the contract; return the bytes of payload that follow."""
    key = header.key
    if not 1 <= len(key.run) <= MAXIMUM_RUN_CHARACTERS:
        raise FrameError(
            "A message key has a wrong run", expected=f"1 to {MAXIMUM_RUN_CHARACTERS} characters", got=str(len(key.run))
        )
    if len(key.value.encode()) > MAXIMUM_VALUE_BYTES:
        raise FrameError(
            "A message key has a value name that is too long",
            expected=f"{MAXIMUM_VALUE_BYTES} bytes at most",
            got=str(len(key.value.encode())),
        )
    if len(key.state.encode()) > MAXIMUM_STATE_BYTES:
        raise FrameError(
            "A message key has a state name that is too long",
            expected=f"{MAXIMUM_STATE_BYTES} bytes at most",
            got=str(len(key.state.encode())),
        )
    if key.entry == 0:
        raise FrameError("A message key has no entry", expected="1 or more", got="0")
    if key.direction not in _DIRECTIONS:
        raise FrameError(
            "A message key has an unknown direction",
            expected=f"one of {pb.Direction.keys()[1:]}",
            got=str(key.direction),
        )
    kind = header.WhichOneof("value")
    if kind is None:
        raise FrameError("A header has no value", expected="a tensor, number or absent", got="none")
    if kind != "tensor":
        return 0
    info = header.tensor
    element = ELEMENT_BYTES.get(info.data_type)
    if element is None:
        raise FrameError("Unknown data type", expected=f"one of {pb.DataType.keys()[1:]}", got=str(info.data_type))
    if info.requires_grad and info.data_type not in _DIFFERENTIABLE:
        raise FrameError(f"{key.value!r} cannot have a gradient", got=pb.DataType.Name(info.data_type))
    if len(info.shape) > MAXIMUM_DIMENSIONS:
        raise FrameError("Too many dimensions", expected=f"{MAXIMUM_DIMENSIONS} at most", got=str(len(info.shape)))
    if any(size < 0 for size in info.shape):
        raise FrameError("A dimension is negative", got=str(list(info.shape)))
    elements = math.prod(info.shape)
    size = elements * element
    payload = size if info.codec == pb.CODEC_NONE else check_encoded(info, key.direction, elements)
    if payload != info.size_bytes:
        raise FrameError(
            "A payload does not fit its shape",
            expected=f"{payload} bytes for {list(info.shape)}",
            got=f"{info.size_bytes} bytes",
        )
    if size > maximum_tensor_bytes:
        raise LimitExceeded(
            f"Tensor {key.value!r} is too large",
            expected=f"{maximum_tensor_bytes} bytes at most",
            got=f"{size} bytes",
            remedy="raise the receiver's limit, or cut the tensor",
        )
    if size and info.strides:
        check_strides(info.shape, info.strides)
    elif any(stride < 0 for stride in info.strides):
        raise FrameError("A stride is negative", got=str(list(info.strides)))
    return payload


class FrameAssembler:
    """Puts the frames of one stream together to messages; keeps no more than one message.

    Allocates only after a header has passed `check_header` and was admitted; refuses gaps, repeats and overruns.
    `admit` gets each header and the bytes of payload that follow, and says what becomes of the message; it may wait.
    `shared`, called after that, finds a payload that lies in shared memory (None: skip the message); without it there
    may be none.
    """

    def __init__(
        self,
        maximum_tensor_bytes: int = 8 * 2**30,
        admit: Callable[[pb.TensorHeader, int], Admission] = lambda header, size: Admission.KEEP,
        shared: Callable[[pb.SharedSlot, int], memoryview | None] | None = None,
    ) -> None:
        self._maximum_tensor_bytes = maximum_tensor_bytes
        self._admit = admit
        self._shared = shared
        self._header: pb.TensorHeader | None = None  # of the message in progress
        self._admission = Admission.KEEP
        self._size = 0
        self._buffer: memoryview | None = None  # None: skipped
        self._received = 0
        self._sequence = 0
        # Payload bytes of descriptions that have been checked, by what names a message but for entry and micro-batch.
        self._known: dict[tuple[str, str, int, int, str, int], tuple[pb.TensorInfo, int]] = {}

    @property
    def header(self) -> pb.TensorHeader | None:
        """The header of the message in progress."""
        return self._header

    @property
    def sequence(self) -> int:
        """Of the last message that came, whole or not."""
        return self._sequence

    def count_message(self) -> int:
        """Count a message that came another way than through `feed`, between two of those; return its sequence."""
        self._sequence += 1
        return self._sequence

    def feed(self, data: bytes) -> Message | None:
        """Take one encoded frame; return the message that it completes, or None. FrameError, LimitExceeded."""
        header, offset, chunk, checksum = decode_frame(data)
        if header is not None:
            if self._header is not None:
                raise FrameError(
                    "A header came inside a message",
                    expected=f"{self._size - self._received} more bytes of {self._header.key.value!r}",
                )
            size = self._size_of(header)
            if header.sequence != self._sequence + 1:
                raise FrameError(
                    "A message is missing or repeated on its stream",
                    expected=f"sequence {self._sequence + 1}",
                    got=str(header.sequence),
                )
            if size == 0 and chunk is not None and chunk.nbytes:
                raise FrameError("A message without payload has a chunk", got=f"{chunk.nbytes} bytes")
            admission = self._admit(header, size)  # what it raises leaves everything as it was
            self._sequence += 1
            kept = admission is not Admission.SKIP
            if size == 0:
                return Message(header, None, kept)
            if header.tensor.HasField("shared"):
                return self._in_shared_memory(header, size, chunk, kept)
            self._header, self._admission, self._size, self._received = header, admission, size, 0
            if chunk is not None and chunk.nbytes == size and offset == 0 and size <= MAXIMUM_CHUNK_BYTES:
                self._check(offset, chunk, checksum)
                return self._whole(chunk)
            # Not zeroed, and aligned for any element type.
            self._buffer = np.empty(size, np.uint8).data if kept else None
        if chunk is None:
            if header is None:
                raise FrameError("A frame is empty", expected="a header, a chunk, or both")
            return None
        return self._add(offset, chunk, checksum)

    def _size_of(self, header: pb.TensorHeader) -> int:
        """Do what `check_header` does; what was checked once, but for entry and micro-batch, is not checked again."""
        key = header.key
        kind = (key.run, key.value, key.direction, key.source_stage, key.state, key.source_member)
        known = self._known.get(kind)
        if known is not None and known[0] == header.tensor and key.entry:
            return known[1]
        size = check_header(header, self._maximum_tensor_bytes)
        if size:
            if len(self._known) >= _MAXIMUM_KNOWN:
                self._known.clear()
            info = pb.TensorInfo()
            info.CopyFrom(header.tensor)
            self._known[kind] = info, size
        return size

    def _in_shared_memory(self, header: pb.TensorHeader, size: int, chunk: memoryview | None, kept: bool) -> Message:
        if self._shared is None or chunk is not None:
            raise FrameError(
                "A payload in shared memory is not expected",
                expected="a payload in chunks" if self._shared is None else "no chunk, as the payload lies elsewhere",
                got=f"slot {header.tensor.shared.slot}",
            )
        # Looked at even if it is skipped, so that the sender gets the slot back.
        payload = self._shared(header.tensor.shared, size)
        kept = kept and payload is not None
        return Message(header, payload if kept else None, kept)

    def _add(self, offset: int, chunk: memoryview, checksum: int | None) -> Message | None:
        if self._header is None:
            raise FrameError("A chunk came without a header", got=f"{chunk.nbytes} bytes at offset {offset}")
        if not 0 < chunk.nbytes <= MAXIMUM_CHUNK_BYTES:
            raise FrameError(
                "A chunk has a wrong size", expected=f"1 to {MAXIMUM_CHUNK_BYTES} bytes", got=str(chunk.nbytes)
            )
        if offset != self._received:
            raise FrameError("A chunk is missing or repeated", expected=f"offset {self._received}", got=str(offset))
        if offset + chunk.nbytes > self._size:
            raise FrameError(
                "A chunk overruns its tensor",
                expected=f"{self._size - offset} bytes at most",
                got=str(chunk.nbytes),
            )
        self._check(offset, chunk, checksum)
        if self._buffer is not None:
            self._buffer[offset : offset + chunk.nbytes] = chunk
        self._received += chunk.nbytes
        return self._whole(self._buffer) if self._received == self._size else None

    def _check(self, offset: int, chunk: memoryview, checksum: int | None) -> None:
        """Refuse a wrong checksum where they count."""
        if self._admission is not Admission.KEEP_CHECKED or self._header is None:
            return
        actual = crc32c(chunk)
        if checksum != actual:
            raise FrameError(
                f"A chunk at offset {offset} is not what was sent: {message_words(self._header.key)}, "
                f"entry {self._header.key.entry}",
                expected="a checksum" if checksum is None else f"CRC-32C {checksum:08x}",
                got=f"{actual:08x} over {chunk.nbytes} bytes",
                remedy="look for a fault in the network or the memory of the two machines",
            )

    def _whole(self, payload: memoryview | None) -> Message:
        """Return the message in progress, which is whole, and be ready for the next."""
        kept = self._admission is not Admission.SKIP
        message = Message(self._header or pb.TensorHeader(), payload if kept else None, kept)
        self._header = self._buffer = None
        return message

    def finish(self) -> None:
        """Refuse a stream that ends inside a message."""
        if self._header is not None:
            raise FrameError(
                "A stream ended inside a message",
                expected=f"{self._size} bytes of {self._header.key.value!r}",
                got=str(self._received),
            )
