"""What a run has for its client, in order, until its end: results of entries, written checkpoints, the wish to stop."""

from __future__ import annotations

import queue
from collections.abc import Iterator

from gradwire_protocol.errors import GradwireError
from gradwire_protocol.v1 import coordinator_pb2, run_pb2

Outcome = run_pb2.EntryResult | run_pb2.SaveOutcome | coordinator_pb2.StopRequest


class Outcomes:
    """A queue from the run to the one stream that its client has. Thread-safe."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Outcome | GradwireError | None] = queue.SimpleQueue()

    def put(self, outcome: Outcome) -> None:
        self._items.put(outcome)

    def end(self, error: GradwireError | None) -> None:
        """Nothing more comes; error: what the client gets as the run's end."""
        self._items.put(error)

    def each(self, sign_seconds: float) -> Iterator[Outcome | None]:
        """Yield what there is until the run ends; raise its failure.

        Yields None when there has been nothing for `sign_seconds`: a sign of life for who waits for it.
        """
        while True:
            try:
                item = self._items.get(timeout=sign_seconds)
            except queue.Empty:
                yield None
                continue
            if item is None:
                return
            if isinstance(item, GradwireError):
                raise item
            yield item
