"""Mailboxes that hold streams back: what is due comes, the rest waits, and no schedule deadlocks over it."""

from __future__ import annotations

import itertools
import queue
import random
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwire_coordinator.bounds import untaken_bounds
from gradwire_coordinator.schedules import Programs, forward_only, gpipe, one_f_one_b
from gradwire_protocol.errors import Aborted, GradwireError, LimitExceeded
from gradwire_protocol.program import FORWARD
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.keys import Key, Source
from gradwire_stage.mailbox import OVERHEAD_BYTES, Inflow, Mailbox, Reservation

BATCH, AHEAD, BACK, STATE = pb.DIRECTION_BATCH, pb.DIRECTION_FORWARD, pb.DIRECTION_BACKWARD, pb.DIRECTION_STATE


def key(micro_batch: int = 0, *, entry: int = 1, value: str = "v", direction=AHEAD, stage: int = 0) -> Key:
    return Key(entry, micro_batch, value, direction, stage)


class Box:
    """A mailbox with room for one message of a stream ahead of what is due, and one such stream."""

    def __init__(self, maximum_bytes: int = 2**20, credit_bytes: int = 1, **options) -> None:
        self.dropped: list[str] = []
        self.mailbox: Mailbox[str] = Mailbox(
            maximum_bytes, self.dropped.append, credit_bytes=credit_bytes, maximum_streams=3, **options
        )
        self.inflow = self.mailbox.open_stream()

    def bring(self, item: Key, size: int = 100, **options) -> bool:
        reservation = self.mailbox.reserve(item, size, self.inflow, **options)
        return reservation is not None and self.mailbox.fill(reservation, str(item))

    def bring_in_thread(self, item: Key, size: int = 100, **options) -> tuple[threading.Thread, list[object]]:
        """Start to bring a message that is held back; returns when it is."""
        outcome: list[object] = []

        def bring() -> None:
            try:
                outcome.append(self.bring(item, size, **options))
            except GradwireError as error:
                outcome.append(error)

        thread = threading.Thread(target=bring, daemon=True)
        thread.start()
        wait_until(lambda: self.mailbox.held_streams == 1)
        assert not outcome
        return thread, outcome


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


def ended(thread: threading.Thread, outcome: list[object]) -> object:
    thread.join(5)
    return outcome[0]


def test_a_stream_above_its_credit_is_held_until_something_is_taken() -> None:
    box = Box(credit_bytes=3 * (100 + OVERHEAD_BYTES))
    for index in range(3):
        assert box.bring(key(index, entry=2))
    held = box.bring_in_thread(key(3, entry=2))
    other = box.mailbox.open_stream()
    assert box.mailbox.reserve(key(0, entry=2, stage=1), 100, other) is not None  # another stream's credit is its own
    assert box.mailbox.take(key(1, entry=2))
    assert ended(*held) is True


def test_one_message_always_fits_but_no_more_than_half_of_the_room_is_taken_ahead() -> None:
    box = Box(maximum_bytes=100_000, credit_bytes=10)
    assert box.bring(key(0, entry=2), 40_000)
    held = box.bring_in_thread(key(1, entry=2), 100)
    assert box.mailbox.take(key(0, entry=2))
    assert ended(*held) is True
    assert box.mailbox.take(key(1, entry=2))
    held = box.bring_in_thread(key(2, entry=2), 60_000)
    box.mailbox.begin(2, 2)  # now it is due, and may take the other half
    assert ended(*held) is True


def test_what_belongs_to_the_micro_batch_in_progress_is_never_held() -> None:
    box = Box()
    box.mailbox.begin(1, 4)
    for index in range(5):
        assert box.bring(key(index), value_of(index))
    assert box.bring(key(1, direction=BACK, stage=1))
    box.mailbox.take(key(4))
    held = box.bring_in_thread(key(5))
    box.mailbox.begin(1, 5)
    assert ended(*held) is True
    held = box.bring_in_thread(key(0, entry=2))
    box.mailbox.begin(1, 2)  # the front does not fall back
    assert not held[1]
    box.mailbox.finish(1)
    assert ended(*held) is True
    assert box.bring(key(5)) is False
    assert box.dropped == ["late"]


