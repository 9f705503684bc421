"""The cuts, and the stage that each segment becomes, that minimise the slowest stage: exact dynamic programming.

A state says which devices the stages so far have; a layer of states comes after each stage. An optimum whose slowest
stage takes T has no segment above T, so that only few starts are possible for each end: thresholds are tried upward
from a lower bound, and the first that has a solution has the best. Leaves to others: which states there are
(`device_order.py`), and what is done where this is too much work (`partition.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gradwire_coordinator.interval_sums import Units
from gradwire_coordinator.partition_problem import Floats, Integers
from gradwire_coordinator.segment_costs import Block, Stage
from gradwire_coordinator.windows import Windows
from gradwire_protocol.errors import InternalError

# Relative; sums of the same numbers in another order are ties.
TIE = 1e-12
# Segments that one search may weigh: some seconds.
WORK = 80_000_000
# By how much a threshold is above the lower bound, one try after the other.
_SLACKS = (0.001, 0.004, 0.015, 0.05, 0.15, 0.5, 2.0, 10.0, float("inf"))
_BISECTIONS = 30
_BLOCK = 2**20
_LEAST_CHUNK = 64


@dataclass(frozen=True)
class Step:
    """One stage between two layers: as this stage, from states of the layer before to states of the layer after."""

    stage: Stage
    sources: Integers
    targets: Integers


@dataclass(frozen=True)
class StateGraph:
    """Layers of states, one layer more than stages. The first layer has one state."""

    # States by layer.
    states: tuple[int, ...]
    # Steps by stage.
    steps: tuple[tuple[Step, ...], ...]

    @classmethod
    def of_order(cls, stages: Sequence[Stage]) -> StateGraph:
        """Return the graph of a given order: one state a layer."""
        only = np.zeros(1, dtype=np.int64)
        return cls((1,) * (len(stages) + 1), tuple((Step(stage, only, only),) for stage in stages))


@dataclass(frozen=True)
class Solution:
    """Where to cut, by place among the possible cuts, both ends of the graph included, and the stages between."""

    ends: tuple[int, ...]
    stages: tuple[Stage, ...]
    slowest: float
    sent_bytes: float


class Outcome(NamedTuple):
    """solution: None if there is none, or if it is too much work. No solution is below `lower_bound`."""

    solution: Solution | None
    lower_bound: float
    too_much: bool = False


# By layer: the first and the last end of each state; a state that cannot be has none.
_Ranges = list[tuple[Integers, Integers]]


class StageSearch:
    """Solves one state graph over one set of possible cuts."""

    def __init__(self, units: Units, graph: StateGraph, *, windows: Windows | None = None, work: int = WORK) -> None:
        """`windows`: of these units, shared between searches."""
        self._units = units
        self._graph = graph
        self._work = work
        self._stages = len(graph.steps)
        self._windows = windows or Windows(units)

    def solve(self, upper: float = np.inf) -> Outcome:
        """Return the least slowest stage, and of the solutions that have it the one that sends the fewest bytes.

        upper: seconds of a slowest stage that is known to be possible.
        """
        lower = self.lower_bound()
        if np.isinf(lower):
            return Outcome(None, lower)
        for slack in _SLACKS:
            threshold = min(lower * (1 + slack) if np.isfinite(slack) else np.inf, upper)
            ranges = self._ranges(threshold)
            if ranges is None:
                continue
            if self._segments(ranges, threshold) > self._work:
                return Outcome(None, lower, too_much=True)
            slowest = self._least_slowest(ranges, threshold)
            if np.isfinite(slowest) and slowest <= threshold * (1 + TIE):
                return Outcome(self._fewest_bytes(slowest), slowest)
            if threshold == upper:
                break
        return Outcome(None, np.inf)

    def below(self, slowest: float) -> float:
        """Return the least slowest stage, if it is below this one; infinite otherwise. Takes a fraction of `solve`."""
        ranges = self._ranges(slowest)
        return np.inf if ranges is None else self._least_slowest(ranges, slowest)

    def lower_bound(self) -> float:
        """Return what the slowest stage takes at least, most transfers left out; infinite if memory is too small."""
        if self._ranges(np.inf) is None:
            return np.inf
        below, above = 0.0, self._seconds_of_all()
        if self._ranges(0.0) is not None:
            return 0.0
        for _ in range(_BISECTIONS):
            middle = (below + above) / 2
            if self._ranges(middle) is None:
                below = middle
            else:
                above = middle
        return below

    def _seconds_of_all(self) -> float:
        """Return a threshold that no segment is above, as far as windows know."""
        return max(self._windows.of(step.stage).most for steps in self._graph.steps for step in steps)

    def _ranges(self, threshold: float) -> _Ranges | None:
        """Return which ends each state can have under a threshold; None if the last layer cannot be reached."""
        count = self._units.count
        if self._stages > count:
            return None
        last: list[Integers] = [np.zeros(1, dtype=np.int64)]
        for layer, steps in enumerate(self._graph.steps, start=1):
            here = np.full(self._graph.states[layer], -1, dtype=np.int64)
            for step in steps:
                before = last[-1][step.sources]
                end = np.where(before < 0, -1, self._windows.of(step.stage).last_end(np.maximum(before, 0), threshold))
                np.maximum.at(here, step.targets, np.minimum(end, count - self._stages + layer))
            here[here < layer] = -1
            last.append(here)
        if not (last[-1] == count).any():
            return None
        first: list[Integers] = [np.where(last[-1] == count, count, count + 1)]
        for layer in range(self._stages - 1, -1, -1):
            here = np.full(self._graph.states[layer], count + 1, dtype=np.int64)
            for step in self._graph.steps[layer]:
                after = first[-1][step.targets]
                start = self._windows.of(step.stage).first_start(np.minimum(after, count), threshold)
                np.minimum.at(here, step.sources, np.where(after > count, count + 1, np.maximum(start, layer)))
            first.append(here)
        return list(zip(reversed(first), last, strict=True))

    def _segments(self, ranges: _Ranges, threshold: float) -> float:
        """Return about how many segments the search would weigh."""
        total = 0.0
        for layer, steps in enumerate(self._graph.steps):
            (first, last), (first_end, last_end) = ranges[layer], ranges[layer + 1]
            for step in steps:
                width = self._windows.of(step.stage).width(threshold)
                starts = np.maximum(last - first + 1, 0)[step.sources]
                ends = np.maximum(last_end - first_end + 1, 0)[step.targets]
                total += float((ends * np.minimum(starts, width + self._chunk(width))).sum())
        return total

    @staticmethod
    def _chunk(width: int) -> int:
        return max(_LEAST_CHUNK, min(width // 2, _BLOCK // (width + _LEAST_CHUNK)))

    def _blocks(
        self, layer: int, step: Step, ranges: _Ranges, threshold: float
    ) -> Iterator[tuple[int, int, slice, slice]]:
        """Yield (source, target, starts, ends): all segments of a step that the threshold may let pass."""
        (first, last), (first_end, last_end) = ranges[layer], ranges[layer + 1]
        chunk = self._chunk(self._windows.of(step.stage).width(threshold))
        for source, target in zip(step.sources.tolist(), step.targets.tolist(), strict=True):
            if first[source] > last[source]:
                continue
            for end in range(int(first_end[target]), int(last_end[target]) + 1, chunk):
                stop = min(end + chunk, int(last_end[target]) + 1)
                earliest = self._windows.of(step.stage).first_start(np.array(end), threshold)
                starts = slice(max(int(first[source]), int(earliest)), min(int(last[source]) + 1, stop - 1))
                if starts.start < starts.stop:
                    yield source, target, starts, slice(end, stop)

    def _least_slowest(self, ranges: _Ranges, threshold: float) -> float:
        before = [np.zeros(1)]
        for layer, steps in enumerate(self._graph.steps):
            first, (first_end, last_end) = ranges[layer][0], ranges[layer + 1]
            here = [np.full(max(0, b - a + 1), np.inf) for a, b in zip(first_end, last_end, strict=True)]
            for step in steps:
                for source, target, starts, ends in self._blocks(layer, step, ranges, threshold):
                    costs = Block(self._units, starts, ends).seconds(step.stage)
                    so_far = before[source][_shifted(starts, first[source])]
                    best = np.maximum(costs, so_far[:, None]).min(axis=0)
                    place = here[target][_shifted(ends, first_end[target])]
                    np.minimum(place, best, out=place)
            before = here
        return float(min(of_state[0] if len(of_state) else np.inf for of_state in before))

    def _fewest_bytes(self, slowest: float) -> Solution:
        """Return, of the solutions with this slowest stage, the one whose values have the fewest bytes."""
        limit = slowest * (1 + TIE)
        ranges = self._ranges(slowest)
        if ranges is None:
            raise InternalError("A partition that was found cannot be found again", got=f"slowest stage {slowest}")
        before = [np.zeros(1)]
        chosen: list[list[_Choice]] = []
        for layer, steps in enumerate(self._graph.steps):
            first, (first_end, last_end) = ranges[layer][0], ranges[layer + 1]
            sizes = [max(0, b - a + 1) for a, b in zip(first_end.tolist(), last_end.tolist(), strict=True)]
            here = [np.full(size, np.inf) for size in sizes]
            choices = [_Choice(*(np.zeros(size, dtype=np.int64) for _ in range(3))) for size in sizes]
            for number, step in enumerate(steps):
                for source, target, starts, ends in self._blocks(layer, step, ranges, slowest):
                    block = Block(self._units, starts, ends)
                    within = block.seconds(step.stage) <= limit
                    so_far = before[source][_shifted(starts, first[source])]
                    sizes_sent = np.where(within, block.sent + so_far[:, None], np.inf)
                    row = sizes_sent.argmin(axis=0)
                    best = sizes_sent[row, np.arange(len(row))]
                    at = _shifted(ends, first_end[target])
                    better = best < here[target][at]
                    here[target][at][better] = best[better]
                    for array, value in zip(choices[target], (row + starts.start, source, number), strict=True):
                        array[at][better] = np.broadcast_to(value, better.shape)[better]
            before = here
            chosen.append(choices)
        return self._follow(ranges, before, chosen, slowest)

    def _follow(self, ranges: _Ranges, last: list[Floats], chosen: list[list[_Choice]], slowest: float) -> Solution:
        totals = [float(of_state[0]) if len(of_state) else np.inf for of_state in last]
        state = int(np.argmin(totals))
        sent = totals[state]
        ends, stages = [self._units.count], []
        for layer in range(self._stages, 0, -1):
            choice = chosen[layer - 1][state]
            at = ends[-1] - int(ranges[layer][0][state])
            stages.append(self._graph.steps[layer - 1][int(choice.step[at])].stage)
            ends.append(int(choice.start[at]))
            state = int(choice.source[at])
        return Solution(tuple(reversed(ends)), tuple(reversed(stages)), slowest, sent)


class _Choice(NamedTuple):
    """How each end of a state is best reached: from which start, in which state, by which step."""

    start: npt.NDArray[np.int64]
    source: npt.NDArray[np.int64]
    step: npt.NDArray[np.int64]


def _shifted(places: slice, first: int) -> slice:
    return slice(places.start - int(first), places.stop - int(first))
