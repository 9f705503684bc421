"""Every way in which a run ends through a real coordinator: lost servers, lost clients, requests, failures."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import pytest
from coordinator_cluster import (
    Cluster,
    Driver,
    StageServer,
    cluster,
    create,
    driven,
    free,
    refused,
    run_request,
    run_state,
    wait_until,
)

from gradwire_protocol.errors import (
    Aborted,
    FrameError,
    LimitExceeded,
    ModelError,
    RunNotFound,
    SettingsError,
    StageFailed,
    Unreachable,
)
from gradwire_protocol.v1 import coordinator_pb2, stage_pb2


def test_a_server_that_vanishes_mid_entry_is_named(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=3) as made:
        driver = driven(made, 3)
        made.stages[1].go.clear()
        driver.send_step()
        wait_until(lambda: len(made.stages[1].programs) == 2)
        activity = stage_pb2.Activity(
            run="r", entry=2, action="1F3", waiting_for="n3 of micro-batch 3", waiting_seconds=0.5
        )
        made.stub.Heartbeat(coordinator_pb2.HeartbeatRequest(server="stage-1", activity=activity))
        made.stages[1].vanish()
        error = refused(driver.result)
        assert isinstance(error, StageFailed)
        assert "Stage 1 (server stage-1" in error.message
        assert "entry 2" in error.message
        assert "action 1F3, waiting for n3 of micro-batch 3" in error.got
        assert "start" in error.remedy
        assert made.stages[0].prepared is None
        assert made.stages[2].prepared is None
        assert "Stage 1" in made.stages[0].released[0]
        status = made.status().runs[0]
        assert status.state == coordinator_pb2.RUN_STATE_FAILED
        assert "Stage 1" in status.reason


def test_a_server_that_vanished_is_not_taken_again(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=4) as made:
        driver = driven(made, 2)
        made.stages[1].vanish()  # in a run
        made.stages[2].vanish()  # idle
        assert isinstance(refused(driver.result), StageFailed)
        assert [server.server for server in made.status().servers] == ["stage-0", "stage-2", "stage-3"]
        assert [server.server for server in create(made, 2).servers] == ["stage-0", "stage-3"]
        assert [server.server for server in made.status().servers] == ["stage-0", "stage-3"]
        made.add_stages(1)[-1].vanish()
        error = refused(made.stub.CreateRun, run_request(1))
        assert isinstance(error, Unreachable)
        assert "stage 0 (server stage-4" in error.message
        assert "0 stage servers are free" in refused(made.stub.CreateRun, run_request(1)).message


def test_the_first_cause_is_reported_not_its_consequence(tmp_path: Path) -> None:
    """Server 0 complains that it cannot reach server 1, before the coordinator hears that server 1 is gone."""
    with cluster(tmp_path, stages=2) as made:
        driver = driven(made, 2)
        made.stages[1].go.clear()
        made.stages[0].failure, made.stages[0].fails_at = Unreachable("Cannot reach stage 1"), 2
        driver.send_step()
        wait_until(lambda: len(made.stages[0].programs) == 2)
        made.stages[1].vanish()
        error = refused(driver.result)
        assert isinstance(error, StageFailed)
        assert "Stage 1 (server stage-1" in error.message


def test_a_complaint_without_another_cause_is_reported_itself(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=2) as made:
        driver = driven(made, 2)
        made.stages[1].go.clear()
        made.stages[0].failure, made.stages[0].fails_at = Unreachable("Cannot reach stage 1"), 2
        driver.send_step()
        error = refused(driver.result)
        assert isinstance(error, StageFailed)
        assert "Stage 0 (server stage-0" in error.message
        assert "Cannot reach stage 1" in error.message


def test_an_operators_own_error_keeps_its_kind_and_text(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=2) as made:
        driver = driven(made, 2)
        made.stages[1].failure = ModelError("view of 3 as 4", expected="12 elements", got="9", remedy="reshape")
        made.stages[1].fails_at = 2
        driver.send_step()
        error = refused(driver.result)
        assert isinstance(error, ModelError)
        assert "Stage 1" in error.message
        assert "view of 3 as 4" in error.message
        assert (error.expected, error.got, error.remedy) == ("12 elements", "9", "reshape")
        assert free(made)


def test_a_server_whose_lease_runs_out_fails_its_run(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=2) as made:
        driver = driven(made, 2)
        made.now[0] += 4.0
        made.stub.Heartbeat(coordinator_pb2.HeartbeatRequest(server="stage-0"))
        made.now[0] += 2.0
        error = refused(driver.result)
        assert isinstance(error, StageFailed)
        assert "Stage 1 (server stage-1" in error.message
        assert "no heartbeat for 6.0 s" in error.got
        assert free(made)
        assert [server.server for server in made.status().servers] == ["stage-0"]
        heartbeat = coordinator_pb2.HeartbeatRequest(server="stage-1")
        assert isinstance(refused(made.stub.Heartbeat, heartbeat), RunNotFound)
        made.register(made.stages[1])
        create(made, 2)


@pytest.mark.parametrize(
    ("leave", "part"),
    [
        (lambda made: made.stub.Deregister(coordinator_pb2.DeregisterRequest(server="stage-1")), "it was stopped"),
        (lambda made: made.register(made.stages[1]), "registered again"),
    ],
)
def test_a_server_that_leaves_or_restarts_fails_its_run(tmp_path: Path, leave: Any, part: str) -> None:
    with cluster(tmp_path, stages=2) as made:
        driver = driven(made, 2)
        leave(made)
        error = refused(driver.result)
        assert isinstance(error, StageFailed)
        assert part in error.got


def test_a_client_that_breaks_off_frees_the_servers(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=2) as made:
        driver = driven(made, 2)
        made.stages[1].go.clear()
        driver.send_step()
        wait_until(lambda: len(made.stages[0].programs) == 2)
        driver.call.cancel()
        wait_until(lambda: free(made))
        wait_until(lambda: run_state(made) == coordinator_pb2.RUN_STATE_ENDED)
        made.stages[1].go.set()
        driven(made, 2)


def test_a_client_that_goes_away_while_its_last_entries_finish(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=2) as made:
        driver = driven(made, 2)
        made.stages[1].go.clear()
        driver.send_step()
        driver.done()
        wait_until(lambda: len(made.stages[1].programs) == 2)
        driver.call.cancel()
        wait_until(lambda: free(made))


def test_a_run_is_ended_on_request_as_often_as_one_likes(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=1) as made:
        run = create(made, 1)
        for _ in range(2):
            made.stub.EndRun(coordinator_pb2.EndRunRequest(run=run.run))
        assert free(made)
        late = Driver(made, run)
        late.send()
        assert "it was ended on request" in str(refused(late.result))


@pytest.mark.parametrize(
    ("cut_off", "part"),
    [
        (lambda made, run: made.stub.EndRun(coordinator_pb2.EndRunRequest(run=run)), "ended on request"),
        (lambda made, run: made.coordinator.close(), "the coordinator stopped"),
    ],
)
def test_a_client_whose_run_is_cut_off_is_told(tmp_path: Path, cut_off: Any, part: str) -> None:
    with cluster(tmp_path, stages=1) as made:
        driver = driven(made, 1)
        made.stages[0].go.clear()
        driver.send_step()
        wait_until(lambda: len(made.stages[0].programs) == 2)
        cut_off(made, made.status().runs[0].run)
        error = refused(driver.result)
        assert isinstance(error, Aborted)
        assert part in error.message
        assert free(made)


def test_a_server_lost_while_it_is_prepared(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=1) as made:
        stage = made.stages[0]
        stage.go.clear()
        stage.waits_to_prepare = True
        call = made.stub.CreateRun.future(run_request(1))
        wait_until(stage.preparing.is_set)
        made.stub.Deregister(coordinator_pb2.DeregisterRequest(server="stage-0"))
        wait_until(lambda: run_state(made) == coordinator_pb2.RUN_STATE_FAILED)
        stage.go.set()
        error = refused(call.result)
        assert isinstance(error, StageFailed)
        assert "it was stopped" in error.got
        assert made.status().runs[0].state == coordinator_pb2.RUN_STATE_FAILED


def test_a_server_at_an_address_that_may_not_be_dialled(tmp_path: Path) -> None:
    with cluster(tmp_path) as made:
        made.stages.append(StageServer("far"))
        made.register(made.stages[0], address="192.0.2.1:7000")
        error = refused(made.stub.CreateRun, run_request(1))
        assert isinstance(error, SettingsError)
        assert "Plaintext" in error.message
        made.register(made.stages[0])
        create(made, 1)


def test_no_thread_is_left_behind(tmp_path: Path) -> None:
    def run_once(made: Cluster) -> None:
        driver = driven(made, 2)
        driver.call.cancel()
        driver.done()  # ends the thread of its own requests
        wait_until(lambda: free(made))
        wait_until(lambda: run_state(made) == coordinator_pb2.RUN_STATE_ENDED)
        assert "client" in made.status().runs[0].reason

    with cluster(tmp_path, stages=2) as made:
        for _ in range(3):  # the pools of the servers grow until each of their calls has a thread
            run_once(made)
        before = threading.active_count()
        for _ in range(5):
            run_once(made)
        wait_until(lambda: threading.active_count() <= before + 3)


def test_a_run_that_nobody_drives_ends(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=1, undriven_seconds=0.2) as made:
        create(made, 1)
        wait_until(lambda: run_state(made) == coordinator_pb2.RUN_STATE_ENDED)
        assert "no client drove it" in made.status().runs[0].reason
        wait_until(lambda: free(made))


def test_a_stream_that_says_nothing_holds_its_place_for_a_moment_only(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=1, streams=1, first_message_seconds=0.5) as made:
        run = create(made, 1)
        # Which of the two comes first is open; neither may wait for longer than its first message may.
        calls = [made.stub.Drive(iter(queue.SimpleQueue().get, None), timeout=10) for _ in range(2)]
        errors = {type(error): error for error in (refused(next, call) for call in calls)}
        assert errors[FrameError].expected == "a message that names its run, within 0.5 s"
        assert "Too many Drive streams" in errors[LimitExceeded].message
        # The place is free again, and the run unharmed.
        driver = Driver(made, run)
        driver.send()
        assert driver.result().entry == 1
