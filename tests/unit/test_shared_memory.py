"""Shared memory between a sender and a receiver, with a real server for the offers: when it is used, and when not."""

import contextlib
import gc
import mmap
import os
import socket
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwire_protocol.channels import bind, open_channel
from gradwire_protocol.errors import ErrorInterceptor, FrameError
from gradwire_protocol.handover import Directory
from gradwire_protocol.shared_block import BlockError
from gradwire_protocol.v1 import stage_pb2, stage_pb2_grpc
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage import shared_memory
from gradwire_stage.shared_memory import SharedMemory, SharedMemorySettings, SharedSender, offers_to, slot_size
from gradwire_stage.shared_receiver import SharedReceiver

KIB, MIB = 2**10, 2**20
STREAM = object()


class Peer(stage_pb2_grpc.StageServiceServicer):
    """A server that takes blocks with what `receiver` is at the time."""

    def __init__(self, receiver):
        self.receiver = receiver
        self.offers = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def OfferSharedBlock(self, request, context):
        self.offers.append(request)
        self.entered.set()
        self.gate.wait(10)
        return self.receiver.take_over(request)


class Pair:
    """Both sides, and what they say."""

    def __init__(
        self, directory, maximum_bytes=64 * MIB, receiving_directory=None, receiving=True, threshold_bytes=256 * KIB
    ):
        self.fallbacks = []
        self.memory = SharedMemory(
            SharedMemorySettings(directory=directory, maximum_bytes=maximum_bytes, threshold_bytes=threshold_bytes),
            self.fallbacks.append,
        )
        other = SharedMemorySettings(directory=receiving_directory or directory, maximum_bytes=0)
        self.receiver = SharedReceiver(SharedMemory(other if receiving else None, pytest.fail), ["a"], 1024 * MIB)
        self.peer = Peer(self.receiver)
        self.server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=(ErrorInterceptor(),))
        self.serve()
        self.channel = open_channel(self.address)
        self.sender = self.new_sender()

    def serve(self):
        stage_pb2_grpc.add_StageServiceServicer_to_server(self.peer, self.server)
        self.address = bind(self.server, "127.0.0.1:0")
        self.server.start()

    def new_sender(self, server="a"):
        about = stage_pb2.OfferSharedBlockRequest(run="r", generation=1, server=server)
        return SharedSender(self.memory, about, "the peer", offers_to(self.channel))

    def send(self, size, seed=0):
        """Return (what was sent, where it is); the latter is None if it has to go in chunks."""
        payload = memoryview(np.random.default_rng(seed).integers(0, 256, size, np.uint8))
        header = pb.TensorHeader(tensor=pb.TensorInfo(size_bytes=size))
        placed = self.sender.place(header, payload)
        assert placed == header.tensor.HasField("shared")
        return payload, (header.tensor.shared if placed else None)

    def passes(self, size, seed=0):
        """Send and take; return whether it went through shared memory."""
        sent, shared = self.send(size, seed)
        return shared is not None and self.receiver.payload(shared, size, STREAM) == sent

    def close(self):
        self.peer.gate.set()
        self.sender.close()
        self.receiver.close()
        self.channel.close()
        self.server.stop(None).wait()


@pytest.fixture
def make(tmp_path):
    with contextlib.ExitStack() as stack:

        def made(*arguments, **options):
            pair = Pair(tmp_path, *arguments, **options)
            stack.callback(pair.close)
            return pair

        yield made


def held_resources():
    """(Mappings, descriptors) of blocks in this process."""
    mappings = sum("memfd:gradwire" in line for line in Path("/proc/self/maps").read_text().splitlines())
    descriptors = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            descriptors += "memfd:gradwire" in os.readlink(f"/proc/self/fd/{name}")
    return mappings, descriptors


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


def assert_refused(pair, reason):
    """One offer, one count: what follows goes in chunks and asks no more."""
    offers = len(pair.peer.offers)
    for _ in range(3):
        assert pair.send(MIB)[1] is None
    assert pair.fallbacks == [reason]
    assert len(pair.peer.offers) - offers <= 1
    assert pair.memory.size_bytes == 0
    assert held_resources() == (0, 0)
    private = pair.memory.settings.directory / f"gradwire-shared-{os.geteuid()}"
    assert not private.is_dir() or os.listdir(private) == []


def test_a_receiver_that_sees_other_files_is_another_host(make, tmp_path_factory):
    assert_refused(make(receiving_directory=tmp_path_factory.mktemp("other")), "other-host")


def test_a_receiver_that_has_it_switched_off_says_so(make):
    assert_refused(make(receiving=False), "off")


def test_a_receiver_that_cannot_says_so(make, monkeypatch):
    pair = make()
    monkeypatch.setattr("gradwire_stage.shared_receiver.unsupported", lambda: "no such thing here")
    assert_refused(pair, "unsupported")


