"""Blocks of shared memory: what a receiver refuses, and when a slot comes back."""

import contextlib
import fcntl
import gc
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import gradwire_protocol.torch_tensors  # noqa: F401  # settles torch's one warning about read-only buffers
from gradwire_protocol import shared_block
from gradwire_protocol.errors import FrameError
from gradwire_protocol.shared_block import BlockError, OwnBlock, PeerBlock, block_bytes, padded, unsupported

PAGE = mmap.PAGESIZE


def pair(slots=3, slot_bytes=PAGE):
    own = OwnBlock(slots, slot_bytes)
    peer = PeerBlock(own.allocate(), own.ticket, slots, slot_bytes)
    return own, peer


def payload(size, seed=0):
    return memoryview(np.random.default_rng(seed).integers(0, 256, size, np.uint8)).toreadonly()


def shared_mappings():
    return sum("memfd:gradwire" in line for line in Path("/proc/self/maps").read_text().splitlines())


def shared_descriptors():
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += "memfd:gradwire" in os.readlink(f"/proc/self/fd/{name}")
    return found


def test_a_payload_goes_through_a_slot_without_change():
    own, peer = pair()
    assert own.is_answered()
    for size in (1, 7, PAGE - 1, PAGE):
        sent = payload(size, size)
        slot, use = own.put(sent)
        assert peer.take(slot, use, size) == sent


def test_a_slot_comes_back_when_the_last_tensor_over_it_dies():
    own, peer = pair(slots=1, slot_bytes=padded(400))
    x = torch.arange(100, dtype=torch.float32)
    received = torch.frombuffer(peer.take(*own.put(memoryview(x.numpy())), 400), dtype=torch.float32)
    assert own.put(payload(1)) is None
    leaf = received.view(10, 10)[3:].requires_grad_()
    del received
    loss = (leaf * leaf).sum()  # the graph saves the leaf
    del leaf
    gc.collect()
    assert own.free() == 0
    loss.backward()
    del loss
    assert own.free() == 1


@pytest.mark.parametrize(
    "keep",
    [
        lambda view: view[10:12],
        lambda view: view.cast("i"),
        lambda view: np.frombuffer(view, np.uint8)[3:],
        lambda view: torch.frombuffer(view, dtype=torch.uint8)[5:],
        lambda view: torch.frombuffer(view[4:], dtype=torch.float32).view(3, 1),
    ],
)
def test_whatever_is_cut_out_of_a_payload_keeps_its_slot(keep):
    own, peer = pair(slots=1)
    kept = keep(peer.take(*own.put(payload(16)), 16))
    assert own.free() == 0
    assert len(kept)
    del kept
    assert own.free() == 1


def test_a_tensor_stays_readable_after_both_sides_have_let_go_of_the_block():
    own, peer = pair()
    sent = payload(PAGE)
    tensor = torch.frombuffer(peer.take(*own.put(sent), PAGE), dtype=torch.uint8)
    del own, peer
    gc.collect()
    assert shared_mappings() == 1
    assert bytes(tensor.numpy()) == bytes(sent)
    del tensor
    assert (shared_mappings(), shared_descriptors()) == (0, 0)


def test_writing_to_a_received_tensor_harms_nobody():
    """Nobody should; but it must not end the process, and the next payload must arrive as it was sent."""
    own, peer = pair(slots=1)
    tensor = torch.frombuffer(peer.take(*own.put(payload(PAGE)), PAGE), dtype=torch.uint8)
    tensor.zero_()
    del tensor
    sent = payload(PAGE, 1)
    assert peer.take(*own.put(sent), PAGE) == sent


