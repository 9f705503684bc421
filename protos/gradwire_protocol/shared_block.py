"""Blocks: sealed memory of two processes on one host, cut into slots that carry payloads one way.

The sender makes a block and copies payloads into free slots; the receiver maps it, and says of each slot when it needs
it no more. How the memory gets from one to the other is handover.py's; who offers it to whom, and when, is a server's.

The memory is a memfd: it has no name that could outlive its processes, and the kernel frees it with the last of them,
however they end. Its pages are allocated before it is offered, and its size is sealed: no access can fault.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import sys
import weakref
from pathlib import Path

import numpy as np

from gradwire_protocol.errors import FrameError

TICKET_BYTES = 16
MAXIMUM_SLOTS = 256
# The first page: magic, ticket, challenge, answer; from _RETURNED on, for each slot, the use that was returned last.
HEADER_BYTES = mmap.PAGESIZE
_MAGIC = b"GWBLOCK1"
_TICKET = slice(8, 24)
_CHALLENGE = slice(24, 40)
_ANSWER = slice(40, 56)
_RETURNED = 64
_COUNTER_BYTES = 8
_MFD_NOEXEC_SEAL = 0x0008  # Linux 6.3; not in Python 3.11's os


class BlockError(Exception):
    """A block cannot be made, handed over or mapped. Payloads then go another way: never an error of the run.

    `reason` is one word, for counting; the text is for people.
    """

    def __init__(self, reason: str, explanation: str) -> None:
        super().__init__(explanation)
        self.reason = reason


def unsupported() -> str | None:
    """Return why this platform cannot share memory in this way; None if it can."""
    if not hasattr(os, "memfd_create") or not hasattr(fcntl, "F_ADD_SEALS"):
        return f"{sys.platform} has no sealed memfd, or this Python does not know of it"
    if not Path("/proc/self/fd").is_dir():
        return "/proc is not mounted"
    return None


def padded(size_bytes: int) -> int:
    """Return a slot's size for payloads of `size_bytes`: whole pages."""
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def block_bytes(slots: int, slot_bytes: int) -> int:
    """Return the size of a block."""
    return HEADER_BYTES + slots * slot_bytes


def _answer_to(challenge: bytes) -> bytes:
    return bytes(byte ^ 0xFF for byte in challenge)


def _seals() -> int:
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def _create() -> int:
    try:
        return os.memfd_create("gradwire", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _MFD_NOEXEC_SEAL)
    except OSError:  # an older kernel does not know that flag
        return os.memfd_create("gradwire", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


class OwnBlock:
    """The sender's side. `put` is for one thread.

    The memory goes with the last reference: this object must not be closed while a payload is being copied, so that it
    has no `close` at all.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.size_bytes = block_bytes(slots, slot_bytes)
        self.ticket = secrets.token_bytes(TICKET_BYTES)
        self._challenge = secrets.token_bytes(TICKET_BYTES)
        self._memory: mmap.mmap | None = None
        self._uses = np.zeros(slots, np.uint64)  # how often each slot was used
        self._returned = self._uses  # views of the block once it is allocated
        self._slots = np.zeros((0, 0), np.uint8)

    def allocate(self) -> int:
        """Allocate and seal the memory; return a file descriptor of it, which is the caller's. BlockError."""
        descriptor = -1
        try:
            descriptor = _create()
            os.posix_fallocate(descriptor, 0, self.size_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _seals())
            memory = mmap.mmap(descriptor, self.size_bytes)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise BlockError("failed", f"{self.size_bytes} bytes of memory could not be made: {error}") from error
        memory[: len(_MAGIC)] = _MAGIC
        memory[_TICKET] = self.ticket
        memory[_CHALLENGE] = self._challenge
        self._memory = memory
        self._returned = np.frombuffer(memory, np.uint64, self.slots, _RETURNED)
        self._slots = np.frombuffer(memory, np.uint8, offset=HEADER_BYTES).reshape(self.slots, self.slot_bytes)
        return descriptor

    def is_answered(self) -> bool:
        """Whether somebody who sees this memory has answered its challenge through it."""
        return self._memory is not None and self._memory[_ANSWER] == _answer_to(self._challenge)

    def free(self) -> int:
        """Return how many slots are free."""
        return int(np.count_nonzero(self._returned == self._uses))

    def put(self, payload: memoryview) -> tuple[int, int] | None:
        """Copy a payload into a free slot; return (slot, use), or None if no slot is free or large enough."""
        size = payload.nbytes
        free = self._returned == self._uses
        slot = int(free.argmax())  # the first: it is used most often, so that it is in the processor's cache
        if not free[slot] or not 0 < size <= self.slot_bytes or self._memory is None:
            return None
        self._uses[slot] += 1
        # numpy lets other threads run meanwhile.
        np.copyto(self._slots[slot, :size], np.frombuffer(payload, np.uint8))
        return slot, int(self._uses[slot])


class PeerBlock:
    """The receiver's side: a block that a peer has made. Takes the file descriptor over. BlockError if it is not fit.

    Memory that a payload still lies in stays mapped for as long as anything refers to the payload.
    """

    def __init__(self, descriptor: int, ticket: bytes, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        size = block_bytes(slots, slot_bytes)
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            found = os.fstat(descriptor).st_size
            if seals & _seals() != _seals() or found != size:
                raise BlockError(
                    "failed", f"the memory is not sealed as agreed: {found} bytes of {size}, seals {seals:#x}"
                )
            memory = mmap.mmap(descriptor, size)
        except OSError as error:
            raise BlockError("failed", f"{size} bytes of shared memory cannot be mapped: {error}") from error
        finally:
            os.close(descriptor)
        if memory[: len(_MAGIC)] != _MAGIC or memory[_TICKET] != ticket:
            raise BlockError("failed", "the memory is not the one that was offered")
        self._memory = memory
        self._returned = memoryview(memory)[_RETURNED : _RETURNED + slots * _COUNTER_BYTES].cast("Q")
        self._uses = [0] * slots
        self._payloads: dict[int, weakref.ref[np.ndarray[tuple[int], np.dtype[np.uint8]]]] = {}
        memory[_ANSWER] = _answer_to(memory[_CHALLENGE])

    def take(self, slot: int, use: int, size_bytes: int) -> memoryview:
        """Return the payload in a slot, without a copy. FrameError for what no honest sender says.

        The slot is returned to the sender when the payload is no more: the memoryview, what was cut out of it, and
        every tensor over it. What refers to it owns the slot until then, so that even a write would harm nobody.
        """
        if not 0 <= slot < self.slots or not 0 < size_bytes <= self.slot_bytes:
            raise FrameError(
                "A payload lies outside of its shared block",
                expected=f"{self.slots} slots of {self.slot_bytes} bytes",
                got=f"slot {slot}, {size_bytes} bytes",
            )
        last = self._payloads.get(slot)
        if use != self._uses[slot] + 1 or (last is not None and last() is not None):
            raise FrameError(
                "A slot of a shared block is used again too early",
                expected=f"use {self._uses[slot] + 1}, after the last payload in it is given up",
                got=f"use {use} of slot {slot}",
            )
        self._uses[slot] = use
        returned = self._returned

        def give_back(_: object) -> None:
            # Runs wherever the last reference goes, in the midst of anything: one store, no lock.
            returned[slot] = use

        payload = np.frombuffer(self._memory, np.uint8, size_bytes, HEADER_BYTES + slot * self.slot_bytes)
        # Every view of the memoryview refers to the array; so that is what tells.
        self._payloads[slot] = weakref.ref(payload, give_back)
        return payload.data.toreadonly()
