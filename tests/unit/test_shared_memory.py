"""Shared memory between a sender and a receiver: what goes through it, how it grows, and how it ends."""

import gc
import mmap
import os
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_pair import KIB, MIB, STREAM, held_resources, pairs

from gradwire_protocol.errors import FrameError
from gradwire_protocol.handover import Directory
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.shared_memory import SharedMemory, SharedMemorySettings, slot_size


@pytest.fixture
def make(tmp_path):
    with pairs(tmp_path) as made:
        yield made


def test_large_payloads_go_through_memory_and_small_ones_do_not(make):
    pair = make()
    assert not pair.passes(256 * KIB - 1)
    assert not pair.peer.offers
    for seed in range(20):
        assert pair.passes(256 * KIB + seed, seed)
    assert len(pair.peer.offers) == 2  # 256 KiB, and the next size
    assert not pair.fallbacks
    assert pair.memory.size_bytes == sum(mmap.PAGESIZE + offer.slots * offer.slot_bytes for offer in pair.peer.offers)


def test_tiny_payloads_share_blocks_of_whole_pages(make):
    pair = make(threshold_bytes=1)
    for size in (1, 8, 600, mmap.PAGESIZE, 2, 4 * mmap.PAGESIZE):
        for seed in range(20):
            assert pair.passes(size, seed)
    assert [offer.slot_bytes for offer in pair.peer.offers] == [mmap.PAGESIZE, 4 * mmap.PAGESIZE]


def test_blocks_grow_with_what_is_under_way_and_no_further_than_allowed(make):
    pair = make(maximum_bytes=21 * MIB)
    held = []
    while (shared := pair.send(MIB)[1]) is not None:
        held.append(pair.receiver.payload(shared, MIB, STREAM))
    assert [offer.slots for offer in pair.peer.offers] == [4, 4, 8, 4]
    assert len(held) == 20
    assert pair.memory.size_bytes <= 21 * MIB
    assert pair.fallbacks == ["no-slot"]
    assert pair.send(2 * MIB)[1] is None  # no slot for it, and no room to make one
    del held[3]
    assert pair.passes(MIB)
    held.clear()
    assert len(pair.peer.offers) == 4
    pair.sender.close()
    assert pair.memory.size_bytes == 0


def test_a_payload_takes_the_smallest_slot_that_fits_and_a_wasteful_one_only_in_need(make):
    pair = make(maximum_bytes=70 * MIB)
    large = [pair.send(8 * MIB)[1] for _ in range(2)]
    assert pair.peer.offers[-1].slot_bytes == 8 * MIB
    small = pair.send(MIB)[1]
    assert [offer.slot_bytes for offer in pair.peer.offers] == [8 * MIB, MIB]
    assert small.block != large[0].block
    assert pair.send(3 * MIB)[1].block == large[0].block  # large slots that are free, and not four times too large
    pair.memory.reserve(256, MIB)  # all that is left
    assert [pair.send(MIB)[1].block == small.block for _ in range(4)] == [True, True, True, False]


@given(st.integers(1, 2**40))
def test_a_slot_wastes_at_most_a_quarter_and_a_page(size):
    assert size <= slot_size(size) < size * 1.25 + mmap.PAGESIZE
    assert slot_size(size) % mmap.PAGESIZE == 0


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 64)), max_size=30), st.integers(0, 2**24))
def test_the_limit_holds_whatever_is_reserved(wanted, maximum_bytes):
    memory = SharedMemory(SharedMemorySettings(directory=Path("/"), maximum_bytes=maximum_bytes), pytest.fail)
    sizes = []
    for slots, pages in wanted:
        fitting = memory.reserve(slots, pages * mmap.PAGESIZE)
        assert 0 <= fitting <= slots
        if fitting:
            sizes.append(mmap.PAGESIZE + fitting * pages * mmap.PAGESIZE)
        assert memory.size_bytes == sum(sizes) <= maximum_bytes
    for size in sizes:
        memory.give_back(size)
    assert memory.size_bytes == 0


def test_a_start_sweeps_what_the_killed_have_left(make, tmp_path):
    pair = make()
    with Directory(tmp_path) as directory, socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(directory.address("0" * 32))
    pair.memory.sweep()
    assert os.listdir(tmp_path / f"gradwire-shared-{os.geteuid()}") == []
    SharedMemory.off().sweep()


def test_only_the_stream_that_came_first_may_use_a_block(make):
    pair = make()
    sent, shared = pair.send(MIB)
    other = pair.send(MIB)[1]
    assert pair.receiver.payload(shared, MIB, STREAM) == sent
    with pytest.raises(FrameError, match="has not been given"):
        pair.receiver.payload(other, MIB, object())
    unknown = pb.SharedSlot(block=bytes(16), slot=0, use=1)
    with pytest.raises(FrameError, match="has not been given"):
        pair.receiver.payload(unknown, MIB, STREAM)
    with pytest.raises(FrameError, match="outside"):
        pair.receiver.payload(other, 2 * MIB, STREAM)


def test_a_streams_blocks_go_with_it_and_payloads_stay(make):
    pair = make()
    sent, shared = pair.send(MIB)
    kept = pair.receiver.payload(shared, MIB, STREAM)
    more = pair.send(MIB)[1]
    pair.receiver.end(STREAM)
    with pytest.raises(FrameError, match="has not been given"):
        pair.receiver.payload(more, MIB, STREAM)
    pair.sender.close()
    gc.collect()
    assert kept == sent
    assert held_resources() == (1, 1)
    del kept
    assert held_resources() == (0, 0)


def test_after_the_run_has_ended_there_are_no_payloads_and_no_errors(make):
    pair = make()
    shared = pair.send(MIB)[1]
    pair.receiver.close()
    assert pair.receiver.payload(shared, MIB, STREAM) is None
    pair.sender.close()
    assert held_resources() == (0, 0)


def test_nothing_grows_over_thousands_of_messages(make):
    pair = make()
    for seed in range(8):
        assert pair.passes(300 * KIB, seed)
    before = held_resources(), len(os.listdir("/proc/self/fd")), threading.active_count()
    payload = memoryview(bytes(300 * KIB))
    for _ in range(5000):
        header = pb.TensorHeader(tensor=pb.TensorInfo(size_bytes=payload.nbytes))
        assert pair.sender.place(header, payload)
        assert pair.receiver.payload(header.tensor.shared, payload.nbytes, STREAM).nbytes == payload.nbytes
    assert (held_resources(), len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert len(pair.peer.offers) == 1
