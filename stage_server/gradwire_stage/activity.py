"""What a run is doing right now, for heartbeats and errors: written by the compute thread, read by others."""

from __future__ import annotations

import threading
from typing import Any

from gradwire_protocol.program import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Action
from gradwire_stage.timeline import Timeline

_WORDS = {
    FORWARD: "forward",
    BACKWARD: "backward",
    INPUT_GRADIENT: "input gradients",
    WEIGHT_GRADIENT: "weight gradients",
}


class Progress:
    """Where a run stands. `advance` and its like are thread-safe; the rest is written by the compute thread only."""

    def __init__(self) -> None:
        self.entry = 0  # in progress, or last finished
        self.action: Action | None = None
        self.doing = ""  # what an entry without a program does
        self.timeline: Timeline[Any] | None = None
        self._lock = threading.Lock()
        self._count = self._client_count = 0

    @property
    def count(self) -> int:
        return self._count

    @property
    def client_count(self) -> int:
        return self._client_count

    @property
    def phase(self) -> str:
        """Phase of the compute thread; empty before its first."""
        return "" if self.timeline is None else self.timeline.phase

    def advance(self) -> None:
        """Count an action begun or finished, a frame or message received or sent."""
        with self._lock:
            self._count += 1

    def advance_client(self) -> None:
        """Count a frame that the client sent or collected."""
        with self._lock:
            self._count += 1
            self._client_count += 1

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
