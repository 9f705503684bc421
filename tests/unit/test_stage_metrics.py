"""Metrics of a run: they count, carry the run's labels, and go with it."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from gradwire_protocol.v1 import run_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.metrics import DROP_REASONS, FALLBACK_REASONS, StageMetrics


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
        run.received("peer", pb.DIRECTION_BACKWARD, pb.CODEC_INT8, 26, 100)
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
    decoded = {"run": "first", "kind": "backward", "codec": "int8"}
    assert value("gradwire_transfer_decoded_bytes_total", decoded) == 100
    assert value("gradwire_transfer_decoded_bytes_total", {"run": "first", "kind": "batch", "codec": "none"}) == 7
    assert value("gradwire_exchange_gradient_bytes_total", labels) == 0
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


def test_every_reason_is_there_from_the_start() -> None:
    """A rate does not see a first event whose series begins at 1."""
    registry = CollectorRegistry()
    StageMetrics(registry, version="1", role="parameter")
    for reason in DROP_REASONS:
        assert registry.get_sample_value("gradwire_messages_dropped_total", {"reason": reason}) == 0
    for reason in FALLBACK_REASONS:
        assert registry.get_sample_value("gradwire_shared_memory_fallbacks_total", {"reason": reason}) == 0
    assert registry.get_sample_value("gradwire_info", {"role": "parameter", "version": "1"}) == 1


def test_reasons_are_those_that_the_code_gives() -> None:
    packages = Path(__file__).parents[2]
    folders = (packages / "protos/gradwire_protocol", packages / "stage_server/gradwire_stage")
    code = "\n".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    refused = re.findall(r'BlockError\(\s*"([a-z-]+)"(?: if \w+ else "([a-z-]+)")?', code)
    fallbacks = {reason for pair in refused for reason in pair if reason}
    fallbacks |= set(re.findall(r'on_fallback\("([a-z-]+)"\)', code))
    assert fallbacks == set(FALLBACK_REASONS)
    body = (folders[1] / "mailbox.py").read_text().split("def _reason_to_drop")[1].split("def ")[0]
    drops = set(re.findall(r'return "([a-z-]+)"', body)) | set(re.findall(r'dropped\.labels\("([a-z-]+)"\)', code))
    assert drops == set(DROP_REASONS)
