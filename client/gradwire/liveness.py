"""Time in which this process was running, and what is looked at once a second of it.

A process that was stopped (a debugger, Ctrl-Z, a sleeping laptop) could not hear others: that time proves nothing about
them, and does not count. Leaves to others: what is looked at, and what follows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

TICK_SECONDS = 1.0


class Liveness:
    """A thread that calls checks once a second, until `stop`. Checks must not block, nor raise."""

    def __init__(self, name: str) -> None:
        self._checks: list[Callable[[], None]] = []
        self._seconds = 0.0
        self._stop = threading.Event()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @property
    def seconds(self) -> float:
        """Seconds that this process has been running since the start, as of the last tick. Any thread."""
        return self._seconds

    def add(self, check: Callable[[], None]) -> None:
        """Call `check` at every tick from now on. Any thread."""
        self._checks.append(check)

    def stop(self) -> None:
        """End the thread; does not wait for it. Any thread."""
        self._stop.set()

    def _run(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(TICK_SECONDS):
            now = time.monotonic()
            # Of a longer gap only so much: in the rest this process did not run.
            self._seconds += min(now - before, 2 * TICK_SECONDS)
            before = now
            for check in list(self._checks):
                check()
