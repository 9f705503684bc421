"""Who reads the sockets of a host: the compute thread while it waits, and otherwise a thread in its place."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from test_mailbox import Box, key

from gradwire_protocol.errors import FrameError
from gradwire_protocol.local_stream import ReceivingEnd, SendingEnd, connected_pair
from gradwire_protocol.shared_block import BlockError, unsupported
from gradwire_protocol.stream_limit import StreamLimit
from gradwire_stage.intake import Whole
from gradwire_stage.keys import Key
from gradwire_stage.local_streams import _Reader, _Stream
from gradwire_stage.mailbox import CREDIT_BYTES, HeldError, Mailbox

pytestmark = pytest.mark.skipif(unsupported() is not None, reason=f"no sockets here: {unsupported()}")


class FakeIntake:
    """Puts each frame, a number, into a mailbox as a message of that micro-batch; "bad" is refused."""

    def __init__(self, mailbox: Mailbox[str]) -> None:
        self.mailbox = mailbox
        self.inflow = mailbox.open_stream()
        self.threads: list[str] = []
        self.closed = False
        self.sequence = 0

    def feed(self, frame: bytes, *, wait: bool, first: bool) -> Whole:
        assert not wait
        assert not first
        if frame == b"bad":
            raise FrameError("Not a number")
        self.threads.append(threading.current_thread().name)
        number, _, size = frame.decode().partition(":")
        reservation = self.mailbox.reserve(key(micro_batch=int(number)), int(size or 0), self.inflow, wait=False)
        assert reservation is not None
        self.mailbox.fill(reservation, number)
        self.sequence += 1
        return Whole(self.sequence, 0)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class Wired:
    """A reader with two streams into one mailbox."""

    def __init__(self) -> None:
        self.limit = StreamLimit(2, "streams")
        self.reader = _Reader(self.limit)
        self.mailbox: Mailbox[str] = Mailbox(2**30, [].append, bell=self.reader)
        self.ends, self.intakes = [], []
        for name in ("A", "B"):
            one, other = connected_pair()
            self.ends.append(SendingEnd(one))
            self.intakes.append(FakeIntake(self.mailbox))
            self.reader.add(_Stream(name, ReceivingEnd(other), self.intakes[-1]))  # type: ignore[arg-type]

    def take(self, number: int) -> str:
        wanted: Key = key(micro_batch=number)
        return self.mailbox.poll(wanted) or self.mailbox.take(wanted)


@pytest.fixture
def wired() -> Iterator[Wired]:
    made = Wired()
    yield made
    made.reader.close()
    for end in made.ends:
        end.cancel()
        end.release()
        end.release()


def later(seconds: float, *acts: object) -> None:
    threading.Timer(seconds, lambda: [act() for act in acts]).start()  # type: ignore[operator]


def test_who_waits_reads_it_itself(wired: Wired) -> None:
    for number in range(20):
        later(0.01, lambda number=number: wired.ends[number % 2].write(str(number).encode()))
        assert wired.take(number) == str(number)
    own = threading.current_thread().name
    read = wired.intakes[0].threads + wired.intakes[1].threads
    # The other thread may have read some before it saw that this one comes by.
    assert read.count(own) > 10


def test_while_nobody_waits_messages_are_read_and_receipted(wired: Wired) -> None:
    for number in range(3):
        wired.ends[0].write(str(number).encode())
    began = time.monotonic()
    receipts = wired.ends[0].receipts()
    found: list[int] = []
    while len(found) < 3:
        found += [sequence for sequence, _ in next(receipts)]
    assert found == [1, 2, 3]
    assert time.monotonic() - began < 2
    assert set(wired.intakes[0].threads) == {"local streams"}
    assert wired.take(1) == "1"


def test_what_another_thread_brings_ends_the_wait(wired: Wired) -> None:
    later(0.05, lambda: wired.mailbox.put(key(micro_batch=7), "from elsewhere"))
    assert wired.take(7) == "from elsewhere"


def test_what_finds_no_room_waits_until_the_compute_thread_goes_on(wired: Wired) -> None:
    full = CREDIT_BYTES - 4096
    for number in range(1, 4):
        wired.ends[0].write(f"{number}:{full}".encode())
    wired.ends[0].end()
    wired.ends[1].write(b"9")
    assert wired.take(9) == "9"  # the other stream goes on
    deadline = time.monotonic() + 5
    while not wired.reader._held and time.monotonic() < deadline:
        time.sleep(0.01)
    assert wired.intakes[0].sequence == 1
    for number in range(1, 4):
        assert wired.take(number) == str(number)
    while wired.reader.count > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    # Its end was behind the last of them.
    assert wired.intakes[0].closed
    assert not wired.intakes[1].closed


def test_a_bad_frame_ends_its_stream_alone(wired: Wired) -> None:
    wired.ends[0].write(b"bad")
    later(0.02, lambda: wired.ends[1].write(b"4"))
    assert wired.take(4) == "4"
    with pytest.raises(FrameError, match="Not a number"):
        next(wired.ends[0].receipts())
    assert wired.intakes[0].closed


def test_a_bell_that_nobody_waits_for_keeps_nobody_busy(wired: Wired) -> None:
    wired.reader.ring()
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
    later(0.05, lambda: wired.ends[0].write(b"5"))
    assert wired.take(5) == "5"


def test_streams_are_limited_and_end_with_the_reader(wired: Wired) -> None:
    one, other = connected_pair()
    with pytest.raises(BlockError, match="Too many"):
        wired.reader.add(_Stream("C", ReceivingEnd(other), FakeIntake(wired.mailbox)))  # type: ignore[arg-type]
    one.close()
    other.close()
    wired.reader.close()
    assert wired.reader.count == 0
    assert all(intake.closed for intake in wired.intakes)
    with wired.limit:  # the places are free again
        pass


def test_held_means_that_room_would_have_to_be_waited_for() -> None:
    box = Box(maximum_bytes=2**30)
    inflow = box.mailbox.open_stream()
    assert box.mailbox.reserve(key(micro_batch=1), CREDIT_BYTES, inflow, wait=False)
    with pytest.raises(HeldError):
        box.mailbox.reserve(key(micro_batch=2), 1, inflow, wait=False)
    # What is due never is.
    assert box.mailbox.reserve(key(entry=0), 1, inflow, wait=False) is None
    box.mailbox.begin(1, 2)
    assert box.mailbox.reserve(key(micro_batch=2), 1, inflow, wait=False)
