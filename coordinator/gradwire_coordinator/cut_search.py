"""Cuts for servers with several stages each: balanced cuts first, then moved as long as the busiest server gains.

Also finishes cuts that were found among a part of the possible ones. Bounded by sizes, never by the clock, so that the
same costs give the same cuts. Leaves to others: which device is which server (`device_order.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gradwire_coordinator.interval_sums import Units
from gradwire_coordinator.partition_problem import PartitionProblem, ServerMemory
from gradwire_coordinator.segment_costs import Stage, activation_bytes, segment_seconds
from gradwire_coordinator.stage_search import TIE, StageSearch, StateGraph

# Stages of all cuts that the moves from one start may weigh.
_WEIGHED = 80_000
# Rounds in which the stages of busy servers count for more.
_ROUNDS = 4
_LONGEST_MOVE = 64


class Worth(NamedTuple):
    """What cuts are worth: compared in this order, less is better."""

    # Bytes that do not fit, over all servers.
    excess: float
    busiest: float
    largest: float
    sent_bytes: float

    def better_than(self, other: Worth) -> bool:
        """Whether this is less, sums in another order taken for equal."""
        for mine, others in zip(self, other, strict=True):
            if mine < others - abs(others) * TIE:
                return True
            if mine > others + abs(others) * TIE:
                return False
        return False


class CutSearch:
    """Weighs and improves cuts for one order of devices."""

    def __init__(self, units: Units, problem: PartitionProblem, stages: Sequence[Stage]) -> None:
        self._units = units
        self._problem = problem
        self._stages = stages
        self._limited = any(np.isfinite(problem.limit(stage.device)) for stage in stages)
        # As far as weighed, by stage and segment, and by server and its segments.
        self._known: dict[tuple[int, int, int], tuple[float, float]] = {}
        self._held: dict[tuple[int, tuple[tuple[int, int], ...]], ServerMemory] = {}

    def seconds(self, ends: Sequence[int]) -> list[float]:
        """Return the seconds of each stage."""
        return [self._segment(stage, ends[stage], ends[stage + 1])[0] for stage in range(len(self._stages))]

    def server_seconds(self, ends: Sequence[int]) -> list[float]:
        """Return the seconds of each server."""
        seconds = self.seconds(ends)
        return [sum(seconds[stage] for stage in own) for own in self._problem.hosted]

    def sent_bytes(self, ends: Sequence[int]) -> float:
        """Return what all stages send forward for a micro-batch."""
        return sum(self._segment(stage, ends[stage], ends[stage + 1])[1] for stage in range(len(self._stages)))

    def memory(self, ends: Sequence[int], server: int) -> ServerMemory:
        """Return what a server holds at its peak."""
        own = self._problem.hosted[server]
        segments = tuple((ends[stage], ends[stage + 1]) for stage in own)
        if (server, segments) not in self._held:
            limit = self._problem.limit(self._stages[own[0]].device)
            activations = sum(
                activation_bytes(self._units, self._stages[stage], *segment)
                for stage, segment in zip(own, segments, strict=True)
            )
            self._held[server, segments] = ServerMemory(
                *self._units.tensors_of(segments),
                activations=int(activations),
                limit=int(limit) if limit < np.inf else 0,
            )
        return self._held[server, segments]

    def worth(self, ends: Sequence[int]) -> Worth:
        """Return what cuts are worth."""
        excess = 0.0
        if self._limited:
            excess = float(sum(self.memory(ends, server).missing for server in range(self._problem.servers)))
        costs = [self._segment(stage, ends[stage], ends[stage + 1]) for stage in range(len(self._stages))]
        busiest = max(sum(costs[stage][0] for stage in own) for own in self._problem.hosted)
        return Worth(excess, busiest, max(seconds for seconds, _ in costs), sum(sent for _, sent in costs))

    def balanced(self, rounds: int = _ROUNDS) -> list[list[int]]:
        """Return different cuts that share the work well, the best first; none if none was found that could fit.

        Exact for the slowest stage; in later rounds the stages of busy servers count for more.
        """
        found: dict[tuple[int, ...], Worth] = {}
        weights = np.ones(self._problem.servers)
        for _ in range(rounds):
            stages = [
                dataclasses.replace(stage, weight=float(weights[server]))
                for stage, server in zip(self._stages, self._problem.placement, strict=True)
            ]
            solution = StageSearch(self._units, StateGraph.of_order(stages)).solve().solution
            if solution is None:
                break
            found[solution.ends] = self.worth(solution.ends)
            busy = np.array(self.server_seconds(solution.ends))
            weights *= np.sqrt(np.maximum(busy, 1e-300) / max(busy.mean(), 1e-300)).clip(0.5, 2.0)
        return [list(ends) for ends in sorted(found, key=lambda ends: found[ends])]

    def best_of_all(self) -> list[int] | None:
        """Return the best of all cuts, for small graphs; None if none fits."""
        best: tuple[Worth, list[int]] | None = None
        for cuts in itertools.combinations(range(1, self._units.count), len(self._stages) - 1):
            ends = [0, *cuts, self._units.count]
            worth = self.worth(ends)
            if worth.excess == 0 and (best is None or worth.better_than(best[0])):
                best = (worth, ends)
        return best[1] if best else None

    def improved(self, ends: Sequence[int]) -> list[int]:
        """Move cuts as long as that is better."""
        best, worth = list(ends), self.worth(ends)
        left = _WEIGHED // len(self._stages)
        improving = True
        while improving:
            improving = False
            for moved in itertools.islice(self._moves(best), left):
                left -= 1
                found = self.worth(moved)
                if found.better_than(worth):
                    best, worth, improving = moved, found, True
                    break
        return best

    def _moves(self, ends: Sequence[int]) -> Iterator[list[int]]:
        """Yield other cuts: first such as take work from the server in need; then with any one cut elsewhere."""
        for stage in self._in_need(ends):
            for direction in (-1, 1):
                # The cuts from this stage's end on move back, or those from its start forward: ever more of them, each
                # over as many seconds, so that what lies between keeps its share.
                first = stage + 1 if direction < 0 else stage
                for step in _doubling(_LONGEST_MOVE):
                    for length in _doubling(len(ends)):
                        last = first - direction * (length - 1)
                        if not (0 < first < len(ends) - 1 and 0 < last < len(ends) - 1):
                            break
                        yield from self._shifted(ends, range(first, last - direction, -direction), direction * step)
        for place in range(1, len(ends) - 1):
            for step in _doubling(_LONGEST_MOVE):
                yield from self._shifted(ends, range(place, place + 1), -step)
                yield from self._shifted(ends, range(place, place + 1), step)

    def _in_need(self, ends: Sequence[int]) -> list[int]:
        """Return the stages of the server that does not fit, or is the busiest; the largest stage first."""
        seconds = self.seconds(ends)
        servers = range(self._problem.servers)
        missing = [self.memory(ends, server).missing if self._limited else 0 for server in servers]
        busy = self.server_seconds(ends)
        server = max(servers, key=lambda server: (missing[server], busy[server]))
        return sorted(self._problem.hosted[server], key=lambda stage: -seconds[stage])

    def _shifted(self, ends: Sequence[int], places: range, step: int) -> Iterator[list[int]]:
        """Yield the cuts with those at `places` moved, the first by `step`, unless a stage would be empty."""
        total = self._units.seconds(self._stages[0].device, False)
        moved = list(ends)
        moved[places[0]] += step
        if not 0 < moved[places[0]] < self._units.count:
            return
        seconds = total[moved[places[0]]] - total[ends[places[0]]]
        for place in places[1:]:
            moved[place] = int(np.searchsorted(total, total[ends[place]] + seconds))
        near = range(max(1, min(places)), min(len(ends), max(places) + 2))
        if all(moved[place - 1] < moved[place] for place in near):
            yield moved

    def _segment(self, stage: int, start: int, end: int) -> tuple[float, float]:
        key = (stage, start, end)
        if key not in self._known:
            self._known[key] = (
                segment_seconds(self._units, self._stages[stage], start, end),
                self._units.sent.of(start, end),
            )
        return self._known[key]


def _doubling(limit: int) -> Iterator[int]:
    size = 1
    while size <= limit:
        yield size
        size *= 2
