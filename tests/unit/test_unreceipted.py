"""What is on its way to a peer: how much, and whether it takes longer than it needs to."""

from __future__ import annotations

import time

from gradwire_protocol.unreceipted import Open, Unreceipted
from gradwire_protocol.v1 import tensors_pb2 as pb


def add(messages: Unreceipted, size_bytes: int, ago: float = 0.0) -> Open:
    message = messages.add(pb.DIRECTION_FORWARD, pb.CODEC_NONE, size_bytes)
    message.since = time.monotonic() - ago
    return message


def test_one_message_always_has_room_and_receipts_make_more() -> None:
    messages = Unreceipted(100)
    assert messages.has_room(1000)
    assert [add(messages, 60).sequence, add(messages, 40).sequence] == [1, 2]
    assert (len(messages), messages.size_bytes) == (2, 100)
    assert not messages.has_room(1)
    (done,) = messages.receipted([(1, time.monotonic())], over_network=True)
    assert (done.size_bytes, done.shared) == (60, False)
    assert messages.has_room(60)
    assert Unreceipted(None).has_room(2**60)


def test_a_receipt_is_for_all_before_it_and_a_repeated_one_for_none() -> None:
    messages = Unreceipted(None)
    for size in (1, 2, 3):
        add(messages, size)
    now = time.monotonic()
    assert [each.size_bytes for each in messages.receipted([(2, now), (2, now)], over_network=True)] == [1, 2]
    assert messages.size_bytes == 3


def test_the_oldest_is_held_up_when_it_takes_longer_than_the_fastest_of_its_size() -> None:
    messages = Unreceipted(None)
    for ago in (1.0, 0.5, 2.0):
        message = add(messages, 10, ago)
        messages.receipted([(message.sequence, message.since + ago)], over_network=True)
    assert not messages.is_held_up
    add(messages, 10, ago=0.6)
    assert not messages.is_held_up  # half a second was the least, and half as long again is nothing special
    messages.receipted([(4, time.monotonic())], over_network=False)
    add(messages, 10, ago=0.8)
    assert messages.is_held_up
    messages.receipted([(5, time.monotonic())], over_network=False)
    add(messages, 11, ago=100.0)
    assert not messages.is_held_up


def test_what_stays_on_the_host_tells_nothing() -> None:
    messages = Unreceipted(None)
    message = add(messages, 10)
    messages.receipted([(message.sequence, message.since)], over_network=False)
    add(messages, 10, ago=100.0)
    assert not messages.is_held_up
