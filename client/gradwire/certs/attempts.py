"""Limits how often somebody may try: a bucket of attempts for each caller and one for all, which fill up again."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from gradwire_protocol.errors import LimitExceeded

# Callers that are remembered; the one that was silent longest is forgotten first.
_MAXIMUM_CALLERS = 4096


class Attempts:
    """Thread-safe. each: attempts of one caller in a minute; together: of all."""

    def __init__(self, *, each: int = 10, together: int = 120, clock: Callable[[], float] = time.monotonic) -> None:
        self._each = each
        self._together = together
        self._clock = clock
        self._lock = threading.Lock()
        # What is left, and when that was.
        self._all = (float(together), clock())
        self._callers: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def count(self, caller: str) -> None:
        """Count an attempt; LimitExceeded if there were too many."""
        now = self._clock()
        with self._lock:
            own = self._left(self._callers.pop(caller, (float(self._each), now)), self._each, now)
            others = self._left(self._all, self._together, now)
            allowed = own >= 1 and others >= 1
            spent = 1 if allowed else 0
            self._callers[caller] = (own - spent, now)
            self._all = (others - spent, now)
            if len(self._callers) > _MAXIMUM_CALLERS:
                self._callers.popitem(last=False)
        if not allowed:
            raise LimitExceeded(
                "Too many attempts to join",
                expected=f"at most {self._each} a minute, and {self._together} of all callers",
                remedy="wait a minute",
            )

    @staticmethod
    def _left(bucket: tuple[float, float], size: int, now: float) -> float:
        left, at = bucket
        return min(float(size), left + (now - at) * size / 60.0)
