"""Sends payloads to servers of the same host through shared memory: when, and in blocks of which size.

Every trouble with it, on either side, has the same outcome: payloads go over gRPC, and a counter and a log line say
why. What a block is, and how it is handed over, is the protocol's; who takes it, shared_receiver.py's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog

from gradwire_protocol.handover import Directory, Handover
from gradwire_protocol.shared_block import MAXIMUM_SLOTS, BlockError, OwnBlock, block_bytes, padded, unsupported
from gradwire_protocol.v1 import stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb

# Of one stream. Each block doubles the slots of its size, so that this is no limit in practice.
MAXIMUM_BLOCKS = 16
# The first block of a size has 2 to 4 slots, as many as lie within this: its memory is made while a payload waits.
_FIRST_BYTES = 64 * 2**20
# A payload may lie in a slot this many times larger than its own would be, as long as that can still be made.
_WASTE = 4
# Copying more would hold up the thread that computes.
_AT_ONCE_BYTES = 4 * 2**20
_OFFER_SECONDS = 5.0

_log = structlog.get_logger(__name__)

# Sends an offer to the peer: a grpc.Future of an OfferSharedBlockReply.
Offer = Callable[[stage_pb2.OfferSharedBlockRequest], Any]


@dataclass(frozen=True, kw_only=True)
class SharedMemorySettings:
    """directory: where servers that share memory find each other; threshold_bytes: the smallest payload for it.

    maximum_bytes: what this server may hold for its sending, in all.
    """

    directory: Path
    maximum_bytes: int
    threshold_bytes: int = 256 * 2**10


class SharedMemory:
    """What a server may share, and how much of it is in use. `settings` None: nothing. Thread-safe.

    `on_fallback` gets one word for each block that a peer refused, and for each payload that found no slot.
    """

    def __init__(self, settings: SharedMemorySettings | None, on_fallback: Callable[[str], None]) -> None:
        self.settings = settings
        self.on_fallback = on_fallback
        self._lock = threading.Lock()
        self._used = 0

    @classmethod
    def off(cls) -> SharedMemory:
        """Return one that shares nothing."""
        return cls(None, lambda reason: None)

    @property
    def size_bytes(self) -> int:
        """Bytes of blocks that are held for sending."""
        return self._used

    def sweep(self) -> None:
        """Remove what servers that were killed have left in the directory. For the start of the process."""
        if self.settings is None or unsupported() is not None:
            return
        try:
            with Directory(self.settings.directory) as directory:
                removed = directory.sweep()
        except BlockError as error:
            _log.info("no memory is shared with other servers", reason=str(error))
            return
        if removed:
            _log.info("removed sockets of servers that are gone", sockets=removed)

    def reserve(self, slots: int, slot_bytes: int) -> int:
        """Take room for a block of at most so many slots; return how many there is room for."""
        if self.settings is None:
            return 0
        with self._lock:
            room = self.settings.maximum_bytes - self._used - block_bytes(0, slot_bytes)
            fitting = max(0, min(slots, room // slot_bytes))
            if fitting:
                self._used += block_bytes(fitting, slot_bytes)
            return fitting

    def give_back(self, size_bytes: int) -> None:
        with self._lock:
            self._used -= size_bytes


def slot_size(size_bytes: int) -> int:
    """Return the slot for payloads about that large: at most a quarter larger, and whole pages."""
    step = 1 << max(0, (size_bytes - 1).bit_length() - 3)
    return padded(-(-size_bytes // step) * step)


class SharedSender:
    """Places the payloads of one stream into blocks that its peer has accepted. `place` is for the stream's thread.

    Blocks are made when a payload needs one, and then more of them, each with as many slots as there are of that size:
    how many are under way at once is known to nobody before. `about` is what every offer says.
    """

    def __init__(self, memory: SharedMemory, about: stage_pb2.OfferSharedBlockRequest, peer: str, offer: Offer) -> None:
        self._memory = memory
        self._about = about
        self._peer = peer
        self._offer = offer
        self._lock = threading.Lock()
        self._blocks: list[OwnBlock] = []  # replaced, never changed
        self._growing = memory.settings is not None
        self._closed = False

    def place(self, header: pb.TensorHeader, payload: memoryview) -> bool:
        """Copy a payload into shared memory and say so in its header; False if it has to go in chunks."""
        settings = self._memory.settings
        size = payload.nbytes
        if settings is None or size < settings.threshold_bytes or not (self._blocks or self._growing):
            return False
        slot_bytes = slot_size(size)
        block, placed = self._put(payload, _WASTE * slot_bytes)
        if placed is None and self._growing and self._grow(slot_bytes):
            block, placed = self._put(payload, _WASTE * slot_bytes)
        if placed is None:
            block, placed = self._put(payload, None)
        if block is None or placed is None:
            if self._blocks or self._growing:  # otherwise its refusal has been counted
                self._memory.on_fallback("no-slot")
            return False
        header.tensor.shared.block = block.ticket
        header.tensor.shared.slot, header.tensor.shared.use = placed
        return True

    def place_at_once(self, header: pb.TensorHeader, payload: memoryview) -> bool:
        """Do what `place` does, if a slot of the right size is free. In place of the stream's thread, not beside it."""
        settings = self._memory.settings
        size = payload.nbytes
        if settings is None or size < settings.threshold_bytes or size > _AT_ONCE_BYTES:
            return False
        block, placed = self._put(payload, _WASTE * slot_size(size))
        if block is None or placed is None:
            return False
        header.tensor.shared.block = block.ticket
        header.tensor.shared.slot, header.tensor.shared.use = placed
        return True

    def close(self) -> None:
        """Let go of the blocks: what lies in them stays readable for the peer. Any thread; idempotent."""
        with self._lock:
            self._closed = True
            self._growing = False
            blocks, self._blocks = self._blocks, []
        self._memory.give_back(sum(block.size_bytes for block in blocks))

    def _put(self, payload: memoryview, largest_slot: int | None) -> tuple[OwnBlock | None, tuple[int, int] | None]:
        for block in self._blocks:  # the smallest slots first
            if largest_slot is None or block.slot_bytes <= largest_slot:
                placed = block.put(payload)
                if placed is not None:
                    return block, placed
        return None, None

    def _grow(self, slot_bytes: int) -> bool:
        present = sum(block.slots for block in self._blocks if block.slot_bytes == slot_bytes)
        wanted = present or max(2, min(4, _FIRST_BYTES // slot_bytes))
        slots = self._memory.reserve(min(wanted, MAXIMUM_SLOTS), slot_bytes)
        if slots == 0:
            return False
        block = OwnBlock(slots, slot_bytes)
        try:
            self._hand_over(block)
        except BlockError as error:
            self._memory.give_back(block.size_bytes)
            self.refused(error)
            return False
        with self._lock:
            if not self._closed:
                self._blocks = sorted((*self._blocks, block), key=lambda block: block.slot_bytes)
                self._growing = len(self._blocks) < MAXIMUM_BLOCKS
                if len(self._blocks) == 1:
                    _log.info("large payloads go to a server through shared memory", peer=self._peer)
                return True
        self._memory.give_back(block.size_bytes)
        return False

    def refused(self, error: BlockError) -> None:
        """No more blocks: what is true of one will be of the next. On the stream's thread."""
        self._growing = False
        if self._closed:  # the stream was cut off meanwhile: that is all
            return
        self._memory.on_fallback(error.reason)
        what = "no more memory is shared" if self._blocks else "payloads go over gRPC"
        _log.info(f"{what} with a server", peer=self._peer, reason=error.reason, explanation=str(error))

    def _hand_over(self, block: OwnBlock) -> None:
        """Offer a block, give it to the peer that comes for it, and see the peer's answer in it. BlockError."""
        settings = self._memory.settings
        reason = unsupported()
        if reason is not None or settings is None:
            raise BlockError("unsupported", reason or "shared memory is off")
        with Handover(settings.directory) as handover:
            request = stage_pb2.OfferSharedBlockRequest()
            request.CopyFrom(self._about)
            request.socket, request.ticket = handover.name, block.ticket
            request.slots, request.slot_bytes = block.slots, block.slot_bytes
            try:
                call = self._offer(request)
                handover.serve(block.ticket, block.allocate, call.done)
                reply = call.result()
            except grpc.RpcError as error:
                unknown = error.code() is grpc.StatusCode.UNIMPLEMENTED
                raise BlockError(
                    "unsupported" if unknown else "failed", f"the offer failed: {error.details()}"
                ) from error
            except grpc.FutureCancelledError as error:
                raise BlockError("failed", "the offer was cut off") from error
        if not reply.accepted:
            raise BlockError(reply.reason, reply.explanation)
        if not block.is_answered():
            raise BlockError("failed", "the peer's answer cannot be seen in the memory")


def offers_to(channel: Any) -> Offer:
    """Return what sends offers to a stage server on the other side of a channel."""
    method = channel.unary_unary(
        "/gradwire_protocol.v1.StageService/OfferSharedBlock",
        request_serializer=stage_pb2.OfferSharedBlockRequest.SerializeToString,
        response_deserializer=stage_pb2.OfferSharedBlockReply.FromString,
    )

    def offer(request: stage_pb2.OfferSharedBlockRequest) -> Any:
        return method.future(request, timeout=_OFFER_SECONDS, wait_for_ready=True)

    return offer
