"""What was sent to one peer and is not receipted yet: how much it is, since when, and whether something is in its way.

Pure but for the clock. Leaves to others: sending (delivery.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from gradwire_protocol.v1 import tensors_pb2 as pb

# By how much longer than the fastest of its size a message may take before it counts as held up.
_LONGER = 1.5
# Batches whose sizes differ make some for each size.
_MAXIMUM_SIZES = 1024


@dataclass(frozen=True, slots=True)
class Delivered:
    """A message that the peer has receipted."""

    direction: pb.Direction
    codec: int
    size_bytes: int  # of the payload
    shared: bool  # the payload went through shared memory
    seconds: float  # from when it was sent to its arrival, or to the receipt where the peer has another clock


@dataclass(slots=True)
class Open:
    """A message that was sent or queued, and is not receipted yet."""

    sequence: int
    direction: pb.Direction
    codec: int
    size_bytes: int
    since: float  # time.monotonic() when it was added
    shared: bool = False


class Unreceipted:
    """Open messages, in the order of their sequences. Whoever uses it holds a lock. maximum_bytes: of payloads."""

    def __init__(self, maximum_bytes: int | None) -> None:
        self._maximum_bytes = maximum_bytes
        self._open: deque[Open] = deque()
        self._sequence = 0
        self.size_bytes = 0
        # The shortest time until the receipt, over a network, of messages with as many bytes of payload.
        self._shortest: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._open)

    def has_room(self, size_bytes: int) -> bool:
        """Whether one more message stays within the limit: one always does."""
        if self._maximum_bytes is None or not self._open:
            return True
        return self.size_bytes + size_bytes <= self._maximum_bytes

    def add(self, direction: pb.Direction, codec: int, size_bytes: int) -> Open:
        """Add a message, with the next sequence."""
        self._sequence += 1
        message = Open(self._sequence, direction, codec, size_bytes, time.monotonic())
        self._open.append(message)
        self.size_bytes += size_bytes
        return message

    def receipted(self, receipts: Iterable[tuple[int, float]], *, over_network: bool) -> list[Delivered]:
        """Take receipts in, (sequence, time); each is for all messages before it, too. Return what was delivered."""
        delivered = []
        for sequence, arrived in receipts:
            while self._open and self._open[0].sequence <= sequence:
                done = self._open.popleft()
                self.size_bytes -= done.size_bytes
                seconds = arrived - done.since
                if over_network:
                    self._note_time(done.size_bytes, seconds)
                delivered.append(Delivered(done.direction, done.codec, done.size_bytes, done.shared, seconds))
        return delivered

    @property
    def is_held_up(self) -> bool:
        """Whether the oldest message takes longer over the network than one of its size has taken before.

        The first of a size tells nothing, nor do messages that stay on the host.
        """
        if not self._open:
            return False
        oldest = self._open[0]
        shortest = self._shortest.get(oldest.size_bytes)
        return shortest is not None and time.monotonic() - oldest.since > _LONGER * shortest

    def _note_time(self, size_bytes: int, seconds: float) -> None:
        known = self._shortest.get(size_bytes)
        if known is not None or len(self._shortest) < _MAXIMUM_SIZES:
            self._shortest[size_bytes] = seconds if known is None else min(known, seconds)
