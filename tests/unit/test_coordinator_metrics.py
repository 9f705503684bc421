"""The coordinator's metrics keep few runs."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from gradwire_coordinator.metrics import KEPT_RUNS, Metrics
from gradwire_coordinator.server_place import ServerPlace
from gradwire_protocol.v1 import coordinator_pb2, run_pb2


def result(loss: float, idle: float) -> run_pb2.EntryResult:
    timing = run_pb2.Timing(window_seconds=2.0, idle_seconds={"wait-gradient": idle / 2, "wait-step": idle / 2})
    return run_pb2.EntryResult(loss=loss, seconds=2.5, timings={"server": timing})


def test_only_the_newest_runs_keep_their_series() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, "1")
    for index in range(KEPT_RUNS + 3):
        metrics.step_finished(
            f"run-{index}", 1 + index, {"server": ServerPlace(stages=[3], replica=1, replicas=2)}, result(1.5, 0.5)
        )
    text = generate_latest(registry).decode()
    assert 'run="run-0"' not in text
    assert 'run="run-2"' not in text
    assert f'run="run-{KEPT_RUNS + 2}"' in text
    labels = {"run": "run-3", "stage": "3", "replica": "1", "shard": "0"}
    assert registry.get_sample_value("gradwire_bubble_ratio", labels) == pytest.approx(0.25)
    assert registry.get_sample_value("gradwire_loss", {"run": "run-3"}) == 1.5
    assert registry.get_sample_value("gradwire_generation", {"run": "run-3"}) == 4
    assert registry.get_sample_value("gradwire_step_duration_seconds_sum", {"run": "run-3"}) == 2.5


def test_servers_and_runs_are_counted_with_zeros() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, "1")
    metrics.count_servers([coordinator_pb2.SERVER_ROLE_STAGE] * 2)
    metrics.count_runs([coordinator_pb2.RUN_STATE_FAILED])
    assert registry.get_sample_value("gradwire_servers", {"role": "stage"}) == 2
    assert registry.get_sample_value("gradwire_servers", {"role": "parameter"}) == 0
    assert registry.get_sample_value("gradwire_runs", {"state": "failed"}) == 1
    assert registry.get_sample_value("gradwire_runs", {"state": "active"}) == 0
    assert registry.get_sample_value("gradwire_up") == 1


def test_shards_of_a_stage_have_series_of_their_own() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, "1")
    made = result(1.0, 0.5)
    made.timings["other"].CopyFrom(run_pb2.Timing(window_seconds=2.0, idle_seconds={"wait-step": 1.0}))
    places = {name: ServerPlace(stages=[0], shard=shard, shards=2) for shard, name in enumerate(("server", "other"))}
    metrics.step_finished("run", 1, places, made)
    found = [
        registry.get_sample_value(
            "gradwire_bubble_ratio", {"run": "run", "stage": "0", "replica": "0", "shard": str(shard)}
        )
        for shard in range(2)
    ]
    assert found == pytest.approx([0.25, 0.5])
