"""Frames against the generated classes, and against everything that a broken or hostile sender may do."""

import math
import tracemalloc

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwire_protocol import frames
from gradwire_protocol.errors import FrameError, LimitExceeded
from gradwire_protocol.v1 import tensors_pb2 as pb


def header_for(shape, *, element=4, sequence=1, strides=(), **key):
    key = {"run": "r", "generation": 1, "entry": 1, "direction": pb.DIRECTION_FORWARD, "value": "x", **key}
    data_type = {4: pb.DATA_TYPE_FLOAT32, 1: pb.DATA_TYPE_UINT8, 8: pb.DATA_TYPE_FLOAT64}[element]
    return pb.TensorHeader(
        key=pb.MessageKey(**key),
        sequence=sequence,
        tensor=pb.TensorInfo(
            data_type=data_type,
            shape=shape,
            strides=strides,
            size_bytes=math.prod(shape) * element,
            codec=pb.CODEC_NONE,
        ),
    )


PATTERN = bytes(i * 7 % 251 for i in range(4096))


def payload(size):
    return memoryview(PATTERN * (size // len(PATTERN) + 1))[:size]


sizes = st.one_of(
    st.integers(0, 300),
    st.integers(-20, 20).map(lambda d: 2**14 + d),
    st.integers(-20, 20).map(lambda d: frames.CHUNK_BYTES + d),
    st.integers(-20, 20).map(lambda d: 2 * frames.CHUNK_BYTES + d),
)


@settings(max_examples=80, deadline=None)
@given(sizes, st.text(max_size=40), st.integers(0, 2**32 - 1), st.booleans())
def test_hand_written_frames_are_what_the_generated_classes_read(size, value, micro_batch, checksums):
    header = header_for([size], element=1, value=value, micro_batch=micro_batch)
    data = payload(size)
    encoded = list(frames.encode_frames(header, data, checksums=checksums))
    parsed = [pb.TensorFrame.FromString(frame) for frame in encoded]
    assert parsed[0].header == header
    assert b"".join(frame.chunk.data for frame in parsed) == bytes(data)
    assert [frame.chunk.offset for frame in parsed] == [i * frames.CHUNK_BYTES for i in range(len(parsed))]
    assert not any(frame.HasField("header") for frame in parsed[1:])
    # Data begin on a multiple of 16, so that tensors over them are aligned.
    assert all(
        (len(frame) - len(part.chunk.data) - 5 * checksums) % 16 == 0
        for frame, part in zip(encoded, parsed, strict=True)
        if size
    )
    # And canonical: the generated classes write the very same bytes.
    assert [part.SerializeToString() for part in parsed] == encoded

    for part in parsed:
        expected = google_crc32c.value(part.chunk.data) if checksums and part.HasField("chunk") else 0
        assert part.chunk.checksum == expected

    wanted = frames.Admission.KEEP_CHECKED if checksums else frames.Admission.KEEP
    assembler = frames.FrameAssembler(admit=lambda *_: wanted)
    results = [assembler.feed(frame) for frame in encoded]
    assembler.finish()
    assert results[:-1] == [None] * (len(results) - 1)
    assert results[-1].header == header
    assert bytes(results[-1].payload or b"") == bytes(data)


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 40))
def test_frames_of_the_generated_classes_are_read(size, chunks):
    """Other implementations may chunk as they like and write no padding."""
    chunk = max(1, -(-size // chunks))
    header = header_for([size], element=1)
    data = bytes(payload(size))
    sent = [pb.TensorFrame(header=header)]
    sent += [pb.TensorFrame(chunk=pb.TensorChunk(offset=i, data=data[i : i + chunk])) for i in range(0, size, chunk)]
    assembler = frames.FrameAssembler()
    results = [assembler.feed(frame.SerializeToString()) for frame in sent]
    assert bytes(results[-1].payload or b"") == data


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_frames_are_refused_or_read_as_the_generated_class_reads_them(data):
    checksums = data.draw(st.booleans())
    encoded = bytearray(next(frames.encode_frames(header_for([5, 3]), payload(60), checksums=checksums)))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    frame = bytes(encoded[: data.draw(st.integers(1, len(encoded)))])
    try:
        header, offset, chunk, checksum = frames.decode_frame(frame)
    except FrameError:
        return
    theirs = pb.TensorFrame.FromString(frame)
    assert (header or pb.TensorHeader()) == theirs.header
    assert offset == theirs.chunk.offset
    assert bytes(chunk or b"") == theirs.chunk.data
    assert checksum == (theirs.chunk.checksum if theirs.chunk.HasField("checksum") else None)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda h: h.tensor.shape.append(-1), FrameError, "negative"),
        (lambda h: h.tensor.shape.append(2), FrameError, "does not fit its shape"),
        (lambda h: h.tensor.shape.extend([2**40, 2**40]), FrameError, "does not fit its shape"),
        (lambda h: h.tensor.shape.extend([1] * 40), FrameError, "Too many dimensions"),
        (lambda h: setattr(h.tensor, "data_type", 99), FrameError, "Unknown data type"),
        (
            lambda h: h.tensor.MergeFrom(pb.TensorInfo(data_type=pb.DATA_TYPE_INT32, requires_grad=True)),
            FrameError,
            "cannot have a gradient",
        ),
        (lambda h: setattr(h.tensor, "codec", 0), FrameError, "Unknown codec"),
        (lambda h: setattr(h.tensor, "size_bytes", 2**40), FrameError, "does not fit its shape"),
        (lambda h: h.tensor.strides.extend([1, 1]), FrameError, "gaps or overlap"),
        (lambda h: h.tensor.strides.extend([1]), FrameError, "Strides do not fit"),
        (lambda h: h.tensor.strides.extend([-3, 1]), FrameError, "gaps or overlap"),
        (lambda h: setattr(h, "sequence", 3), FrameError, "missing or repeated"),
        (lambda h: setattr(h.key, "run", ""), FrameError, "wrong run"),
        (lambda h: setattr(h.key, "run", "r" * 65), FrameError, "wrong run"),
        (lambda h: setattr(h.key, "value", "v" * 513), FrameError, "too long"),
        (lambda h: setattr(h.key, "state", "s" * 65), FrameError, "too long"),
        (lambda h: setattr(h.key, "direction", 0), FrameError, "unknown direction"),
        (lambda h: setattr(h.key, "entry", 0), FrameError, "no entry"),
        (lambda h: h.ClearField("tensor"), FrameError, "no value"),
    ],
)
def test_headers_that_break_the_contract_are_refused(change, error, words):
    header = header_for([5, 3])
    change(header)
    with pytest.raises(error, match=words):
        frames.FrameAssembler().feed(pb.TensorFrame(header=header).SerializeToString())


