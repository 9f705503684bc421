"""What a coordinator tells Prometheus of servers that are lost, of runs that fail, and of runs that stand still."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from coordinator_cluster import Cluster, cluster, driven, free, refused, wait_until

from gradwire_protocol.errors import ModelError
from gradwire_protocol.v1 import coordinator_pb2


def value(made: Cluster, name: str, **labels: str) -> float | None:
    found: float | None = made.service.registry.get_sample_value(f"gradwire_{name}", labels)
    return found


def lost(made: Cluster) -> dict[str, float | None]:
    reasons = ("silent", "unreachable", "restarted")
    return {reason: value(made, "servers_lost_total", role="stage", reason=reason) for reason in reasons}


def expire(made: Cluster) -> None:
    made.now[0] += 6.0


def start_again(made: Cluster) -> None:
    made.register(made.stages[0])


def leave(made: Cluster) -> None:
    made.stub.Deregister(coordinator_pb2.DeregisterRequest(server="stage-0"))


@pytest.mark.parametrize(
    ("happens", "reason", "left"), [(expire, "silent", 0), (start_again, "restarted", 1), (leave, "", 0)]
)
def test_a_lost_server_is_counted_and_one_that_leaves_is_not(
    tmp_path: Path, happens: Any, reason: str, left: int
) -> None:
    with cluster(tmp_path, stages=1) as made:
        assert lost(made) == {"silent": 0, "unreachable": 0, "restarted": 0}
        happens(made)
        wait_until(lambda: value(made, "servers", role="stage") == left)
        assert lost(made) == {"silent": 0, "unreachable": 0, "restarted": 0} | ({reason: 1} if reason else {})
        assert value(made, "servers_lost_total", role="parameter", reason="silent") == 0


def test_a_server_whose_connection_breaks_is_counted(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=2) as made:
        driver = driven(made, 2)
        made.stages[1].vanish()
        refused(driver.result)
        wait_until(lambda: value(made, "servers", role="stage") == 1)
        assert lost(made) == {"silent": 0, "unreachable": 1, "restarted": 0}
        assert value(made, "runs_failed_total", reason="StageFailed") == 1


def test_a_failed_run_is_counted_by_its_error_and_an_ended_one_is_not(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=1) as made:
        assert value(made, "runs_failed_total", reason="ModelError") == 0
        driver = driven(made, 1)
        driver.done()
        wait_until(lambda: free(made))
        driver = driven(made, 1)
        made.stages[0].failure, made.stages[0].fails_at = ModelError("view of 3 as 4"), 2
        driver.send_step()
        refused(driver.result)
        wait_until(lambda: value(made, "runs", state="failed") == 1)
        assert value(made, "runs_failed_total", reason="ModelError") == 1
        assert value(made, "runs_failed_total", reason="Aborted") == 0


def test_a_run_is_shown_to_stand_still_while_an_entry_is_open(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=1) as made:
        before = time.time()
        driver = driven(made, 1)
        (run,) = [each.run for each in made.status().runs]
        started = value(made, "run_start_timestamp_seconds", run=run)
        assert started is not None
        assert before <= started <= time.time()
        assert value(made, "run_open_entries", run=run) == 0
        made.stages[0].go.clear()
        # The registry's clock stands still; the run's own does not.
        made.now[0] += 4.0
        time.sleep(0.3)
        assert value(made, "run_still_seconds", run=run) == 0
        driver.send_step()
        wait_until(lambda: value(made, "run_open_entries", run=run) == 1)
        time.sleep(0.3)
        still = value(made, "run_still_seconds", run=run)
        assert still is not None
        assert 0.2 < still < 4
        made.stages[0].go.set()
        driver.result()
        assert value(made, "run_open_entries", run=run) == 0
        assert value(made, "run_still_seconds", run=run) == 0
        assert value(made, "checkpoint_timestamp_seconds", run=run) is None
        driver.done()
        wait_until(lambda: value(made, "run_start_timestamp_seconds", run=run) is None)


def test_a_server_that_makes_progress_is_not_still(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=1) as made:
        driver = driven(made, 1)
        (run,) = [each.run for each in made.status().runs]
        made.stages[0].go.clear()
        driver.send_step()
        wait_until(lambda: value(made, "run_open_entries", run=run) == 1)
        time.sleep(0.5)
        heartbeat = coordinator_pb2.HeartbeatRequest(server="stage-0")
        heartbeat.activity.run, heartbeat.activity.progress = run, 7
        made.stub.Heartbeat(heartbeat)
        assert value(made, "run_still_seconds", run=run) == 0
        made.stages[0].go.set()
        driver.result()
