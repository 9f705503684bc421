"""The two ends of a socket between processes of one host, and what a dishonest sender can do to one of them."""

import socket
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_frames import local_frames

from gradwire_protocol.errors import FrameError, InternalError, LimitExceeded
from gradwire_protocol.local_stream import (
    FIRST,
    MAXIMUM_FRAME_BYTES,
    MAXIMUM_KINDS,
    RECEIPT_MESSAGES,
    SHORT,
    WHOLE,
    ReceivingEnd,
    SendingEnd,
    ShortFrame,
    connected_pair,
)


@pytest.fixture
def ends():
    one, other = connected_pair()
    sending, receiving = SendingEnd(one), ReceivingEnd(other)
    yield sending, receiving
    sending.cancel()
    sending.release()
    sending.release()
    receiving.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300_000), max_size=8), st.booleans())
def test_frames_arrive_as_they_were_written(sizes, at_once):
    one, other = connected_pair()
    sending, receiving = SendingEnd(one), ReceivingEnd(other)
    frames = [bytes([number % 251]) * size for number, size in enumerate(sizes)]

    def write():
        if at_once:
            for frame in frames:
                sending.write_rest(sending.try_write(frame))
        else:
            for frame in frames:
                sending.write(frame)
        sending.end()

    writer = threading.Thread(target=write)
    writer.start()
    assert list(local_frames(receiving)) == frames
    writer.join()
    receiving.close()
    sending.release()
    sending.release()


def test_receipts_and_a_typed_error_arrive_in_order(ends):
    sending, receiving = ends
    for sequence in range(1, RECEIPT_MESSAGES + 3):
        receiving.receipt(sequence, 8)
    receiving.fail(LimitExceeded("Too much", expected="1", got="2"))
    receipts = sending.receipts()
    assert [sequence for sequence, _ in next(receipts)] == list(range(1, RECEIPT_MESSAGES + 3))
    with pytest.raises(LimitExceeded, match="Too much") as caught:
        next(receipts)
    assert caught.value.expected == "1"


def test_an_error_that_cannot_be_read_is_still_one(ends):
    sending, receiving = ends
    receiving._connection.sendall(struct.pack("<Qd", 2**64 - 1, 3.0) + b"\xff\xff\xff")
    with pytest.raises(InternalError, match="cannot be read"):
        list(sending.receipts())


def test_what_no_honest_sender_writes_is_refused_before_anything_is_allocated(ends):
    sending, receiving = ends
    sending._connection.sendall(struct.pack("<I", MAXIMUM_FRAME_BYTES + 1))
    with pytest.raises(FrameError, match="too large"):
        next(local_frames(receiving))


@pytest.mark.parametrize("written", [b"\x01", struct.pack("<I", 10) + b"abc", struct.pack("<I", 200_000) + b"abc"])
def test_a_stream_that_ends_inside_a_frame_is_refused(ends, written):
    sending, receiving = ends
    sending._connection.sendall(written)
    sending._connection.shutdown(socket.SHUT_WR)
    with pytest.raises(FrameError, match="ended inside a frame"):
        list(local_frames(receiving))


def test_what_finds_no_room_is_left(ends):
    sending, receiving = ends
    frame = bytes(MAXIMUM_FRAME_BYTES)
    rest = sending.try_write(frame)
    assert 0 < len(rest) < len(frame)
    assert sending.try_write(b"more") == struct.pack("<I", 4) + b"more"
    threading.Thread(target=sending.write_rest, args=(rest,)).start()
    assert next(local_frames(receiving)) == frame


def test_who_stops_early_gets_the_rest_next_time(ends):
    sending, receiving = ends
    for frame in (b"one", b"two", b"three"):
        sending.write(frame)
    assert next(receiving.read()) == (WHOLE, b"one")
    assert list(receiving.read()) == [(WHOLE, b"two"), (WHOLE, b"three")]
    assert list(receiving.read()) == []
    assert not receiving.ended
    sending.end()
    assert list(receiving.read()) == []
    assert receiving.ended


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 2**64 - 1), st.integers(0, 2**32 - 1), st.binary(min_size=1)), max_size=9),
)
def test_short_frames_name_the_kind_that_came_first(messages):
    one, other = connected_pair()
    sending, receiving = SendingEnd(one), ReceivingEnd(other)
    assert sending.number_of("second") is None
    for kind in ("first", "second"):
        sending.try_write(kind.encode(), kind)
    number = sending.number_of("second")
    for entry, micro_batch, payload in messages:
        sending.try_write_short(number, entry, micro_batch, memoryview(payload))
    sending.try_write(b"none")
    sending.end()
    came = []
    while not receiving.ended:
        came += list(receiving.read())
    assert came[:2] == [(FIRST, b"first"), (FIRST, b"second")]
    assert came[-1] == (WHOLE, b"none")
    assert [form for form, _ in came[2:-1]] == [SHORT] * len(messages)
    short = [ShortFrame.decode(data) for _, data in came[2:-1]]
    assert [(each.kind, each.entry, each.micro_batch, bytes(each.payload)) for each in short] == [
        (1, *message) for message in messages
    ]
    receiving.close()
    sending.release()
    sending.release()


def test_kinds_are_limited(ends):
    sending, receiving = ends
    for number in range(MAXIMUM_KINDS + 1):
        sending.try_write(b"x", number)
    assert sending.number_of(MAXIMUM_KINDS - 1) == MAXIMUM_KINDS - 1
    assert sending.number_of(MAXIMUM_KINDS) is None
    sending.end()
    forms = []
    while not receiving.ended:
        forms += [form for form, _ in receiving.read()]
    assert forms == [FIRST] * MAXIMUM_KINDS + [WHOLE]


@pytest.mark.parametrize("size", range(17))
def test_a_short_frame_that_is_cut_off_is_refused(size):
    with pytest.raises(FrameError, match="cut off"):
        ShortFrame.decode(bytes(size))


def test_a_frame_of_two_forms_is_refused(ends):
    sending, receiving = ends
    sending._connection.sendall(struct.pack("<I", FIRST | SHORT | 1) + b"x")
    with pytest.raises(FrameError, match="no form"):
        next(local_frames(receiving))


def test_receipts_that_nobody_reads_end_the_stream(ends):
    _, receiving = ends

    def receipt_all():
        for sequence in range(2**20):
            receiving.receipt(sequence, 0)

    with pytest.raises(FrameError, match="does not read its receipts"):
        receipt_all()
