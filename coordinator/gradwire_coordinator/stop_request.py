"""That a run was asked to stop: by whom, and until when its client may take for that."""

from __future__ import annotations

from gradwire_protocol.v1 import coordinator_pb2

# Of the time that whoever was asked to stop has, so much is for ending the run itself; half of it, if it is short.
_END_SECONDS = 5.0


class StopState:
    """Of one run. The first reason stays; the deadline is the earliest. Not thread-safe; times are time.monotonic()."""

    def __init__(self) -> None:
        self.reason = ""
        self._deadline = 0.0

    def ask(self, reason: str, seconds: float, now: float) -> coordinator_pb2.StopRequest | None:
        """Take a request of somebody who stops in so many seconds; return what its client is told, if anything."""
        allowed = max(seconds - _END_SECONDS, seconds / 2)
        first = not self.reason
        self._deadline = now + allowed if first else min(self._deadline, now + allowed)
        if not first:
            return None
        self.reason = reason
        return coordinator_pb2.StopRequest(reason=reason, seconds=allowed)

    def overdue(self, now: float) -> str:
        """Return why the run must be ended now; empty if it need not."""
        if not self.reason or now < self._deadline:
            return ""
        return f"{self.reason}, and its client has not ended it in time"
