"""Outbox: results come in order, once, before and after their entry is done; a slow client holds the run up."""

from __future__ import annotations

import threading
import time

import pytest

from gradwire_protocol.errors import Aborted, RunNotFound, ServerBusy
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.outbox import RETAINED_ENTRIES, Outbox, Result


def result(name: str, size: int = 4) -> Result:
    info = pb.TensorInfo(data_type=pb.DATA_TYPE_UINT8, shape=[size], size_bytes=size, codec=pb.CODEC_NONE)
    return Result(pb.TensorHeader(key=pb.MessageKey(value=name), tensor=info), memoryview(bytes(size)))


def names(outbox: Outbox, entry: int) -> list[str]:
    return [item.header.key.value for item in outbox.collect(entry)]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


def test_results_of_a_finished_entry_are_collected_once() -> None:
    outbox = Outbox(2**20)
    outbox.put(1, result("a"))
    outbox.put(1, result("b"))
    outbox.finish(1)
    assert names(outbox, 1) == ["a", "b"]
    with pytest.raises(RunNotFound, match="entry 1"):
        names(outbox, 1)


def test_collect_may_come_first_and_ends_with_the_entry() -> None:
    outbox = Outbox(2**20)
    got: list[str] = []
    thread = threading.Thread(target=lambda: got.extend(names(outbox, 2)))
    thread.start()
    outbox.finish(1)
    outbox.put(2, result("a"))
    wait_until(lambda: outbox.has_room(result("", 2**20)))  # taken while the entry goes on
    outbox.put(2, result("b"))
    outbox.finish(2)
    thread.join(5)
    assert got == ["a", "b"]


def test_an_entry_without_results_ends_the_collection() -> None:
    outbox = Outbox(2**20)
    outbox.finish(3)
    assert names(outbox, 3) == []


def test_put_waits_for_the_client_when_the_outbox_is_full() -> None:
    outbox = Outbox(3000)
    outbox.put(1, result("a", 1000))
    full = result("b", 1000)
    assert not outbox.has_room(full)
    thread = threading.Thread(target=lambda: (outbox.put(1, full), outbox.finish(1)))
    thread.start()
    wait_until(lambda: outbox.waiting_since is not None)
    assert names(outbox, 1) == ["a", "b"]
    thread.join(5)
    assert outbox.waiting_since is None


def test_one_result_fits_however_large() -> None:
    outbox = Outbox(10)
    outbox.put(1, result("a", 1000))
    outbox.finish(1)
    assert names(outbox, 1) == ["a"]


def test_two_collections_of_one_entry_are_refused() -> None:
    outbox = Outbox(2**20)
    outbox.put(1, result("a"))
    first = outbox.collect(1)
    next(first)
    with pytest.raises(ServerBusy):
        next(outbox.collect(1))


def test_what_a_client_abandons_takes_no_room() -> None:
    outbox = Outbox(4000)
    outbox.put(1, result("a", 1000))
    outbox.put(2, result("b", 10))
    collection = outbox.collect(2)
    next(collection)
    collection.close()
    for name in "cdefg":
        outbox.put(2, result(name, 1000))  # dropped: nobody will come for it
    outbox.finish(2)
    assert names(outbox, 1) == ["a"]


def test_uncollected_results_are_dropped_in_time() -> None:
    outbox = Outbox(2**20)
    outbox.put(1, result("a", 2**20 - 2000))
    for entry in range(1, RETAINED_ENTRIES + 2):
        outbox.finish(entry)
    assert outbox.has_room(result("b", 2**20 - 2000))
    with pytest.raises(RunNotFound):
        names(outbox, 1)


def test_close_ends_every_wait() -> None:
    outbox = Outbox(3000)
    errors: list[Aborted] = []

    def guarded(work) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except Aborted as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    outbox.put(1, result("a", 1500))
    putting = guarded(lambda: outbox.put(1, result("b", 1500)))
    collecting = guarded(lambda: names(outbox, 7))
    wait_until(lambda: outbox.waiting_since is not None)
    reason = Aborted("released")
    outbox.close(reason)
    putting.join(5)
    collecting.join(5)
    assert errors == [reason, reason]
    with pytest.raises(Aborted):
        outbox.put(1, result("c"))
