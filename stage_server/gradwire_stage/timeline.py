"""Accounts for every nanosecond of a compute thread: which phase it was in, from one entry's end to the next one's.

Knows phases and marks of a clock; what the phases are entered for is the executor's business, and the clock of a GPU
is in device.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

from gradwire_protocol.v1 import run_pb2

FORWARD = "forward"
BACKWARD = "backward"
WEIGHT = "weight"
UPDATE = "update"
ENCODE = "encode"
DECODE = "decode"
BUSY = (FORWARD, BACKWARD, WEIGHT, UPDATE, ENCODE, DECODE)

WAIT_ACTIVATION = "wait-activation"
WAIT_GRADIENT = "wait-gradient"
WAIT_BATCH = "wait-batch"
WAIT_EXCHANGE = "wait-exchange"
WAIT_STEP = "wait-step"
IDLE = (WAIT_ACTIVATION, WAIT_GRADIENT, WAIT_BATCH, WAIT_EXCHANGE, WAIT_STEP)

Mark = TypeVar("Mark")


class Clock(Protocol[Mark]):
    """Makes marks, and tells the time between them."""

    def mark(self) -> Mark:
        """Return a mark for now."""

    def elapsed(self, marks: Sequence[Mark]) -> list[int]:
        """Return the nanoseconds between neighbouring marks: one number fewer than marks. May wait for the last."""


class HostClock:
    """The process's own monotonic clock."""

    def mark(self) -> int:
        return time.perf_counter_ns()

    def elapsed(self, marks: Sequence[int]) -> list[int]:
        return [end - start for start, end in pairwise(marks)]


@dataclass(frozen=True)
class Window:
    """Where the time between two cuts went; the phases' nanoseconds add up to the window's exactly."""

    nanoseconds: int
    phases: dict[str, int]

    @property
    def seconds(self) -> float:
        return self.nanoseconds / 1e9

    def to_proto(self) -> run_pb2.Timing:
        return run_pb2.Timing(
            window_seconds=self.seconds,
            busy_seconds={phase: spent / 1e9 for phase, spent in self.phases.items() if phase in BUSY},
            idle_seconds={phase: spent / 1e9 for phase, spent in self.phases.items() if phase in IDLE},
        )


class Timeline(Generic[Mark]):
    """A stopwatch that is in exactly one phase at any time. For one thread."""

    def __init__(self, clock: Clock[Mark], phase: str = WAIT_STEP) -> None:
        self._clock = clock
        self._marks = [clock.mark()]
        self._phases = [phase]  # phase i lasts from mark i to mark i + 1

    @property
    def phase(self) -> str:
        """The phase at present. Any thread."""
        return self._phases[-1]

    def switch(self, phase: str) -> str:
        """Enter a phase; return the one that ends."""
        previous = self._phases[-1]
        if phase != previous:
            self._marks.append(self._clock.mark())
            self._phases.append(phase)
        return previous

    def cut(self) -> Window:
        """End the window here and begin the next one, in the same phase."""
        self._marks.append(self._clock.mark())
        spans = self._clock.elapsed(self._marks)
        phases: dict[str, int] = {}
        for phase, nanoseconds in zip(self._phases, spans, strict=True):
            phases[phase] = phases.get(phase, 0) + nanoseconds
        del self._marks[:-1]
        del self._phases[:-1]
        return Window(sum(spans), phases)
