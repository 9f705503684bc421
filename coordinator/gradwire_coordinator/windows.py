"""How far apart the ends of a segment can be, under a threshold of seconds and a limit of bytes.

What bounds a search before it weighs anything. Leaves to others: weighing (`segment_costs.py`), and the search
(`stage_search.py`).
"""

from __future__ import annotations

import numpy as np

from gradwire_coordinator.interval_sums import Units
from gradwire_coordinator.partition_problem import Floats, Integers
from gradwire_coordinator.segment_costs import Stage

# Running sums of a whole graph are off by less than this, relative to a stage.
_ROUNDING = 1e-9


class Window:
    """Which starts an end can have, and the reverse, if a stage takes no longer than a threshold.

    From running sums that a segment is not below; what crosses its ends counts as far as its first and its last unit
    read and make it.
    """

    def __init__(self, units: Units, stage: Stage) -> None:
        seconds = units.seconds(stage.device, stage.recomputes)
        sent = np.concatenate([[0.0], units.sent.of_units])
        returned = np.concatenate([units.returned.of_units, [0.0]])
        until = (seconds + stage.link_on.seconds(sent)) * stage.weight
        since = (seconds - stage.link_back.seconds(returned)) * stage.weight
        # A threshold that no segment is above.
        self.most = float(until.max() - since.min())
        self._widths: dict[float, int] = {}
        self._until: Floats = np.minimum.accumulate(until[::-1])[::-1]
        self._since: Floats = np.maximum.accumulate(since)
        self._limit = stage.limit
        self._bytes_until: Floats = units.state.at_least + stage.running * units.held
        incoming = np.concatenate([units.incoming.of_units, [0.0]])
        self._bytes_since: Floats = np.maximum.accumulate(self._bytes_until - stage.live * incoming)

    def last_end(self, start: Integers, threshold: float) -> Integers:
        """Return the last end that any start up to this one can have."""
        latest = self._since[start] + threshold * (1 + _ROUNDING)
        by_time = np.searchsorted(self._until, latest, side="right") - 1
        if np.isinf(self._limit):
            return by_time
        by_bytes = np.searchsorted(self._bytes_until, self._bytes_since[start] + self._limit, side="right") - 1
        return np.minimum(by_time, by_bytes)

    def first_start(self, end: Integers, threshold: float) -> Integers:
        """Return the first start that any end from this one on can have."""
        earliest = self._until[end] - threshold * (1 + _ROUNDING)
        by_time = np.searchsorted(self._since, earliest, side="left")
        if np.isinf(self._limit):
            return by_time
        by_bytes = np.searchsorted(self._bytes_since, self._bytes_until[end] - self._limit, side="left")
        return np.maximum(by_time, by_bytes)

    def width(self, threshold: float) -> int:
        """Return how many starts an end has at the most."""
        if threshold not in self._widths:
            ends = np.arange(len(self._until))
            self._widths[threshold] = int((ends - self.first_start(ends, threshold)).max())
        return self._widths[threshold]


class Windows:
    """The windows of stages over one set of units, each made once."""

    def __init__(self, units: Units) -> None:
        self._units = units
        self._known: dict[Stage, Window] = {}

    def of(self, stage: Stage) -> Window:
        """Return the window of a stage."""
        window = self._known.get(stage)
        if window is None:
            window = self._known[stage] = Window(self._units, stage)
        return window