def test_a_tensor_above_the_limit_is_refused_before_anything_is_allocated():
    header = header_for([2**38], element=8)
    with pytest.raises(LimitExceeded, match="too large"):
        frames.FrameAssembler(maximum_tensor_bytes=2**30).feed(pb.TensorFrame(header=header).SerializeToString())


def chunk(offset, size):
    return pb.TensorFrame(chunk=pb.TensorChunk(offset=offset, data=bytes(size))).SerializeToString()


@pytest.mark.parametrize(
    ("later", "words"),
    [
        ([chunk(8, 4)], "missing or repeated"),
        ([chunk(0, 8), chunk(0, 8)], "missing or repeated"),
        ([chunk(0, 64)], "overruns"),
        ([chunk(0, 0)], "wrong size"),
        ([pb.TensorFrame(header=header_for([1], sequence=2)).SerializeToString()], "inside a message"),
        ([b""], "empty"),
        ([b"\xff\xff\xff"], "not a TensorFrame"),
        ([pb.TensorFrame(chunk=pb.TensorChunk(padding=bytes(40), data=b"1")).SerializeToString()], "too much padding"),
    ],
)
def test_chunks_that_break_the_contract_are_refused(later, words):
    assembler = frames.FrameAssembler()
    assert assembler.feed(pb.TensorFrame(header=header_for([5, 3])).SerializeToString()) is None
    with pytest.raises(FrameError, match=words):
        list(map(assembler.feed, later))


