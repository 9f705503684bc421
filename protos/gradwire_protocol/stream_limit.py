"""How many streams a service keeps open at once: each holds a thread of its pool, which other calls need too."""

from __future__ import annotations

import threading

from gradwire_protocol.errors import LimitExceeded

# Of a service's pool, and how many of them streams may hold: heartbeats and the calls of others need some too.
WORKERS = 512
MAXIMUM_STREAMS = 448


class StreamLimit:
    """A context manager around each stream: LimitExceeded beyond the maximum. `what`: whose streams. Thread-safe."""

    def __init__(self, maximum: int, what: str) -> None:
        self._maximum = maximum
        self._what = what
        self._lock = threading.Lock()
        self._open = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._open >= self._maximum:
                raise LimitExceeded(
                    f"Too many {self._what} are open",
                    expected=f"{self._maximum} at most",
                    remedy="close others first",
                )
            self._open += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._open -= 1
