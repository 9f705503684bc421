"""Metrics of a run: they count, carry the run's labels, and go with it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from gradwire_protocol.v1 import run_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.metrics import StageMetrics


def test_the_series_of_a_run_go_when_it_ends() -> None:
    registry = CollectorRegistry()
    metrics = StageMetrics(registry, version="1")
    first, second = metrics.of_run("first", (0, 2), 0, 1), metrics.of_run("second", (1,), 0, 0)
    timing = run_pb2.Timing(window_seconds=3, busy_seconds={"forward": 2}, idle_seconds={"wait-batch": 1})
    for run in (first, second):
        run.start()
        run.timing(timing, step=True)
        run.sent("peer", pb.DIRECTION_FORWARD, pb.CODEC_INT8, 100, 0.01)
        run.sent("peer", pb.DIRECTION_GROUP, pb.CODEC_NONE, 30, 0.01)
        run.received("client", pb.DIRECTION_BATCH, pb.CODEC_UNSPECIFIED, 7)  # a number
        run.collected(5)
        run.loss(1.5)
        run.parameter_bytes(64)
    labels = {"run": "first", "stage": "0,2", "replica": "0", "shard": "1"}
    value = registry.get_sample_value
    assert value("gradwire_stage_busy_seconds_total", {**labels, "phase": "forward"}) == 2
    assert value("gradwire_stage_busy_seconds_total", {**labels, "phase": "backward"}) == 0
    assert value("gradwire_stage_idle_seconds_total", {**labels, "reason": "wait-batch"}) == 1
    assert value("gradwire_step_duration_seconds_sum", labels) == 3
    received = {"run": "first", "peer": "client", "direction": "received", "kind": "batch", "codec": "none"}
    assert value("gradwire_transfer_bytes_total", received) == 7
    sent = {"run": "first", "peer": "peer", "direction": "sent", "kind": "forward", "codec": "int8"}
    assert value("gradwire_transfer_bytes_total", sent) == 100
    group = {"run": "first", "peer": "peer", "direction": "sent", "kind": "group", "codec": "none"}
    assert value("gradwire_transfer_bytes_total", group) == 30
    first.remove()
    first.sent("peer", pb.DIRECTION_FORWARD, pb.CODEC_NONE, 100, 0.01)  # a receipt that comes too late
    first.loss(2.0)
    exposed = generate_latest(registry).decode()
    assert 'run="first"' not in exposed
    assert 'run="second"' in exposed
    assert 'gradwire_info{role="stage",version="1"} 1.0' in exposed