def test_slots_come_back_from_any_thread():
    own, peer = pair(slots=200)
    views = [peer.take(*own.put(payload(100)), 100) for _ in range(200)]
    threads = [threading.Thread(target=views.__delitem__, args=(0,)) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert own.free() == 200


@pytest.mark.parametrize(("slot", "use", "size"), [(3, 1, 1), (2**32 - 1, 1, 1), (0, 1, PAGE + 1), (0, 1, 2**63)])
def test_a_payload_outside_of_the_block_is_refused(slot, use, size):
    _, peer = pair()
    with pytest.raises(FrameError, match="outside"):
        peer.take(slot, use, size)


def test_a_slot_that_is_still_in_use_cannot_be_announced_again():
    own, peer = pair()
    slot, use = own.put(payload(10))
    kept = peer.take(slot, use, 10)
    for wrong in (use, use + 1, use + 2, 0):
        with pytest.raises(FrameError, match="too early"):
            peer.take(slot, wrong, 10)
    del kept
    with pytest.raises(FrameError, match="too early"):
        peer.take(slot, use + 2, 10)
    assert peer.take(slot, use + 1, 10) is not None


def crafted(size, seals, content=b""):
    descriptor = os.memfd_create("crafted", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    os.pwrite(descriptor, content, 0)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
SIZE = block_bytes(2, PAGE)
TICKET = bytes(range(16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: crafted(SIZE, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL, b"GWBLOCK1" + TICKET), "not sealed"),
        (lambda: crafted(SIZE, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL, b"GWBLOCK1" + TICKET), "not sealed"),
        (lambda: crafted(SIZE - PAGE, SEALS, b"GWBLOCK1" + TICKET), "not sealed"),
        (lambda: crafted(SIZE + PAGE, SEALS, b"GWBLOCK1" + TICKET), "not sealed"),
        (lambda: crafted(SIZE, SEALS | fcntl.F_SEAL_WRITE, b"GWBLOCK1" + TICKET), "cannot be mapped"),
        (lambda: crafted(SIZE, SEALS, b"GWBLOCK1" + bytes(16)), "not the one"),
        (lambda: crafted(SIZE, SEALS), "not the one"),
        (lambda: os.open(__file__, os.O_RDONLY), "cannot be mapped"),  # seals are a memfd's
        (lambda: os.open("/dev/zero", os.O_RDWR), "cannot be mapped"),
        (lambda: os.pipe()[0], "cannot be mapped"),
    ],
)
def test_memory_that_is_not_as_agreed_is_refused_and_closed(make, message):
    descriptor = make()
    with pytest.raises(BlockError, match=message) as caught:
        PeerBlock(descriptor, TICKET, 2, PAGE)
    assert caught.value.reason == "failed"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_the_memory_is_allocated_and_can_neither_shrink_nor_grow():
    own = OwnBlock(4, PAGE)
    descriptor = own.allocate()
    try:
        assert os.fstat(descriptor).st_blocks * 512 >= own.size_bytes
        for size in (0, own.size_bytes + PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    finally:
        os.close(descriptor)


def test_nobody_has_answered_before_the_peer_maps_it():
    own = OwnBlock(1, PAGE)
    assert not own.is_answered()
    descriptor = own.allocate()
    assert not own.is_answered()
    PeerBlock(descriptor, own.ticket, 1, PAGE)
    assert own.is_answered()


def test_without_room_to_map_it_there_is_a_typed_error():
    """Either side under memory pressure: here, a limit on its address space."""
    script = """
import resource
from gradwire_protocol.shared_block import BlockError, OwnBlock, PeerBlock
own = OwnBlock(2, 2**26)
descriptor = own.allocate()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
for make in (lambda: PeerBlock(descriptor, own.ticket, 2, 2**26), OwnBlock(2, 2**26).allocate):
    try:
        make()
    except BlockError as error:
        print(error.reason, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    receiver, sender = done.stdout.splitlines()
    assert receiver.startswith("failed 134221824 bytes of shared memory cannot be mapped")
    assert sender.startswith("failed 134221824 bytes of memory could not be made")


def test_a_platform_without_it_says_why(monkeypatch):
    assert unsupported() is None
    monkeypatch.delattr(os, "memfd_create")
    assert "no sealed memfd" in unsupported()


def test_slots_are_whole_pages():
    assert [padded(size) for size in (1, PAGE, PAGE + 1)] == [PAGE, PAGE, 2 * PAGE]
    assert shared_block.HEADER_BYTES >= 64 + 8 * shared_block.MAXIMUM_SLOTS


class Slots(RuleBasedStateMachine):
    """Any order of sending, taking and giving up: no payload is ever overwritten, and no slot is lost."""

    def __init__(self):
        super().__init__()
        self.own, self.peer = pair(slots=3)
        self.sent = []  # announced, not taken
        self.held = []
        self.number = 0

    @rule(size=st.integers(1, PAGE))
    def send(self, size):
        self.number += 1
        content = payload(size, self.number)
        placed = self.own.put(content)
        assert (placed is None) == (len(self.sent) + len(self.held) == 3)
        if placed is not None:
            self.sent.append((*placed, content))

    @rule()
    def send_too_much(self):
        assert self.own.put(payload(PAGE + 1)) is None

    @precondition(lambda self: self.sent)
    @rule(index=st.integers(0, 2))
    def take(self, index):
        slot, use, content = self.sent.pop(index % len(self.sent))
        self.held.append((self.peer.take(slot, use, content.nbytes), content))

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 2))
    def give_up(self, index):
        del self.held[index % len(self.held)]

    @invariant()
    def nothing_is_lost_or_changed(self):
        assert self.own.free() == 3 - len(self.sent) - len(self.held)
        assert all(view == content for view, content in self.held)


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


@given(st.integers(0, 2**33), st.integers(0, 2**65), st.integers(-1, 2**65))
def test_whatever_a_header_says_is_refused_or_true(slot, use, size):
    own, peer = pair()
    own.put(payload(5))
    if (slot, use) == (0, 1) and 0 < size <= PAGE:
        assert peer.take(slot, use, size).nbytes == size
        return
    with contextlib.suppress(FrameError):
        taken = peer.take(slot, use, size)
        assert slot < 3
        assert use == 1
        assert taken.nbytes == size <= PAGE
