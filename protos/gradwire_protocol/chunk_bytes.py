"""The few bytes of protobuf around a chunk, written and read by hand: one join instead of several copies.

Byte for byte what the generated classes write. What else a frame may look like, and what it means, is frames.py's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

ALIGNMENT = 16
MAXIMUM_PADDING = 32

# Tags: (field number << 3) | wire type.
FRAME_HEADER, FRAME_CHUNK = 0x0A, 0x12
_CHUNK_OFFSET, _CHUNK_PADDING, _CHUNK_DATA, _CHUNK_CHECKSUM = 0x08, 0x12, 0x1A, 0x25
_CHECKSUM_BYTES = 5  # tag and fixed32


class Chunk(NamedTuple):
    """A frame that `encode_chunk` could have made. `header` is encoded, and empty for all but a message's first."""

    header: bytes
    offset: int
    data: memoryview
    checksum: int | None


def varint(number: int) -> bytes:
    """Encode a number of 0 or more."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def header_field(header: bytes) -> bytes:
    """Encode the frame's header field; nothing if there is no header."""
    return bytes((FRAME_HEADER,)) + varint(len(header)) + header if header else b""


def encode_chunk(header: bytes, offset: int, data: bytes | memoryview, checksum: int | None = None) -> bytes:
    """Encode one frame, padded so that the data begin on a multiple of ALIGNMENT. data: of single bytes."""
    before, between = _around_header(len(header), offset, len(data), checksum is not None)
    if checksum is None:
        return b"".join((before, header, between, data))
    return b"".join((before, header, between, data, bytes((_CHUNK_CHECKSUM,)), checksum.to_bytes(4, "little")))


@lru_cache(maxsize=4096)  # messages of a run are of few sizes, and what has been worked out is in no cold cache
def _around_header(header_bytes: int, offset: int, size: int, has_checksum: bool) -> tuple[bytes, bytes]:
    """Return what a frame has before its header's bytes, and between those and its data."""
    before = bytes((FRAME_HEADER,)) + varint(header_bytes) if header_bytes else b""
    offset_field = bytes((_CHUNK_OFFSET,)) + varint(offset) if offset else b""
    data_prefix = bytes((_CHUNK_DATA,)) + varint(size)
    unpadded = len(offset_field) + len(data_prefix) + size + (_CHECKSUM_BYTES if has_checksum else 0)
    missing = _padding_bytes(len(before) + header_bytes + 1 + len(offset_field) + len(data_prefix), unpadded)
    padding = bytes((_CHUNK_PADDING, missing - 2)) + bytes(missing - 2) if missing else b""
    length = varint(unpadded + missing)
    return before, b"".join((bytes((FRAME_CHUNK,)), length, offset_field, padding, data_prefix))


def decode_chunk(frame: bytes) -> Chunk | None:
    """Decode a frame that is laid out as `encode_chunk` does it, its data without a copy; None if it is not."""
    try:
        position, header = 0, b""
        if frame[0] == FRAME_HEADER:
            length, position = _read_varint(frame, 1)
            header = frame[position : position + length]
            position += length
        if frame[position] != FRAME_CHUNK:
            return None
        length, position = _read_varint(frame, position + 1)
        if position + length != len(frame):
            return None
        offset = 0
        if frame[position] == _CHUNK_OFFSET:
            offset, position = _read_varint(frame, position + 1)
        if frame[position] == _CHUNK_PADDING:
            length, position = _read_varint(frame, position + 1)
            position += length
            if length > MAXIMUM_PADDING:
                return None
        if frame[position] != _CHUNK_DATA:
            return None
        length, position = _read_varint(frame, position + 1)
        end, checksum = position + length, None
        if end + _CHECKSUM_BYTES == len(frame) and frame[end] == _CHUNK_CHECKSUM:
            checksum = int.from_bytes(frame[end + 1 :], "little")
        elif end != len(frame):
            return None
    except IndexError:
        return None
    if offset > 2**63:
        return None
    return Chunk(header, offset, memoryview(frame)[position:end], checksum)


def _padding_bytes(before: int, unpadded: int) -> int:
    """Return the size of a padding field that aligns what follows `before` bytes and the chunk's length prefix.

    It depends on the size of that prefix, which depends on it: the first pair that agrees. A padding field takes three
    bytes at least (tag, length, and one zero), or none.
    """
    shortest = len(varint(unpadded))
    for length_bytes in (shortest, shortest + 1):
        least = -(before + length_bytes) % ALIGNMENT
        for missing in (least, least + ALIGNMENT, least + 2 * ALIGNMENT):
            if missing not in (1, 2) and len(varint(unpadded + missing)) == length_bytes:
                return missing
    raise AssertionError("one of these always agrees")


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
