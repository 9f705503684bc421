"""When payloads go in chunks, since one side cannot or will not share memory; and the reason that is counted."""

import mmap
import os
import threading
import time

import pytest
from shared_pair import KIB, MIB, Pair, held_resources, pairs

from gradwire_protocol.channels import bind
from gradwire_protocol.shared_block import BlockError
from gradwire_protocol.v1 import stage_pb2
from gradwire_stage import shared_memory


@pytest.fixture
def make(tmp_path):
    with pairs(tmp_path) as made:
        yield made


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


def test_a_peer_that_does_not_know_the_call_gets_chunks(make):
    class Old(Pair):
        def serve(self):
            self.address = bind(self.server, "127.0.0.1:0")
            self.server.start()

    assert_refused(make(kind=Old), "unsupported")


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