def test_a_sender_that_cannot_does_not_ask(make, monkeypatch):
    pair = make()
    monkeypatch.setattr(shared_memory, "unsupported", lambda: "no such thing here")
    assert_refused(pair, "unsupported")
    assert not pair.peer.offers


def test_a_sender_that_has_it_switched_off_does_not_ask(make):
    pair = make()
    pair.memory.settings = None
    pair.sender = pair.new_sender()
    assert not pair.passes(MIB)
    assert not pair.peer.offers
    assert not pair.fallbacks


def test_a_peer_that_does_not_know_the_call_gets_chunks(make, monkeypatch):
    class Old(Pair):
        def serve(self):
            self.address = bind(self.server, "127.0.0.1:0")
            self.server.start()

    monkeypatch.setitem(globals(), "Pair", Old)
    assert_refused(make(), "unsupported")


def test_a_server_that_is_no_peer_of_the_run_is_refused(make):
    pair = make()
    pair.sender = pair.new_sender("b")
    assert_refused(pair, "other-run")


def test_a_run_that_has_ended_takes_no_blocks(make):
    pair = make()
    pair.receiver.close()
    assert_refused(pair, "other-run")


def test_a_peer_that_says_yes_without_looking_is_not_believed(make):
    class Liar:
        def take_over(self, request):
            return stage_pb2.OfferSharedBlockReply(accepted=True)

    pair = make()
    pair.peer.receiver = Liar()
    assert_refused(pair, "failed")


def test_a_peer_that_does_not_answer_costs_a_limited_wait(make, monkeypatch):
    monkeypatch.setattr(shared_memory, "_OFFER_SECONDS", 0.2)
    pair = make()
    pair.peer.gate.clear()
    start = time.monotonic()
    assert_refused(pair, "failed")
    assert time.monotonic() - start < 2


def test_closing_the_channel_ends_an_offer_at_once(make):
    pair = make()
    pair.peer.gate.clear()
    results = []
    thread = threading.Thread(target=lambda: results.append(pair.send(MIB)[1]))
    thread.start()
    assert pair.peer.entered.wait(5)
    start = time.monotonic()
    pair.sender.close()
    pair.channel.close()
    thread.join(5)
    assert time.monotonic() - start < 1
    assert results == [None]
    assert not pair.fallbacks  # nothing was refused
    assert pair.memory.size_bytes == 0


def test_a_directory_that_cannot_be_used_is_a_reason_not_a_failure(make, tmp_path):
    (tmp_path / f"gradwire-shared-{os.geteuid()}").write_text("in the way")
    pair = make()
    pair.memory.sweep()
    assert pair.send(MIB)[1] is None
    assert pair.fallbacks == ["not-allowed"]


def test_a_start_sweeps_what_the_killed_have_left(make, tmp_path):
    pair = make()
    with Directory(tmp_path) as directory, socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(directory.address("0" * 32))
    pair.memory.sweep()
    assert os.listdir(tmp_path / f"gradwire-shared-{os.geteuid()}") == []
    SharedMemory.off().sweep()


def test_memory_that_cannot_be_had_is_a_reason_not_a_failure(make, monkeypatch):
    def no_space(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    assert_refused(make(), "failed")


def test_a_receiver_without_room_for_it_gets_chunks(make, monkeypatch):
    def no_memory(block, descriptor, *others):
        os.close(descriptor)
        raise BlockError("failed", "cannot be mapped: out of memory")

    monkeypatch.setattr("gradwire_stage.shared_receiver.PeerBlock.__init__", no_memory)
    pair = make()
    assert_refused(pair, "failed")


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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"slots": 0}, "limit"),
        ({"slots": 257}, "limit"),
        ({"slot_bytes": 2**40}, "limit"),
        ({"slot_bytes": 0}, "limit"),
        ({"slot_bytes": mmap.PAGESIZE + 1}, "failed"),
        ({"slot_bytes": 2 * MIB}, "failed"),  # not what the memory has
        ({"ticket": b"short"}, "failed"),
        ({"ticket": bytes(16)}, "failed"),  # not the one that the sender waits for
        ({"socket": "/run/docker.sock"}, "failed"),
        ({"server": ""}, "other-run"),
    ],
)
def test_offers_that_are_not_true_are_refused(make, change, reason):
    pair = make()
    offer = pair.sender._offer

    def false(request):
        for name, value in change.items():
            setattr(request, name, value)
        return offer(request)

    pair.sender._offer = false
    assert_refused(pair, reason)


def test_a_peer_cannot_have_more_blocks_mapped_than_its_streams_need(make):
    pair = make(maximum_bytes=10**9)
    senders = [pair.new_sender() for _ in range(33)]
    for index, pair.sender in enumerate(senders):
        assert pair.passes(256 * KIB) == (index < 32)
    assert pair.fallbacks == ["limit"]
    for sender in senders:
        sender.close()


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
