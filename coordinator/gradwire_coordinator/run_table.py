"""The runs that a coordinator knows: its own, and those of earlier processes, as the log has them. Thread-safe."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from gradwire_coordinator.run import Run
from gradwire_protocol.errors import RunNotFound
from gradwire_protocol.v1 import coordinator_pb2

# Of runs that are over, so many are kept and shown.
KEPT_RUNS = 50


class RunTable:
    """Own runs by identifier, in the order of creation. earlier: newest first; nothing of them changes any more."""

    def __init__(self, earlier: Sequence[coordinator_pb2.RunStatus] = ()) -> None:
        self._earlier = earlier
        self._lock = threading.Lock()
        self._runs: dict[str, Run] = {}

    def add(self, run: Run) -> None:
        with self._lock:
            self._runs[run.run] = run

    def find(self, name: str) -> Run | None:
        with self._lock:
            return self._runs.get(name)

    def get(self, name: str) -> Run:
        """Return a run; RunNotFound."""
        run = self.find(name)
        if run is None:
            raise RunNotFound("There is no such run", got=repr(name[:80]), remedy="create a run first")
        return run

    def current(self) -> list[Run]:
        """Return the runs of this process, over or not, in the order of creation."""
        with self._lock:
            return list(self._runs.values())

    def prune(self) -> None:
        """Forget the oldest of those that are over, if there are too many."""
        with self._lock:
            over = [name for name, run in self._runs.items() if run.is_over]
            for name in over[: max(0, len(over) - KEPT_RUNS)]:
                del self._runs[name]

    def statuses(self) -> list[coordinator_pb2.RunStatus]:
        """Return what displays show, newest first."""
        own = [run.status() for run in reversed(self.current())]
        return [*own, *self._earlier][:KEPT_RUNS]