def test_a_chunk_without_header_and_a_stream_that_ends_early_are_refused():
    assembler = frames.FrameAssembler()
    with pytest.raises(FrameError, match="without a header"):
        assembler.feed(chunk(0, 4))
    assembler.feed(pb.TensorFrame(header=header_for([5, 3])).SerializeToString())
    with pytest.raises(FrameError, match="ended inside"):
        assembler.finish()


def test_numbers_and_absent_values_are_messages_of_their_own():
    assembler = frames.FrameAssembler()
    for sequence, value in enumerate(
        [{"integer": -3}, {"real": math.inf}, {"boolean": False}, {"absent": pb.Absent()}], 1
    ):
        header = pb.TensorHeader(key=header_for([1]).key, sequence=sequence, **value)
        message = assembler.feed(*frames.encode_frames(header, None))
        assert message.header == header
        assert message.payload is None
    with pytest.raises(FrameError, match="without payload has a chunk"):
        assembler.feed(
            pb.TensorFrame(
                header=pb.TensorHeader(key=header_for([1]).key, sequence=5, integer=1), chunk=pb.TensorChunk(data=b"1")
            ).SerializeToString()
        )


def test_a_wrong_checksum_names_message_and_place():
    header = header_for([3 * 2**20], element=1, entry=7, micro_batch=2)
    good = list(frames.encode_frames(header, payload(3 * 2**20), checksums=True))

    def read(*encoded, wanted=frames.Admission.KEEP_CHECKED):
        assembler = frames.FrameAssembler(admit=lambda *_: wanted)
        return [assembler.feed(frame) for frame in encoded][-1]

    assert bytes(read(*good).payload) == bytes(payload(3 * 2**20))
    flipped = bytearray(good[1])
    flipped[1000] ^= 1
    words = "offset 1048576 is not what was sent: forward of micro-batch 2 .*entry 7.*CRC-32C"
    with pytest.raises(FrameError, match=words):
        read(good[0], bytes(flipped))
    # In a run with checksums none may lack one; elsewhere they are not looked at, nor where the message is skipped.
    bare = list(frames.encode_frames(header, payload(3 * 2**20)))
    with pytest.raises(FrameError, match="Expected: a checksum"):
        read(good[0], bare[1])
    for wanted in (frames.Admission.KEEP, frames.Admission.SKIP):
        assert read(good[0], bytes(flipped), good[2], wanted=wanted) is not None
    one = bytearray(*frames.encode_frames(header_for([5, 3]), payload(60), checksums=True))
    one[-10] ^= 1
    with pytest.raises(FrameError, match="offset 0"):
        read(bytes(one))


def test_a_skipped_message_is_checked_and_takes_no_memory():
    size = 200 * 2**20
    sent = list(frames.encode_frames(header_for([size], element=1), memoryview(bytes(size))))
    seen = []

    def skip(header, payload_bytes):
        seen.append(payload_bytes)
        return frames.Admission.SKIP

    assembler = frames.FrameAssembler(admit=skip)
    tracemalloc.start()
    try:
        results = list(map(assembler.feed, sent))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen == [size]
    assert results[:-1] == [None] * (len(results) - 1)
    assert (results[-1].payload, results[-1].kept) == (None, False)
    assert peak < 2**20
    # The next message is whole again; gaps in a skipped one are refused like in any other.
    assert assembler.feed(*frames.encode_frames(header_for([1], sequence=2), payload(4))).kept is False
    assembler.feed(pb.TensorFrame(header=header_for([5, 3], sequence=3)).SerializeToString())
    with pytest.raises(FrameError, match="missing or repeated"):
        assembler.feed(chunk(8, 4))


@pytest.mark.parametrize(
    ("codec", "data_type", "size_bytes", "expected"),
    [
        (pb.CODEC_NONE, pb.DATA_TYPE_FLOAT32, 24, 24),
        (pb.CODEC_INT8, pb.DATA_TYPE_FLOAT32, 10, 24),
        (pb.CODEC_BF16, pb.DATA_TYPE_FLOAT64, 12, 48),
    ],
)
def test_what_a_tensor_takes_without_its_codec(codec, data_type, size_bytes, expected):
    info = pb.TensorInfo(data_type=data_type, shape=[2, 3], codec=codec, size_bytes=size_bytes)
    assert frames.decoded_bytes(info) == expected
