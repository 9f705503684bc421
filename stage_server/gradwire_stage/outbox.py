"""Where results of entries wait until the client collects them.

The compute thread puts, the gRPC thread of each Collect call takes. Knows headers and payloads, and not what they
mean.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from gradwire_protocol.delivery import Payload
from gradwire_protocol.errors import GradwireError, RunNotFound, ServerBusy
from gradwire_protocol.v1 import tensors_pb2 as pb

# Results that nobody collects are dropped when this many later entries have finished: the largest window.
RETAINED_ENTRIES = 16
_OVERHEAD_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Result:
    """One message for the client."""

    header: pb.TensorHeader
    payload: Payload

    @property
    def size_bytes(self) -> int:
        return _OVERHEAD_BYTES + self.header.tensor.size_bytes


@dataclass(slots=True)
class _Box:
    results: deque[Result] = field(default_factory=deque)
    collecting: bool = False


class Outbox:
    """Results by entry, within a limit on their total size. Thread-safe.

    While the limit is reached, `put` waits for the client; one result always fits.
    """

    def __init__(self, maximum_bytes: int) -> None:
        self._maximum_bytes = maximum_bytes
        self._changed = threading.Condition()
        self._boxes: dict[int, _Box] = {}
        # Entries up to `_finished` whose results have been collected, or dropped.
        self._gone: set[int] = set()
        self._finished = 0
        self._bytes = 0
        self._closed: GradwireError | None = None
        self._waiting_since: float | None = None

    @property
    def waiting_since(self) -> float | None:
        """When `put` began to wait for the client (time.monotonic); None if it does not wait."""
        return self._waiting_since

    def has_room(self, result: Result) -> bool:
        """Whether `put` would not wait."""
        return self._bytes == 0 or self._bytes + result.size_bytes <= self._maximum_bytes

    def put(self, entry: int, result: Result) -> None:
        """Keep a result of an entry in progress. Raises what the outbox was closed with."""
        with self._changed:
            if not self._may_go_on(entry, result):
                self._waiting_since = time.monotonic()
                self._changed.wait_for(lambda: self._may_go_on(entry, result))
                self._waiting_since = None
            if self._closed:
                raise self._closed
            if entry in self._gone:  # its collector has gone away
                return
            self._boxes.setdefault(entry, _Box()).results.append(result)
            self._bytes += result.size_bytes
            self._changed.notify_all()

    def finish(self, entry: int) -> None:
        """No more results of this entry and all before it will come."""
        with self._changed:
            self._finished = entry
            for old in [number for number in self._boxes if number <= entry - RETAINED_ENTRIES]:
                if not self._boxes[old].collecting:
                    self._drop(old)
            self._gone = {number for number in self._gone if number > entry - 4 * RETAINED_ENTRIES}
            self._changed.notify_all()

    def collect(self, entry: int) -> Iterator[Result]:
        """Yield the results of an entry as they come; end when the entry is finished. For one caller per entry.

        Raises RunNotFound if they have been collected or dropped, ServerBusy if they are being collected, and what
        the outbox was closed with.
        """
        with self._changed:
            if entry in self._gone:
                raise RunNotFound(
                    f"The results of entry {entry} are not here any more",
                    expected=f"to be collected once, before {RETAINED_ENTRIES} later entries have finished",
                )
            box = self._boxes.setdefault(entry, _Box())
            if box.collecting:
                raise ServerBusy(f"The results of entry {entry} are being collected already")
            box.collecting = True
        try:
            while (result := self._next(entry, box)) is not None:
                yield result
        finally:
            with self._changed:
                self._drop(entry)
                self._changed.notify_all()

    def close(self, reason: GradwireError) -> None:
        """Drop everything; every wait, now and later, ends with `reason`. The first reason stays."""
        with self._changed:
            if self._closed is None:
                self._closed = reason
            for box in self._boxes.values():
                box.results.clear()
            self._bytes = 0
            self._changed.notify_all()

    def _may_go_on(self, entry: int, result: Result) -> bool:
        return self._closed is not None or entry in self._gone or self.has_room(result)

    def _next(self, entry: int, box: _Box) -> Result | None:
        with self._changed:
            self._changed.wait_for(lambda: box.results or self._closed or self._finished >= entry)
            if box.results:
                result = box.results.popleft()
                self._bytes -= result.size_bytes
                self._changed.notify_all()
                return result
            if self._finished < entry and self._closed:
                raise self._closed
            return None

    def _drop(self, entry: int) -> None:
        box = self._boxes.pop(entry, None)
        if box is not None:
            self._bytes -= sum(result.size_bytes for result in box.results)
            self._gone.add(entry)