def value_of(index: int) -> int:
    return 100 * (index + 1)


def test_the_stream_that_the_compute_thread_waits_for_is_read_on() -> None:
    box = Box()
    box.mailbox.begin(1, 0)
    assert box.bring(key(1))
    held = box.bring_in_thread(key(2))
    taker = threading.Thread(target=box.mailbox.take, args=[key(3)], daemon=True)
    taker.start()
    assert ended(*held) is True
    assert box.bring(key(3))
    taker.join(5)
    # From then on it is held again.
    thread, outcome = box.bring_in_thread(key(4))
    box.mailbox.close(Aborted("the end"))
    assert ended(thread, outcome) is False
    assert box.dropped == ["released"]


@pytest.mark.parametrize("direction", [STATE, pb.DIRECTION_MOVED])
def test_state_comes_as_it_is_asked_for(direction: pb.Direction) -> None:
    """All tensors of an entry are of one micro-batch: the whole model must not pile up while they are copied."""
    box = Box()
    box.mailbox.begin(1)
    assert box.bring(key(value="a", direction=direction))
    held = box.bring_in_thread(key(value="b", direction=direction))
    assert box.mailbox.take(key(value="a", direction=direction))
    assert ended(*held) is True
    held = box.bring_in_thread(key(value="c", direction=direction))
    taker = threading.Thread(target=box.mailbox.take, args=[key(value="d", direction=direction)], daemon=True)
    taker.start()  # in another order than they are sent
    assert ended(*held) is True
    assert box.bring(key(value="d", direction=direction))
    taker.join(5)


def test_the_schedules_bound_lets_through_and_refuses() -> None:
    box = Box(bounds={Source(AHEAD, 0, "v"): 3, Source(BACK, 2, "v"): 1})
    box.mailbox.begin(1, 0, training=True)
    for index in range(3):
        assert box.bring(key(index), answered=True)
    assert box.bring(key(2), answered=True) is False  # repeated: not one more
    with pytest.raises(LimitExceeded, match=r"further ahead than the schedule allows.*forward of micro-batch 3"):
        box.bring(key(3), answered=True)
    assert box.mailbox.take(key(0))
    assert box.bring(key(3), answered=True)
    assert box.bring(key(0, direction=BACK, stage=2), answered=True)
    with pytest.raises(LimitExceeded, match="backward of micro-batch 1"):
        box.bring(key(1, direction=BACK, stage=2), answered=True)
    # A message without answer, and one of a later entry, is held to the credit like any other.
    held = box.bring_in_thread(key(4, value="mask"))
    box.mailbox.end(box.inflow)
    assert isinstance(ended(*held), Aborted)
    box.inflow = box.mailbox.open_stream()
    assert box.bring(key(0, entry=2), answered=True)
    held = box.bring_in_thread(key(1, entry=2), answered=True)
    box.mailbox.finish(1)
    box.mailbox.begin(2, training=True)
    assert ended(*held) is True


def test_room_is_taken_before_the_payload_comes_and_given_back_if_it_does_not() -> None:
    box = Box(bounds={Source(AHEAD, 0, "v"): 1})
    box.mailbox.begin(1, training=True)
    reservation = box.mailbox.reserve(key(0), 5000, box.inflow, answered=True)
    assert isinstance(reservation, Reservation)
    assert box.mailbox.size_bytes == 5000 + OVERHEAD_BYTES
    box.mailbox.cancel(reservation)
    assert box.mailbox.size_bytes == 0
    # The same message may be on its way on two streams: the first to be whole is kept.
    first = box.mailbox.reserve(key(0), 5000, box.inflow, answered=True)
    second = box.mailbox.reserve(key(0), 5000, box.mailbox.open_stream(), answered=True)
    assert first is not None
    assert second is not None
    assert box.mailbox.fill(second, "second")
    assert not box.mailbox.fill(first, "first")
    assert box.dropped == ["repeated"]
    assert box.mailbox.take(key(0)) == "second"
    assert box.mailbox.size_bytes == 0
    # An entry may end, or the run, while a message comes in.
    late = box.mailbox.reserve(key(1), 5000, box.inflow)
    box.mailbox.finish(1)
    assert late is not None
    assert not box.mailbox.fill(late, "late")
    after = box.mailbox.reserve(key(1, entry=2), 5000, box.inflow)
    box.mailbox.close(Aborted("released"))
    assert after is not None
    assert not box.mailbox.fill(after, "after")
    assert box.dropped == ["repeated", "late", "released"]
    assert box.mailbox.size_bytes == 0


