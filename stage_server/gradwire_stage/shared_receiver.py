"""Takes the blocks of shared memory that other servers of a run offer, each for one of their streams.

What a block is, and how it is handed over, is the protocol's; who offers it, shared_memory.py's.
"""

from __future__ import annotations

import threading
from collections.abc import Collection

from gradwire_protocol.errors import FrameError
from gradwire_protocol.handover import take_over
from gradwire_protocol.shared_block import MAXIMUM_SLOTS, TICKET_BYTES, BlockError, PeerBlock, padded, unsupported
from gradwire_protocol.v1 import stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.shared_memory import MAXIMUM_BLOCKS, SharedMemory, slot_size

_TAKE_OVER_SECONDS = 4.0


class SharedReceiver:
    """The blocks that are mapped for a run. Thread-safe.

    servers: who may offer. maximum_payload_bytes: of a single tensor; bounds a slot. The ticket of a block is known to
    nobody but its sender and this server, and the first stream that says it has the block for itself.
    """

    def __init__(self, memory: SharedMemory, servers: Collection[str], maximum_payload_bytes: int) -> None:
        self._settings = memory.settings
        self._servers = servers
        self._maximum_slot_bytes = slot_size(maximum_payload_bytes)
        self._lock = threading.Lock()
        self._blocks: dict[bytes, tuple[PeerBlock, str]] = {}  # by ticket: block and offering server
        self._streams: dict[bytes, object] = {}  # by ticket: the stream that uses the block
        self._closed = False

    def take_over(self, request: stage_pb2.OfferSharedBlockRequest) -> stage_pb2.OfferSharedBlockReply:
        """Map a block that is offered, or say why not."""
        try:
            self._take_over(request)
        except BlockError as error:
            return stage_pb2.OfferSharedBlockReply(reason=error.reason, explanation=str(error))
        return stage_pb2.OfferSharedBlockReply(accepted=True)

    def payload(self, shared: pb.SharedSlot, size_bytes: int, stream: object) -> memoryview | None:
        """Return the payload that a header names, without a copy; None if the run has ended here. FrameError."""
        with self._lock:
            if self._closed:
                return None
            found = self._blocks.get(shared.block)
            if found is None or self._streams.setdefault(shared.block, stream) is not stream:
                raise FrameError(
                    "A payload lies in a shared block that its stream has not been given",
                    expected="a block that was offered for this stream, and accepted",
                    got=f"ticket {shared.block[:TICKET_BYTES].hex()[:8]}…",
                )
        return found[0].take(shared.slot, shared.use, size_bytes)

    def end(self, stream: object) -> None:
        """Let go of a stream's blocks. Payloads that lie in them stay readable."""
        with self._lock:
            for ticket in [ticket for ticket, user in self._streams.items() if user is stream]:
                del self._streams[ticket]
                del self._blocks[ticket]

    def close(self) -> None:
        """Let go of all blocks; more offers are refused. Idempotent."""
        with self._lock:
            self._closed = True
            self._blocks.clear()
            self._streams.clear()

    def _take_over(self, request: stage_pb2.OfferSharedBlockRequest) -> None:
        if self._settings is None:
            raise BlockError("off", "shared memory is switched off on the receiving server")
        if (reason := unsupported()) is not None:
            raise BlockError("unsupported", reason)
        self._check(request)
        descriptor = take_over(self._settings.directory, request.socket, request.ticket, _TAKE_OVER_SECONDS)
        block = PeerBlock(descriptor, request.ticket, request.slots, request.slot_bytes)
        with self._lock:
            self._check_room(request.server)
            self._blocks[request.ticket] = block, request.server

    def _check(self, request: stage_pb2.OfferSharedBlockRequest) -> None:
        if request.server not in self._servers:
            raise BlockError("other-run", f"server {request.server[:64]!r} is not a peer in this run")
        if len(request.ticket) != TICKET_BYTES or request.slot_bytes % padded(1):
            raise BlockError("failed", "the offer is malformed: ticket or size of the slots")
        if not 0 < request.slots <= MAXIMUM_SLOTS or not 0 < request.slot_bytes <= self._maximum_slot_bytes:
            raise BlockError(
                "limit",
                f"{request.slots} slots of {request.slot_bytes} bytes; "
                f"at most {MAXIMUM_SLOTS} of {self._maximum_slot_bytes} are taken",
            )
        with self._lock:
            self._check_room(request.server)
            if request.ticket in self._blocks:
                raise BlockError("failed", "a block with this ticket was offered before")

    def _check_room(self, server: str) -> None:
        if self._closed:
            raise BlockError("other-run", "the run has ended here")
        # Two streams, one for each class of traffic.
        if sum(offering == server for _, offering in self._blocks.values()) >= 2 * MAXIMUM_BLOCKS:
            raise BlockError("limit", f"{2 * MAXIMUM_BLOCKS} blocks of this server are mapped")
