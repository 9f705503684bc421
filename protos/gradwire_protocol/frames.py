"""Tensor frames: messages cut into `TensorFrame` bytes, and put together again under limits.

The hot path writes and reads the chunk's few bytes of protobuf by hand, wire-compatible with the generated classes
(ten times faster: one join instead of several copies); headers, and every frame that is not laid out exactly as
`encode_frames` does it, go through the generated class. Knows bytes only: torch_tensors.py makes tensors of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from gradwire_protocol.errors import FrameError, LimitExceeded
from gradwire_protocol.v1 import tensors_pb2 as pb

CHUNK_BYTES = 2**20
MAXIMUM_CHUNK_BYTES = 4 * 2**20
MAXIMUM_DIMENSIONS = 32
MAXIMUM_RUN_CHARACTERS = 64
MAXIMUM_VALUE_BYTES = 512
MAXIMUM_STATE_BYTES = 64
_ALIGNMENT = 16
_MAXIMUM_PADDING = 32

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

# Tags of the hand-written fields: (field number << 3) | wire type.
_FRAME_HEADER, _FRAME_CHUNK = 0x0A, 0x12
_CHUNK_OFFSET, _CHUNK_PADDING, _CHUNK_DATA = 0x08, 0x12, 0x1A


@dataclass(frozen=True, slots=True)
class Message:
    """A whole message: its header, and its payload if it carries a tensor that is not empty.

    Nobody may write to the payload: it can lie inside the bytes that gRPC handed over.
    """

    header: pb.TensorHeader
    payload: memoryview | None


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _padding_bytes(before: int, unpadded: int) -> int:
    """Return the size of a padding field that aligns what follows `before` bytes and the chunk's length prefix.

    It depends on the size of that prefix, which depends on it: the first pair that agrees. A padding field takes three
    bytes at least (tag, length, and one zero), or none.
    """
    shortest = len(_varint(unpadded))
    for length_bytes in (shortest, shortest + 1):
        least = -(before + length_bytes) % _ALIGNMENT
        for missing in (least, least + _ALIGNMENT, least + 2 * _ALIGNMENT):
            if missing not in (1, 2) and len(_varint(unpadded + missing)) == length_bytes:
                return missing
    raise AssertionError("one of these always agrees")


def _chunk_frame(header: bytes, offset: int, data: memoryview) -> bytes:
    """Encode one frame; `header` is empty for all frames but a message's first."""
    size = data.nbytes
    start = bytes((_FRAME_HEADER,)) + _varint(len(header)) + header if header else b""
    offset_field = bytes((_CHUNK_OFFSET,)) + _varint(offset) if offset else b""
    data_prefix = bytes((_CHUNK_DATA,)) + _varint(size)
    unpadded = len(offset_field) + len(data_prefix) + size
    before = len(start) + 1 + len(offset_field) + len(data_prefix)
    missing = _padding_bytes(before, unpadded)
    padding = bytes((_CHUNK_PADDING, missing - 2)) + bytes(missing - 2) if missing else b""
    chunk_length = _varint(unpadded + missing)
    return b"".join((start, bytes((_FRAME_CHUNK,)), chunk_length, offset_field, padding, data_prefix, data))


