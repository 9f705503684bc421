"""Coverage-guided fuzzing of the frame decoder: `make fuzz`, or this script with libFuzzer's arguments.

An input is a stream of frames, each after its length in two bytes. Whatever comes, the assembler must give messages as
the generated classes read them, or refuse them with a typed error, and never allocate above its limit.
"""

from __future__ import annotations

import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import atheris
import numpy as np
from google.protobuf.message import DecodeError

with atheris.instrument_imports(include=["gradwire_protocol", "gradwire_stage.codecs"]):
    from gradwire_protocol import frames
    from gradwire_protocol.codecs import encoded_bytes
    from gradwire_protocol.errors import FrameError, LimitExceeded
    from gradwire_protocol.v1 import tensors_pb2 as pb
    from gradwire_stage.codecs.registry import unpack

LIMIT_BYTES = 2**16

_numpy_empty = np.empty


def _bounded_empty(shape: Any, *arguments: Any, **options: Any) -> Any:
    """Stands in for numpy.empty, which the decoder allocates with."""
    made = _numpy_empty(shape, *arguments, **options)
    if made.nbytes > LIMIT_BYTES:
        raise AssertionError(f"{made.nbytes} bytes were allocated, {LIMIT_BYTES} are allowed")
    return made


def split(data: bytes) -> Iterator[bytes]:
    """Yield the frames of an input; the last may be cut off."""
    position = 0
    while position + 2 <= len(data):
        (size,) = struct.unpack_from("<H", data, position)
        yield data[position + 2 : position + 2 + size]
        position += 2 + size


def check_decoded(frame: bytes) -> None:
    """The hand-written decoder and the generated class read the same, or both refuse."""
    try:
        expected = pb.TensorFrame.FromString(frame)
    except DecodeError:
        expected = None
    try:
        header, offset, chunk, _ = frames.decode_frame(frame)
    except FrameError:
        if expected is not None and len(expected.chunk.padding) <= 32:
            raise AssertionError("a frame was refused that the generated class reads") from None
        return
    if expected is None:
        raise AssertionError("a frame was read that the generated class refuses")
    if (header is not None) != expected.HasField("header") and expected.header != pb.TensorHeader():
        raise AssertionError("one decoder saw a header, the other did not")
    if header is not None and header != expected.header:
        raise AssertionError("the headers differ")
    if offset != expected.chunk.offset or bytes(chunk or b"") != expected.chunk.data:
        raise AssertionError("the chunks differ")


def check_stream(data: bytes) -> None:
    """One input."""
    assembler = frames.FrameAssembler(LIMIT_BYTES)
    sequence = 0
    try:
        for frame in split(data):
            check_decoded(frame)
            message = assembler.feed(frame)
            if message is None:
                continue
            sequence += 1
            if message.header.sequence != sequence:
                raise AssertionError("a message came out of order")
            if message.header.WhichOneof("value") == "tensor":
                size = 0 if message.payload is None else message.payload.nbytes
                if size != message.header.tensor.size_bytes:
                    raise AssertionError("a payload is not as long as its header says")
                tensor, encoded = unpack(message)
                if encoded is not None:
                    tensor = encoded.decode(tensor)
                if list(tensor.shape) != list(message.header.tensor.shape):
                    raise AssertionError("a tensor does not have the shape of its header")
        assembler.finish()
    except (FrameError, LimitExceeded):
        pass


def seeds() -> Iterator[bytes]:
    """Yield streams that are as they should be, for the fuzzer to change."""
    key = pb.MessageKey(run="r", generation=1, entry=1, value="x", direction=pb.DIRECTION_FORWARD)
    one = np.arange(12, dtype=np.float32)
    tensor = pb.TensorInfo(data_type=pb.DATA_TYPE_FLOAT32, shape=[3, 4], size_bytes=48, codec=pb.CODEC_NONE)
    headers = [
        (pb.TensorHeader(key=key, sequence=1, tensor=tensor), memoryview(one)),
        (pb.TensorHeader(key=key, sequence=2, integer=7), None),
        (pb.TensorHeader(key=key, sequence=3, absent=pb.Absent()), None),
    ]
    stream = [frame for header, payload in headers for frame in frames.encode_frames(header, payload)]
    yield _join(stream)
    for frame in stream:
        yield _join([frame])
    for codec in sorted(set(pb.Codec.values()) - {pb.CODEC_UNSPECIFIED, pb.CODEC_NONE}):
        size = encoded_bytes(codec, pb.DATA_TYPE_FLOAT32, one.size)
        info = pb.TensorInfo(data_type=pb.DATA_TYPE_FLOAT32, shape=[3, 4], size_bytes=size, codec=codec)
        header = pb.TensorHeader(key=key, sequence=1, tensor=info)
        yield _join(list(frames.encode_frames(header, memoryview(one).cast("B")[:size])))
    # A message of two chunks, and one written by the generated classes.
    first = pb.TensorFrame(header=headers[0][0], chunk=pb.TensorChunk(data=bytes(one)[:16]))
    second = pb.TensorFrame(chunk=pb.TensorChunk(offset=16, data=bytes(one)[16:]))
    yield _join([first.SerializeToString(), second.SerializeToString()])


def _join(stream: list[bytes]) -> bytes:
    return b"".join(struct.pack("<H", len(frame)) + frame for frame in stream)


def main() -> None:
    """Fuzz until libFuzzer's arguments say enough; its findings end the process with a trace and a file."""
    frames.np.empty = _bounded_empty
    with tempfile.TemporaryDirectory(prefix="gradwire-fuzz-") as corpus:
        for index, seed in enumerate(seeds()):
            (Path(corpus) / f"seed-{index}").write_bytes(seed)
        atheris.Setup([sys.argv[0], *(sys.argv[1:] or ["-max_total_time=60"]), corpus], check_stream)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
