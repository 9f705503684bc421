"""What a segment costs as a certain stage on a certain device: seconds and bytes, for many segments at once.

Leaves to others: which segments (`stage_search.py`), and sums over nodes and values (`interval_sums.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gradwire_coordinator.interval_sums import Units
from gradwire_coordinator.partition_problem import Floats, PartitionProblem


@dataclass(frozen=True)
class Transfers:
    """What bytes cost on a stage's link to a neighbour."""

    bytes_per_second: float
    delay_seconds: float

    def seconds(self, size: Floats) -> Floats:
        """Return the seconds of messages of these sizes; nothing is sent where there is nothing."""
        found = size / self.bytes_per_second
        return found + self.delay_seconds * (size > 0) if self.delay_seconds else found


NO_LINK = Transfers(float("inf"), 0.0)


@dataclass(frozen=True)
class Stage:
    """A stage on a device. link_on: to the device of the next stage; link_back: to that of the stage before."""

    device: int
    recomputes: bool
    live: int
    limit: float
    link_on: Transfers
    link_back: Transfers
    # By how much its seconds count more than they are: to have busy devices relieved.
    weight: float = 1.0

    @property
    def running(self) -> int:
        """For how many micro-batches its nodes keep what their backward needs."""
        return 1 if self.recomputes else self.live


class Block:
    """All segments with a start in `starts` and an end in `ends`, by place among the possible cuts."""

    def __init__(self, units: Units, starts: slice, ends: slice) -> None:
        self._units = units
        self._starts = starts
        self._ends = ends

    @cached_property
    def sent(self) -> Floats:  # (starts, ends)
        """Bytes of values for later stages, each once."""
        return self._units.sent.block(self._starts, self._ends)

    def seconds(self, stage: Stage) -> Floats:  # (starts, ends)
        """Return the seconds of a micro-batch with what is sent; infinite where a segment is empty or does not fit."""
        own = self._difference(self._units.seconds(stage.device, stage.recomputes))
        own += stage.link_on.seconds(self.sent)
        own += stage.link_back.seconds(self._units.returned.block(self._starts, self._ends))
        own *= stage.weight
        if np.isfinite(stage.limit):
            own[self.bytes(stage) > stage.limit] = np.inf
        return self._without_empty(own)

    def excess(self, stage: Stage) -> Floats:  # (starts, ends)
        """Return by how many bytes segments do not fit; infinite where one is empty."""
        return self._without_empty(np.maximum(self.bytes(stage) - stage.limit, 0.0))

    def bytes(self, stage: Stage) -> Floats:  # (starts, ends)
        """Return what the device of a stage holds at the peak."""
        units = self._units
        total = units.state.block(self._starts, self._ends)
        # What came in is kept for all of them. Nodes that run again keep theirs for one micro-batch at a time.
        total += stage.live * units.incoming.block(self._starts, self._ends)
        total += stage.running * self._difference(units.held)
        if units.transient.any:
            total += units.transient.block(self._starts, self._ends)
        return total

    def _difference(self, running: Floats) -> Floats:
        found: Floats = running[self._ends] - running[self._starts, None]
        return found

    def _without_empty(self, costs: Floats) -> Floats:
        if self._ends.start < self._starts.stop:
            rows = np.arange(self._starts.start, self._starts.stop)[:, None]
            costs[rows >= np.arange(self._ends.start, self._ends.stop)] = np.inf
        return costs


def segment_seconds(units: Units, stage: Stage, start: int, end: int) -> float:
    """Return the seconds of one segment, transfers included."""
    total = units.seconds(stage.device, stage.recomputes)
    sent, returned = units.sent.of(start, end), units.returned.of(start, end)
    seconds = float(total[end] - total[start])
    seconds += sent / stage.link_on.bytes_per_second + stage.link_on.delay_seconds * (sent > 0)
    seconds += returned / stage.link_back.bytes_per_second + stage.link_back.delay_seconds * (returned > 0)
    return seconds


def activation_bytes(units: Units, stage: Stage, start: int, end: int) -> float:
    """Return what one segment holds at the peak, besides its tensors."""
    held = float(units.held[end] - units.held[start])
    kept = stage.live * units.incoming.of(start, end) + stage.running * held
    return kept + units.transient.of(start, end)


def stages_on(problem: PartitionProblem, devices: Sequence[int], *, shared_limit: bool = True) -> list[Stage]:
    """Return the stages of a problem, if server k is this device; by stage.

    shared_limit: stages on one device get equal shares of its memory; otherwise each gets all of it.
    """
    of_stage = [devices[server] for server in problem.placement]
    found = []
    for index, device in enumerate(of_stage):
        share = len(problem.hosted[problem.placement[index]]) if shared_limit else 1
        found.append(
            Stage(
                device=device,
                recomputes=bool(problem.recomputes and problem.recomputes[index]),
                live=problem.live[index] if problem.live else 1,
                limit=problem.limit(device) / share,
                link_on=_link(problem, device, of_stage[index + 1 : index + 2]),
                link_back=_link(problem, device, of_stage[max(0, index - 1) : index]),
            )
        )
    return found


def any_device(problem: PartitionProblem, server: int, device: int) -> Stage:
    """Return stage `server` on a device, where all links are alike and stage k is on server k."""
    other = (device + 1) % len(problem.seconds)
    link = Transfers(*problem.link(device, other)) if other != device else NO_LINK
    return Stage(
        device=device,
        recomputes=bool(problem.recomputes and problem.recomputes[server]),
        live=problem.live[server] if problem.live else 1,
        limit=problem.limit(device),
        link_on=link,
        link_back=link,
    )


def _link(problem: PartitionProblem, device: int, neighbour: Sequence[int]) -> Transfers:
    if not neighbour or neighbour[0] == device:
        return NO_LINK
    return Transfers(*problem.link(device, neighbour[0]))