def encode_frames(header: pb.TensorHeader, payload: memoryview | None) -> Iterator[bytes]:
    """Yield the encoded TensorFrames of one message: header and first chunk in one, 1 MiB chunks after that.

    `payload` must have the header's `size_bytes`; None or empty for messages without one.
    """
    encoded = header.SerializeToString()
    size = 0 if payload is None else payload.nbytes
    if payload is None or size == 0:
        yield bytes((_FRAME_HEADER,)) + _varint(len(encoded)) + encoded
        return
    flat = payload.cast("B")
    for offset in range(0, size, CHUNK_BYTES):
        yield _chunk_frame(encoded if offset == 0 else b"", offset, flat[offset : offset + CHUNK_BYTES])


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Return (number, position behind it); IndexError at the end of the data."""
    result = shift = 0
    while True:
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
        if shift > 63:
            raise IndexError


def _decode_exact(data: bytes) -> tuple[bytes, int, memoryview] | None:
    """Decode a frame that is laid out as `_chunk_frame` does it: (header, offset, data). None if it is not."""
    try:
        position, header = 0, b""
        if data[0] == _FRAME_HEADER:
            length, position = _read_varint(data, 1)
            header = data[position : position + length]
            position += length
        if data[position] != _FRAME_CHUNK:
            return None
        length, position = _read_varint(data, position + 1)
        if position + length != len(data):
            return None
        offset = 0
        if data[position] == _CHUNK_OFFSET:
            offset, position = _read_varint(data, position + 1)
        if data[position] == _CHUNK_PADDING:
            length, position = _read_varint(data, position + 1)
            position += length
            if length > _MAXIMUM_PADDING:
                return None
        if data[position] != _CHUNK_DATA:
            return None
        length, position = _read_varint(data, position + 1)
    except IndexError:
        return None
    if position + length != len(data) or offset > 2**63:
        return None
    return header, offset, memoryview(data)[position:]


def decode_frame(data: bytes) -> tuple[pb.TensorHeader | None, int, memoryview | None]:
    """Decode one TensorFrame to (header, offset of the chunk, data of the chunk); None for what is not there."""
    exact = _decode_exact(data)
    try:
        if exact is not None:
            header, offset, payload = exact
            return (pb.TensorHeader.FromString(header) if header else None), offset, payload
        frame = pb.TensorFrame.FromString(data)
    except DecodeError as error:
        raise FrameError("A frame is not a TensorFrame message", got=f"{len(data)} bytes: {error}") from error
    if len(frame.chunk.padding) > _MAXIMUM_PADDING:
        raise FrameError(
            "A chunk has too much padding",
            expected=f"{_MAXIMUM_PADDING} bytes at most",
            got=str(len(frame.chunk.padding)),
        )
    return (
        frame.header if frame.HasField("header") else None,
        frame.chunk.offset,
        memoryview(frame.chunk.data) if frame.HasField("chunk") else None,
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
    if key.direction not in pb.Direction.values() or key.direction == pb.DIRECTION_UNSPECIFIED:
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
    if info.codec != pb.CODEC_NONE:
        raise FrameError("Unknown codec", expected="CODEC_NONE", got=str(info.codec))
    if len(info.shape) > MAXIMUM_DIMENSIONS:
        raise FrameError("Too many dimensions", expected=f"{MAXIMUM_DIMENSIONS} at most", got=str(len(info.shape)))
    if any(size < 0 for size in info.shape):
        raise FrameError("A dimension is negative", got=str(list(info.shape)))
    size = math.prod(info.shape) * element
    if size != info.size_bytes:
        raise FrameError(
            "A payload does not fit its shape",
            expected=f"{size} bytes for {list(info.shape)}",
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
    return size


class FrameAssembler:
    """Puts the frames of one stream together to messages; keeps no more than one message.

    Allocates only after a header has passed `check_header`, and refuses gaps, repeats and overruns.
    """

    def __init__(self, maximum_tensor_bytes: int = 8 * 2**30) -> None:
        self._maximum_tensor_bytes = maximum_tensor_bytes
        self._header: pb.TensorHeader | None = None  # of the message in progress
        self._buffer = memoryview(b"")
        self._received = 0
        self._sequence = 0

    def feed(self, data: bytes) -> Message | None:
        """Take one encoded frame; return the message that it completes, or None. FrameError, LimitExceeded."""
        header, offset, chunk = decode_frame(data)
        if header is not None:
            if self._header is not None:
                raise FrameError(
                    "A header came inside a message",
                    expected=f"{self._buffer.nbytes - self._received} more bytes of {self._header.key.value!r}",
                )
            size = check_header(header, self._maximum_tensor_bytes)
            if header.sequence != self._sequence + 1:
                raise FrameError(
                    "A message is missing or repeated on its stream",
                    expected=f"sequence {self._sequence + 1}",
                    got=str(header.sequence),
                )
            self._sequence += 1
            if size == 0:
                if chunk is not None and chunk.nbytes:
                    raise FrameError("A message without payload has a chunk", got=f"{chunk.nbytes} bytes")
                return Message(header, None)
            if chunk is not None and chunk.nbytes == size and offset == 0 and size <= MAXIMUM_CHUNK_BYTES:
                return Message(header, chunk)
            self._header, self._received = header, 0
            # Not zeroed, and aligned for any element type.
            self._buffer = np.empty(size, np.uint8).data
        if chunk is None:
            if header is None:
                raise FrameError("A frame is empty", expected="a header, a chunk, or both")
            return None
        return self._add(offset, chunk)

    def _add(self, offset: int, chunk: memoryview) -> Message | None:
        if self._header is None:
            raise FrameError("A chunk came without a header", got=f"{chunk.nbytes} bytes at offset {offset}")
        if not 0 < chunk.nbytes <= MAXIMUM_CHUNK_BYTES:
            raise FrameError(
                "A chunk has a wrong size", expected=f"1 to {MAXIMUM_CHUNK_BYTES} bytes", got=str(chunk.nbytes)
            )
        if offset != self._received:
            raise FrameError("A chunk is missing or repeated", expected=f"offset {self._received}", got=str(offset))
        if offset + chunk.nbytes > self._buffer.nbytes:
            raise FrameError(
                "A chunk overruns its tensor",
                expected=f"{self._buffer.nbytes - offset} bytes at most",
                got=str(chunk.nbytes),
            )
        self._buffer[offset : offset + chunk.nbytes] = chunk
        self._received += chunk.nbytes
        if self._received < self._buffer.nbytes:
            return None
        message = Message(self._header, self._buffer)
        self._header, self._buffer = None, memoryview(b"")
        return message

    def finish(self) -> None:
        """Refuse a stream that ends inside a message."""
        if self._header is not None:
            raise FrameError(
                "A stream ended inside a message",
                expected=f"{self._buffer.nbytes} bytes of {self._header.key.value!r}",
                got=str(self._received),
            )
