"""Mailbox: order of arrival does not matter; repeated and late messages are dropped; waits end."""

from __future__ import annotations

import threading
import time

import pytest

from gradwire_protocol.errors import Aborted, LimitExceeded
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.keys import Key
from gradwire_stage.mailbox import OVERHEAD_BYTES, Mailbox


def key(entry: int = 1, micro_batch: int = 0, value: str = "v", direction=pb.DIRECTION_FORWARD, stage: int = 0) -> Key:
    return Key(entry, micro_batch, value, direction, stage)


class Box:
    """A mailbox, and the reasons of what it dropped."""

    def __init__(self, maximum_bytes: int = 2**20) -> None:
        self.dropped: list[str] = []
        self.mailbox: Mailbox[str] = Mailbox(maximum_bytes, self.dropped.append)

    def take_in_thread(self, wanted: Key) -> tuple[threading.Thread, list[object]]:
        """Start to take; returns when the mailbox shows the wait."""
        outcome: list[object] = []

        def take() -> None:
            try:
                outcome.append(self.mailbox.take(wanted))
            except Aborted as error:
                outcome.append(error)

        thread = threading.Thread(target=take)
        thread.start()
        deadline = time.monotonic() + 5
        while self.mailbox.waiting is None and time.monotonic() < deadline:
            time.sleep(0.001)
        return thread, outcome


def test_messages_are_taken_in_any_order() -> None:
    box = Box()
    keys = [
        key(micro_batch=index, direction=way)
        for index in range(3)
        for way in (pb.DIRECTION_FORWARD, pb.DIRECTION_BATCH)
    ]
    for item in keys:
        assert box.mailbox.put(item, str(item), 10)
    assert box.mailbox.size_bytes == len(keys) * (10 + OVERHEAD_BYTES)
    assert [box.mailbox.take(item) for item in reversed(keys)] == [str(item) for item in reversed(keys)]
    assert box.mailbox.size_bytes == 0
    assert box.mailbox.poll(key(micro_batch=9)) is None


def test_every_part_of_the_key_counts() -> None:
    box = Box()
    first = key()
    others = [
        key(entry=2),
        key(micro_batch=1),
        key(value="w"),
        key(direction=pb.DIRECTION_BACKWARD),
        key(stage=1),
    ]
    for item in others:
        box.mailbox.put(item, "other")
    assert box.mailbox.poll(first) is None
    assert box.dropped == []


def test_take_waits_for_the_message_and_shows_for_what() -> None:
    box = Box()
    wanted = key(micro_batch=3, value="linear_4")
    thread, outcome = box.take_in_thread(wanted)
    waiting = box.mailbox.waiting
    assert waiting is not None
    assert str(waiting.key) == "forward of micro-batch 3 (value 'linear_4') from stage 0"
    box.mailbox.put(key(micro_batch=2), "another")  # does not end the wait
    box.mailbox.put(wanted, "it")
    thread.join(5)
    assert outcome == ["it"]
    assert box.mailbox.waiting is None


def test_repeated_messages_are_dropped_before_and_after_they_are_taken() -> None:
    box = Box()
    assert box.mailbox.put(key(), "first")
    assert not box.mailbox.put(key(), "second")
    assert box.mailbox.take(key()) == "first"
    assert not box.mailbox.put(key(), "third")
    assert box.dropped == ["repeated", "repeated"]
    assert box.mailbox.size_bytes == 0


def test_messages_of_finished_entries_are_late() -> None:
    box = Box()
    box.mailbox.put(key(entry=2), "unread")
    box.mailbox.put(key(entry=3), "next")
    box.mailbox.finish(2)
    assert box.mailbox.size_bytes == OVERHEAD_BYTES
    assert not box.mailbox.put(key(entry=2), "again")
    assert box.dropped == ["late"]
    assert box.mailbox.take(key(entry=3)) == "next"


def test_the_limit_holds() -> None:
    box = Box(maximum_bytes=3 * OVERHEAD_BYTES)
    box.mailbox.put(key(micro_batch=0), "a", OVERHEAD_BYTES)
    with pytest.raises(LimitExceeded, match="full"):
        box.mailbox.put(key(micro_batch=1), "b", 1)
    box.mailbox.take(key(micro_batch=0))
    box.mailbox.put(key(micro_batch=1), "b", 1)


def test_close_ends_the_wait_and_all_later_ones() -> None:
    box = Box()
    thread, outcome = box.take_in_thread(key())
    reason = Aborted("released")
    box.mailbox.put(key(micro_batch=1), "held")
    box.mailbox.close(reason)
    box.mailbox.close(Aborted("a later reason"))
    thread.join(5)
    assert outcome == [reason]
    with pytest.raises(Aborted, match="released"):
        box.mailbox.poll(key(micro_batch=1))
    assert box.mailbox.size_bytes == 0
    assert not box.mailbox.put(key(), "too late")
    assert box.dropped == ["released"]


def test_many_threads_put_what_one_takes() -> None:
    box = Box(maximum_bytes=2**30)
    keys = [key(micro_batch=index, stage=stage) for index in range(200) for stage in range(4)]

    def put(stage: int) -> None:
        for item in keys:
            if item.source_stage == stage:
                box.mailbox.put(item, str(item))
                box.mailbox.put(item, "again")

    threads = [threading.Thread(target=put, args=(stage,)) for stage in range(4)]
    for thread in threads:
        thread.start()
    assert [box.mailbox.take(item) for item in keys] == [str(item) for item in keys]
    for thread in threads:
        thread.join(5)
    assert box.dropped == ["repeated"] * len(keys)
