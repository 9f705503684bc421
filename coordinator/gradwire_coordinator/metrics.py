"""The coordinator's metrics, in a registry that is handed in.

Of runs only the newest few keep their series, so that a coordinator that lives long does not grow without bound. What
holds only while a run is active is asked for when a page is read, and is gone with the run. Leaves to others: serving
them (`gradwire_protocol.serving`).
"""

from __future__ import annotations

import threading
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from gradwire_coordinator.server_place import ServerPlace
from gradwire_protocol.errors import GradwireError
from gradwire_protocol.v1 import coordinator_pb2, run_pb2

KEPT_RUNS = 10
_ROLES = {coordinator_pb2.SERVER_ROLE_STAGE: "stage", coordinator_pb2.SERVER_ROLE_PARAMETER: "parameter"}
_STATES = {
    coordinator_pb2.RUN_STATE_PREPARED: "prepared",
    coordinator_pb2.RUN_STATE_ACTIVE: "active",
    coordinator_pb2.RUN_STATE_ENDED: "ended",
    coordinator_pb2.RUN_STATE_FAILED: "failed",
}
# How a server was seen to be lost: no heartbeats, a connection that broke or a call without an answer, or another
# registration without having left.
LossReason = Literal["silent", "unreachable", "restarted"]
_LOSS_REASONS: tuple[LossReason, ...] = ("silent", "unreachable", "restarted")
_STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)


class RunStanding(NamedTuple):
    """How a run stands that is not over."""

    run: str
    # As Unix time.
    started_at: float
    # Entries that some server has not finished.
    open_entries: int
    # For how long nobody has made progress with them; 0 if none is open.
    still_seconds: float
    # When its last checkpoint by servers was whole, as Unix time; None: there is none.
    saved_at: float | None


class _Standings(Collector):
    """Asks for the standings when a page is read: a run that stands still tells nobody that it does."""

    def __init__(self, standings: Callable[[], Iterable[RunStanding]]) -> None:
        self._standings = standings

    def collect(self) -> Iterator[GaugeMetricFamily]:
        families = self.describe()
        started, open_entries, still, saved = families
        for each in self._standings():
            started.add_metric([each.run], each.started_at)
            open_entries.add_metric([each.run], each.open_entries)
            still.add_metric([each.run], each.still_seconds)
            if each.saved_at is not None:
                saved.add_metric([each.run], each.saved_at)
        yield from families

    def describe(self) -> list[GaugeMetricFamily]:
        return [
            GaugeMetricFamily(
                "gradwire_run_start_timestamp_seconds", "When the run was created, as Unix time.", labels=["run"]
            ),
            GaugeMetricFamily(
                "gradwire_run_open_entries", "Entries of the run that some server has not finished.", labels=["run"]
            ),
            GaugeMetricFamily(
                "gradwire_run_still_seconds",
                "For how long no server of the run and not its client have made progress; 0 between entries.",
                labels=["run"],
            ),
            GaugeMetricFamily(
                "gradwire_checkpoint_timestamp_seconds",
                "When the run's last checkpoint by servers was whole, as Unix time.",
                labels=["run"],
            ),
        ]


class Metrics:
    """What a coordinator measures. Thread-safe."""

    def __init__(self, registry: CollectorRegistry, version: str) -> None:
        Gauge("gradwire_up", "1 while the service runs.", registry=registry).set(1)
        info = Gauge("gradwire_info", "Version and role of the service.", ["role", "version"], registry=registry)
        info.labels("coordinator", version).set(1)
        self._servers = Gauge("gradwire_servers", "Registered servers.", ["role"], registry=registry)
        self._servers_lost = Counter(
            "gradwire_servers_lost",
            "Servers that were lost, by how that was noticed; not those that left in good order.",
            ["role", "reason"],
            registry=registry,
        )
        self._runs = Gauge("gradwire_runs", "Runs since the start, by state.", ["state"], registry=registry)
        self._runs_failed = Counter(
            "gradwire_runs_failed",
            "Runs that failed, by the error that their client got.",
            ["reason"],
            registry=registry,
        )
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
        self._registry = registry
        self._lock = threading.Lock()
        # Run -> its stages, with their replicas and shards, that have series.
        self._kept: dict[str, set[tuple[str, str, str]]] = {}
        self._order: deque[str] = deque()
        self.count_servers([])
        self.count_runs([])
        # At 0 from the start: a rate does not see a first failure whose series begins at 1.
        for role in _ROLES.values():
            for reason in _LOSS_REASONS:
                self._servers_lost.labels(role, reason)
        for error in GradwireError.__subclasses__():
            self._runs_failed.labels(error.__name__)

    def watch(self, standings: Callable[[], Iterable[RunStanding]]) -> None:
        """Show how runs stand that are not over, as it is when a page is read."""
        self._registry.register(_Standings(standings))

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

    def server_lost(self, role: coordinator_pb2.ServerRole, reason: LossReason) -> None:
        self._servers_lost.labels(_ROLES[role], reason).inc()

    def run_failed(self, error: GradwireError) -> None:
        self._runs_failed.labels(type(error).__name__).inc()

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