def test_what_is_due_and_does_not_fit_is_refused() -> None:
    box = Box(maximum_bytes=10_000)
    box.mailbox.begin(1, 3)
    with pytest.raises(LimitExceeded, match="mailbox is full"):
        box.bring(key(0), 10_000)
    assert box.bring(key(0), 8_000)


def test_no_more_streams_than_allowed() -> None:
    box = Box()
    others = [box.mailbox.open_stream() for _ in range(2)]
    with pytest.raises(LimitExceeded, match="Too many streams"):
        box.mailbox.open_stream()
    box.mailbox.end(others[0])
    box.mailbox.end(others[0])
    assert isinstance(box.mailbox.open_stream(), Inflow)


# --- pipelines of real mailboxes, with room for next to nothing

ENTRIES = {
    "evaluate": forward_only,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "auto": lambda stages, count: one_f_one_b(stages, count, 1),
}
CLIENT = "client"


class Pipeline:
    """A thread a server, and one a stream, which holds two messages that are not read yet.

    Each route is that of a value. Values are sent in their order, and taken in that of `taken_in`.
    """

    def __init__(
        self,
        entries: list[tuple[str, Programs]],
        routes: list[tuple[int, ...]],
        answered: list[bool],
        taken_in: list[int],
        seed: int,
    ) -> None:
        self.entries, self.routes, self.answered, self.taken_in = entries, routes, answered, taken_in
        self.chance = random.Random(seed)
        self.stages = len(entries[0][1])
        self.failures: list[object] = []
        bounds: list[dict[Source, int]] = [{} for _ in range(self.stages)]
        for number, route in enumerate(routes):
            for name, programs in entries:
                if name == "evaluate":
                    continue
                for flow, most in untaken_bounds(programs, route).items():
                    source = Source(AHEAD if flow.kind == FORWARD else BACK, flow.source, f"v{number}")
                    bounds[flow.target][source] = max(most, bounds[flow.target].get(source, 0))
        self.boxes = [
            Mailbox(1_000_000, self.failures.append, credit_bytes=1, bounds=bounds[stage])
            for stage in range(self.stages)
        ]
        self.streams: dict[tuple[object, int], queue.Queue[tuple[Key, bool] | None]] = {}
        self.delays = [self.chance.choice((0, 0, 0.002)) for _ in range(self.stages)]

    def run(self) -> None:
        workers = [
            threading.Thread(target=self._guard, args=[self._compute, s], daemon=True) for s in range(self.stages)
        ]
        workers.append(threading.Thread(target=self._guard, args=[self._client], daemon=True))
        pairs = [(s, t) for s in range(self.stages) for t in range(self.stages) if s != t]
        pairs += [(CLIENT, 0), (CLIENT, self.stages - 1)]
        for pair in dict.fromkeys(pairs):
            self.streams[pair] = queue.Queue(maxsize=1)
            threading.Thread(target=self._guard, args=[self._read, *pair], daemon=True).start()
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + 20
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        stuck = [worker for worker in workers if worker.is_alive()]
        waits = [(stage, str(box.waiting)) for stage, box in enumerate(self.boxes)]
        for stream in self.streams.values():
            if not stuck:
                stream.put(None)
        assert not self.failures
        assert not stuck, waits

    def _guard(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
        except Exception as error:  # noqa: BLE001  # of a thread: shown by the test
            self.failures.append(error)
            for box in self.boxes:
                box.close(Aborted("another thread failed"))

    def _send(self, sender: object, target: int, item: Key, answered: bool = False) -> None:
        self.streams[sender, target].put((item, answered))

    def _read(self, sender: object, target: int) -> None:
        box = self.boxes[target]
        inflow = box.open_stream()
        while (message := self.streams[sender, target].get()) is not None:
            item, answered = message
            reservation = box.reserve(item, 1000, inflow, answered=answered)
            if reservation is not None:
                box.fill(reservation, item)

    def _client(self) -> None:
        for entry, (_, programs) in enumerate(self.entries, start=1):
            for index in range(sum(action.kind == FORWARD for action in programs[0])):
                for target in dict.fromkeys((0, self.stages - 1)):
                    self._send(CLIENT, target, Key(entry, index, "x", BATCH, 0))

    def _compute(self, stage: int) -> None:
        box = self.boxes[stage]
        for entry, (name, programs) in enumerate(self.entries, start=1):
            training = name != "evaluate"
            box.begin(entry, training=training)
            for _, kind, index in programs[stage]:
                if kind == FORWARD:
                    self._forward(box, stage, entry, index, training)
                else:
                    self._backward(box, stage, entry, index)
                time.sleep(self.delays[stage])
            box.finish(entry)

    def _forward(self, box: Mailbox[Key], stage: int, entry: int, index: int, training: bool) -> None:
        box.begin(entry, index, training=training)
        if stage in (0, self.stages - 1):
            box.take(Key(entry, index, "x", BATCH, 0))
        for number in self.taken_in:
            route = self.routes[number]
            if stage in route[1:]:
                box.take(Key(entry, index, f"v{number}", AHEAD, route[0]))
        for number, route in enumerate(self.routes):
            if stage == route[0]:
                for consumer in route[1:]:
                    answered = training and self.answered[number]
                    self._send(stage, consumer, Key(entry, index, f"v{number}", AHEAD, stage), answered)

    def _backward(self, box: Mailbox[Key], stage: int, entry: int, index: int) -> None:
        steps = [
            (number, early, late)
            for number, route in enumerate(self.routes)
            if self.answered[number]
            for early, late in itertools.pairwise(route)
        ]
        for number, early, late in steps:
            if stage == early:
                box.take(Key(entry, index, f"v{number}", BACK, late))
        for number, early, late in steps:
            if stage == late:
                self._send(stage, early, Key(entry, index, f"v{number}", BACK, stage), True)


@st.composite
def pipelines(draw) -> Pipeline:
    stages = draw(st.integers(2, 4))
    names = draw(st.lists(st.sampled_from(sorted(ENTRIES)), min_size=1, max_size=3))
    entries = [(name, ENTRIES[name](stages, draw(st.integers(1, 8)))) for name in names]
    routes = [(stage, stage + 1) for stage in range(stages - 1)]
    for _ in range(draw(st.integers(0, 3))):
        route = draw(st.lists(st.integers(0, stages - 1), min_size=2, max_size=stages, unique=True))
        routes += [tuple(sorted(route))] * draw(st.integers(1, 4))
    answered = [draw(st.booleans()) for _ in routes]
    taken_in = draw(st.permutations(range(len(routes))))
    return Pipeline(entries, routes, answered, taken_in, draw(st.integers(0, 1000)))


@settings(max_examples=60, deadline=None)
@given(pipelines())
def test_no_pipeline_deadlocks_or_exceeds_its_bounds(pipeline: Pipeline) -> None:
    pipeline.run()


def test_a_circle_that_only_what_is_due_breaks() -> None:
    """Stage 3 waits for stage 1, which sends to 2, which waits for 0, which sends to 3: all of the same micro-batch."""
    routes = [(0, 3)] * 5 + [(0, 2)] + [(1, 2)] * 5 + [(1, 3)]
    taken_in = [*range(5, 12), *range(5)]
    taken_in.sort(key=lambda number: len(routes) - routes.count(routes[number]), reverse=True)  # single ones first
    Pipeline([("evaluate", forward_only(4, 6))], routes, [False] * len(routes), taken_in, 1).run()
