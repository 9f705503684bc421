"""What the last training steps took, as their servers reported it: kept for `trainer.report()`.

Leaves to others: what was expected of them (`run_plan.py`), and comparing (`report.py`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from gradwire.results import idle_share
from gradwire_protocol.v1 import run_pb2

# Kept; older ones are forgotten.
MOST_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class ServerTime:
    """Where a server's compute thread spent a step, in seconds: phases of work and of waiting add up to the window."""

    window: float
    busy: Mapping[str, float]
    idle: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """One finished step. seconds: from the first server's start to the last one's end; servers: by identifier."""

    step: int
    rows: int
    seconds: float
    bubble: float
    servers: Mapping[str, ServerTime]

    @classmethod
    def of(cls, step: int, rows: int, result: run_pb2.EntryResult) -> MeasuredStep:
        """Return what the result of a step's entry says."""
        return cls(
            step=step,
            rows=rows,
            seconds=result.seconds,
            bubble=idle_share(result),
            servers={
                server: ServerTime(
                    window=timing.window_seconds, busy=dict(timing.busy_seconds), idle=dict(timing.idle_seconds)
                )
                for server, timing in result.timings.items()
            },
        )


class MeasuredSteps:
    """The steps that one layout has carried out, oldest first, without its first: that one warms up. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: deque[MeasuredStep] = deque(maxlen=MOST_STEPS)
        self._first: int | None = None

    def follow(self, step: int, rows: int, future: Future[run_pb2.EntryResult]) -> None:
        """Take in a step when it is done; one that fails is none."""
        if self._first is None:
            self._first = step
            return

        def take(done: Future[run_pb2.EntryResult]) -> None:
            if done.exception() is None:
                measured = MeasuredStep.of(step, rows, done.result())
                with self._lock:
                    self._steps.append(measured)

        future.add_done_callback(take)

    def last(self, count: int) -> list[MeasuredStep]:
        """Return the last steps, up to so many, oldest first."""
        with self._lock:
            return list(self._steps)[-count:]

    def begin_anew(self) -> None:
        """Forget all steps: another layout carries out the next."""
        with self._lock:
            self._steps.clear()
            self._first = None
