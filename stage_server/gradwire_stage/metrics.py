"""What a stage server tells Prometheus, in a registry that is handed in.

Series of a run carry its identifier, and go when it ends. What can be counted is there from the start, at 0: a rate
does not see a first event whose series begins at 1.
"""

from __future__ import annotations

import threading
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from gradwire_protocol.codecs import NAME_OF_CODEC
from gradwire_protocol.v1 import run_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.timeline import BUSY, IDLE

KINDS = {
    pb.DIRECTION_BATCH: "batch",
    pb.DIRECTION_FORWARD: "forward",
    pb.DIRECTION_BACKWARD: "backward",
    pb.DIRECTION_STATE: "state",
    pb.DIRECTION_TIED: "tied",
    pb.DIRECTION_REDUCE: "reduce",
    pb.DIRECTION_GROUP: "group",
    pb.DIRECTION_WEIGHTS: "weights",
    pb.DIRECTION_NORM: "norm",
    pb.DIRECTION_WEIGHT: "weight",
    pb.DIRECTION_RESULT: "result",
    pb.DIRECTION_MOVED: "moved",
}
# Why messages are dropped (mailbox.py, service.py), and why payloads do not go through shared memory (BlockError).
DROP_REASONS = ("repeated", "late", "released", "other-run", "other-generation")
FALLBACK_REASONS = ("off", "unsupported", "other-host", "not-allowed", "other-run", "limit", "failed", "no-slot")
SENT = "sent"
RECEIVED = "received"

_TRANSFER_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_STEP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class StageMetrics:
    """The server's metrics; `of_run` gives those of one run."""

    def __init__(self, registry: CollectorRegistry, *, version: str, role: str = "stage") -> None:
        Gauge("gradwire_up", "1 while the service runs", registry=registry).set(1)
        info = Gauge("gradwire_info", "Version and role of the service", ["role", "version"], registry=registry)
        info.labels(role, version).set(1)
        self.dropped = Counter(
            "gradwire_messages_dropped",
            "Messages that no run could take: repeated, late, released, other run or generation",
            ["reason"],
            registry=registry,
        )
        for reason in DROP_REASONS:
            self.dropped.labels(reason)
        self.busy = Counter(
            "gradwire_stage_busy_seconds",
            "Seconds that the compute thread spent working",
            ["run", "stage", "replica", "shard", "phase"],
            registry=registry,
        )
        self.idle = Counter(
            "gradwire_stage_idle_seconds",
            "Seconds that the compute thread spent waiting",
            ["run", "stage", "replica", "shard", "reason"],
            registry=registry,
        )
        self.transferred = Counter(
            "gradwire_transfer_bytes",
            "Payload bytes of whole messages, as encoded",
            ["run", "peer", "direction", "kind", "codec"],
            registry=registry,
        )
        self.decoded = Counter(
            "gradwire_transfer_decoded_bytes",
            "Payload bytes of whole messages that came in, as they are without a codec",
            ["run", "kind", "codec"],
            registry=registry,
        )
        self.shared = Counter(
            "gradwire_shared_memory_transfer_bytes",
            "Payload bytes of whole messages that went to a peer through shared memory; also part of all its bytes",
            ["run", "peer"],
            registry=registry,
        )
        self.shared_fallbacks = Counter(
            "gradwire_shared_memory_fallbacks",
            "Peers that share no memory, by why not, and payloads that found no free slot",
            ["reason"],
            registry=registry,
        )
        for reason in FALLBACK_REASONS:
            self.shared_fallbacks.labels(reason)
        self.local_streams = Gauge(
            "gradwire_local_streams", "Streams that servers of this host send over a socket", registry=registry
        )
        self.shared_memory_bytes = Gauge(
            "gradwire_shared_memory_bytes", "Bytes of memory for payloads to servers of this host", registry=registry
        )
        self.transfer_seconds = Histogram(
            "gradwire_transfer_seconds",
            "Seconds from queueing a message to its receipt",
            ["run", "peer", "kind"],
            buckets=_TRANSFER_BUCKETS,
            registry=registry,
        )
        self.step_seconds = Histogram(
            "gradwire_step_duration_seconds",
            "Seconds from the end of the entry before a training step to its own end",
            ["run", "stage", "replica", "shard"],
            buckets=_STEP_BUCKETS,
            registry=registry,
        )
        self.loss = Gauge(
            "gradwire_loss", "Loss of the last training step, at the last stage", ["run", "stage"], registry=registry
        )
        self.exchanged = Counter(
            "gradwire_exchange_gradient_bytes_total",
            "Bytes of the gradients that replicas have agreed on, as they were before any codec",
            ["run", "stage", "replica", "shard"],
            registry=registry,
        )
        self.weights_behind = Gauge(
            "gradwire_weights_behind_steps",
            "Updates that the weights lacked when the last training step ended, with parameter servers",
            ["run", "stage", "replica", "shard"],
            registry=registry,
        )
        self.mailbox_bytes = Gauge(
            "gradwire_mailbox_bytes", "Bytes of messages that wait to be taken", registry=registry
        )
        self.parameter_bytes = Gauge(
            "gradwire_parameters_bytes", "Bytes of parameters, buffers and constants held", ["run"], registry=registry
        )

    def of_run(self, run: str, stages: tuple[int, ...], replica: int, shard: int) -> RunMetrics:
        return RunMetrics(self, run, stages, replica, shard)


