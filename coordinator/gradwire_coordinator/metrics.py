"""The coordinator's metrics, in a registry that is handed in.

Of runs only the newest few keep their series, so that a coordinator that lives long does not grow without bound. Leaves
to others: serving them (`gradwire_protocol.serving`).
"""

from __future__ import annotations

import threading
from collections import Counter as Tally
from collections import deque
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from gradwire_coordinator.server_place import ServerPlace
from gradwire_protocol.v1 import coordinator_pb2, run_pb2

KEPT_RUNS = 10
_ROLES = {coordinator_pb2.SERVER_ROLE_STAGE: "stage", coordinator_pb2.SERVER_ROLE_PARAMETER: "parameter"}
_STATES = {
    coordinator_pb2.RUN_STATE_PREPARED: "prepared",
    coordinator_pb2.RUN_STATE_ACTIVE: "active",
    coordinator_pb2.RUN_STATE_ENDED: "ended",
    coordinator_pb2.RUN_STATE_FAILED: "failed",
}
_STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)


class Metrics:
    """What a coordinator measures. Thread-safe."""

    def __init__(self, registry: CollectorRegistry, version: str) -> None:
        Gauge("gradwire_up", "1 while the service runs.", registry=registry).set(1)
        info = Gauge("gradwire_info", "Version and role of the service.", ["role", "version"], registry=registry)
        info.labels("coordinator", version).set(1)
        self._servers = Gauge("gradwire_servers", "Registered servers.", ["role"], registry=registry)
        self._runs = Gauge("gradwire_runs", "Runs since the start, by state.", ["state"], registry=registry)
        self._steps = Counter("gradwire_steps", "Training steps finished.", ["run"], registry=registry)
        self._loss = Gauge("gradwire_loss", "Loss of the last training step.", ["run"], registry=registry)
        self._generation = Gauge(
            "gradwire_generation",
            "Of the run: rises when another layout takes over.",
            ["run"],
            registry=registry,
        )
        self._step_seconds = Histogram(
            "gradwire_step_duration_seconds",
            "From the first server's start of a training step to the last server's end.",
            ["run"],
            buckets=_STEP_BUCKETS,
            registry=registry,
        )
        self._bubble = Gauge(
            "gradwire_bubble_ratio",
            "Share of the last training step in which the stage had nothing to compute, as it measured it.",
            ["run", "stage", "replica", "shard"],
            registry=registry,
        )
        self._lock = threading.Lock()
        # Run -> its stages, with their replicas and shards, that have series.
        self._kept: dict[str, set[tuple[str, str, str]]] = {}
        self._order: deque[str] = deque()
        self.count_servers([])
        self.count_runs([])

    def count_servers(self, roles: Iterable[coordinator_pb2.ServerRole]) -> None:
        """Set the number of servers from the roles of all that are registered."""
        tally = Tally(roles)
        for role, name in _ROLES.items():
            self._servers.labels(name).set(tally[role])

    def count_runs(self, states: Iterable[coordinator_pb2.RunState]) -> None:
        """Set the number of runs from the states of all that are known."""
        tally = Tally(states)
        for state, name in _STATES.items():
            self._runs.labels(name).set(tally[state])

    def step_finished(
        self, run: str, generation: int, places: Mapping[str, ServerPlace], result: run_pb2.EntryResult
    ) -> None:
        """Take in the result of a training step; `places`: of its servers. The label of two stages is "0,2"."""
        with self._lock:
            stages = self._keep(run)
            self._steps.labels(run).inc()
            self._loss.labels(run).set(result.loss)
            self._generation.labels(run).set(generation)
            self._step_seconds.labels(run).observe(result.seconds)
            for server, timing in result.timings.items():
                place = places[server]
                if timing.window_seconds > 0 and place.parameter_server is None:
                    labels = ",".join(map(str, place.stages)), str(place.replica), str(place.shard)
                    stages.add(labels)
                    self._bubble.labels(run, *labels).set(sum(timing.idle_seconds.values()) / timing.window_seconds)

    def _keep(self, run: str) -> set[tuple[str, str, str]]:
        """Return the stages of a run that have series, and drop the series of the oldest run if there are too many."""
        if run not in self._kept:
            self._kept[run] = set()
            self._order.append(run)
            if len(self._order) > KEPT_RUNS:
                oldest = self._order.popleft()
                for metric in (self._steps, self._loss, self._generation, self._step_seconds):
                    metric.remove(oldest)
                for labels in self._kept.pop(oldest):
                    self._bubble.remove(oldest, *labels)
        return self._kept[run]
