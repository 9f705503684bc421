"""What a run is doing right now, for heartbeats and errors: written by the compute thread, read by others."""

from __future__ import annotations

import threading

from gradwire_protocol.program import BACKWARD, FORWARD, Action

_WORDS = {FORWARD: "forward", BACKWARD: "backward"}


class Progress:
    """Where a run stands. `advance` is thread-safe; the rest is written by the compute thread only."""

    def __init__(self) -> None:
        self.entry = 0  # in progress, or last finished
        self.action: Action | None = None
        self.doing = ""  # what an entry without a program does
        self._lock = threading.Lock()
        self._count = 0

    @property
    def count(self) -> int:
        return self._count

    def advance(self) -> None:
        """Count an action begun or finished, a message received or sent."""
        with self._lock:
            self._count += 1

    def begin(self, action: Action) -> None:
        self.action = action
        self.advance()

    def text(self) -> str:
        """Return the action in progress ("1F3"), or what else is being done; empty between entries."""
        action = self.action  # read once: the compute thread goes on
        return self.doing if action is None else str(action)

    def where(self) -> str:
        """Return where the compute thread is, in words for an error."""
        action = self.action
        if action is None:
            return f"entry {self.entry}" + (f", {self.doing}" if self.doing else "")
        words = f"{action} of entry {self.entry}"
        if action.kind in _WORDS:
            words += f" ({_WORDS[action.kind]} of micro-batch {action.micro_batch})"
        return f"action {words}"