class RunMetrics:
    """The series of one run on this server. Thread-safe; what comes after `remove` is dropped.

    A server with several virtual stages has one compute thread: its label is "0,2".
    """

    def __init__(self, metrics: StageMetrics, run: str, stages: tuple[int, ...], replica: int, shard: int) -> None:
        self._metrics = metrics
        self._run = run
        self._labels = (run, ",".join(map(str, stages)), str(replica), str(shard))
        self._lock = threading.Lock()
        self._removed = False
        # Series by (metric, labels): looking one up costs more than counting.
        self._series: dict[tuple[Any, tuple[str, ...]], Any] = {}

    def sent(self, peer: str, direction: pb.Direction, codec: int, size_bytes: int, seconds: float) -> None:
        """Count a message that a peer has receipted."""
        kind = KINDS[direction]
        self._count(self._metrics.transferred, (self._run, peer, SENT, kind, _name(codec)), size_bytes)
        with self._lock:
            series = self._get(self._metrics.transfer_seconds, (self._run, peer, kind))
            if series is not None:
                series.observe(seconds)

    def shared(self, peer: str, size_bytes: int) -> None:
        """Count, of a message that a peer has receipted, that it went through shared memory."""
        self._count(self._metrics.shared, (self._run, peer), size_bytes)

    def collected(self, size_bytes: int) -> None:
        """Count a result that was handed to the client's stream."""
        labels = (self._run, "client", SENT, KINDS[pb.DIRECTION_RESULT], _name(pb.CODEC_NONE))
        self._count(self._metrics.transferred, labels, size_bytes)

    def received(
        self, peer: str, direction: pb.Direction, codec: int, size_bytes: int, decoded_bytes: int | None = None
    ) -> None:
        """Count a whole message that came in. decoded_bytes: what it takes without its codec; None: the same."""
        kind, name = KINDS[direction], _name(codec)
        self._count(self._metrics.transferred, (self._run, peer, RECEIVED, kind, name), size_bytes)
        decoded = size_bytes if decoded_bytes is None else decoded_bytes
        self._count(self._metrics.decoded, (self._run, kind, name), decoded)

    def timing(self, timing: run_pb2.Timing, *, step: bool) -> None:
        """Count where an entry's time went."""
        for phase, seconds in timing.busy_seconds.items():
            self._count(self._metrics.busy, (*self._labels, phase), seconds)
        for reason, seconds in timing.idle_seconds.items():
            self._count(self._metrics.idle, (*self._labels, reason), seconds)
        if step:
            with self._lock:
                series = self._get(self._metrics.step_seconds, self._labels)
                if series is not None:
                    series.observe(timing.window_seconds)

    def loss(self, value: float) -> None:
        self._set(self._metrics.loss, self._labels[:2], value)

    def exchanged(self, size_bytes: int) -> None:
        """Count gradients that the exchange between replicas takes in."""
        self._count(self._metrics.exchanged, self._labels, size_bytes)

    def weights_behind(self, steps: int) -> None:
        self._set(self._metrics.weights_behind, self._labels, steps)

    def parameter_bytes(self, size_bytes: int) -> None:
        self._set(self._metrics.parameter_bytes, (self._run,), size_bytes)

    def start(self) -> None:
        """Make the series that each run has, so that rates begin at 0."""
        for phase in BUSY:
            self._count(self._metrics.busy, (*self._labels, phase), 0)
        for reason in IDLE:
            self._count(self._metrics.idle, (*self._labels, reason), 0)
        self.exchanged(0)
        self.weights_behind(0)

    def remove(self) -> None:
        """Take the run's series away."""
        with self._lock:
            self._removed = True
            for metric, labels in self._series:
                metric.remove(*labels)
            self._series.clear()

    def _get(self, metric: Any, labels: tuple[str, ...]) -> Any:
        if self._removed:
            return None
        series = self._series.get((metric, labels))
        if series is None:
            series = self._series[metric, labels] = metric.labels(*labels)
        return series

    def _count(self, metric: Counter, labels: tuple[str, ...], amount: float) -> None:
        with self._lock:
            series = self._get(metric, labels)
            if series is not None:
                series.inc(amount)

    def _set(self, metric: Gauge, labels: tuple[str, ...], value: float) -> None:
        with self._lock:
            series = self._get(metric, labels)
            if series is not None:
                series.set(value)


def _name(codec: int) -> str:
    """Return a codec's name; "none" for messages without a tensor, whose codec is 0."""
    return NAME_OF_CODEC.get(codec, "none")
