"""Remembers which runs are over on a server.

A Prepare that comes late, or again, must not hold it for a run that nobody will ever release.
"""

from __future__ import annotations

import threading

from gradwire_protocol.errors import StaleGeneration

# More than can still have something on its way.
_REMEMBERED = 256


class EndedRuns:
    """The last generation of each that is over, newest runs last. Thread-safe. server: in errors."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._over: dict[str, int] = {}

    def note(self, run: str, generation: int) -> None:
        """A run's generation is over, and all before it; whether it was ever here or not."""
        with self._lock:
            self._over[run] = max(generation, self._over.pop(run, 0))
            if len(self._over) > _REMEMBERED:
                del self._over[next(iter(self._over))]

    def check(self, run: str, generation: int) -> None:
        """StaleGeneration if it is over."""
        with self._lock:
            over = self._over.get(run, 0)
        if generation <= over:
            raise StaleGeneration(
                f"Run {run} has ended on stage server {self._server}",
                expected=f"generation {over + 1} or later",
                got=f"generation {generation}",
            )
