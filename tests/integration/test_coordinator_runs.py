"""Runs through a real coordinator: creation, entries in order, results, and what is refused."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from coordinator_cluster import (
    Driver,
    cluster,
    create,
    driven,
    free,
    refused,
    run_request,
    run_state,
    split,
    wait_until,
)

from gradwire_protocol.errors import (
    FrameError,
    LimitExceeded,
    ModelError,
    OptimizerError,
    PlanError,
    RunNotFound,
    ServerBusy,
    SettingsError,
    StaleGeneration,
)
from gradwire_protocol.v1 import coordinator_pb2, graph_pb2, run_pb2, tensors_pb2


def test_a_run_is_laid_out_prepared_and_described(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=3) as made:
        reply = create(made, 3)
        assert [list(server.stages) for server in reply.servers] == [[0], [1], [2]]
        assert [server.address for server in reply.servers] == [stage.address for stage in made.stages]
        assert [list(server.tensors) for server in reply.servers] == [["W0", "W1"], ["W2", "W3"], ["W0", "W4"]]
        assert [list(server.owned_tensors) for server in reply.servers] == [["W0", "W1"], ["W2", "W3"], ["W4"]]
        uses = [[(use.graph, list(use.values)) for use in server.inputs] for server in reply.servers]
        assert uses == [[(kind, ["x"]) for kind in (1, 2, 3)], [], []]
        assert [list(server.results) for server in reply.servers] == [[], [], ["n5"]]
        assert reply.plan.theoretical_bubble_ratio == pytest.approx(2 / 6)
        assert [(s.first_node, s.nodes, s.boundary_bytes) for s in reply.plan.stages] == [
            (0, 2, 2 * 4 * 4 * 4),
            (2, 2, 2 * 4 * 4 * 4),
            (4, 2, 0),
        ]
        for stage in made.stages:
            request = stage.prepared
            assert request is not None
            assert request.server == stage.name
            assert [peer.server for peer in request.peers] == ["stage-0", "stage-1", "stage-2"]
            assert (request.stages, request.seed, request.optimizer.name) == (3, 7, "SGD")
            assert [segment.graph for segment in request.segments] == [1, 2, 3]
        assert run_state(made) == coordinator_pb2.RUN_STATE_PREPARED


def test_entries_run_in_order_and_reports_become_results(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=2) as made:
        driver = driven(made, 2)
        driver.send_step()
        driver.send_step(max_gradient_norm=1.0)
        first, second = driver.result(), driver.result()
        assert (first.entry, second.entry) == (2, 3)
        # Parts (1, 2, 3, 4), weighted by rows.
        assert first.loss == pytest.approx(2.5)
        assert first.weight == 8
        assert (first.weight_version, second.weight_version) == (1, 2)
        assert set(first.timings) == {"stage-0", "stage-1"}
        assert 0 < first.seconds < 5
        driver.send(evaluate=run_pb2.Evaluate(micro_batches=split((3, 1))))
        assert driver.result().loss == pytest.approx((1 * 3 + 2 * 1) / 4)
        driver.send(predict=run_pb2.Predict(micro_batches=split((1,))))
        assert not driver.result().HasField("loss")
        driver.send(fetch_state=run_pb2.FetchState())
        driver.result()
        assert made.stages[0].programs == [
            (1, ""),
            # Short stages: what links take is worth a deeper warm-up.
            (2, "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3 REDUCE UPDATE"),
            (3, "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3 REDUCE NORM UPDATE"),
            (4, "0F0 0F1"),
            (5, "0F0"),
            (6, ""),
        ]
        assert made.stages[1].programs[1] == (2, "1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3 REDUCE UPDATE")
        status = made.status().runs[0]
        assert (status.state, status.step, status.last_entry) == (coordinator_pb2.RUN_STATE_ACTIVE, 2, 6)
        assert status.loss == pytest.approx(2.5)
        driver.done()
        assert list(driver.call) == []
        assert free(made)
        assert run_state(made) == coordinator_pb2.RUN_STATE_ENDED
        assert [entry.number for entry in made.log.entries(status.run)] == [1, 2, 3, 4, 5, 6]
        assert [result.entry for result in made.log.results(status.run)] == [1, 2, 3, 4, 5, 6]


def test_servers_do_not_wait_for_each_other_within_the_window(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=2) as made:
        driver = driven(made, 2)
        made.stages[1].go.clear()
        driver.send_step()
        driver.send_step()
        # Server 0 has both entries, and has finished the first, while server 1 has finished none.
        wait_until(lambda: [number for number, _ in made.stages[0].programs] == [1, 2, 3])
        assert [number for number, _ in made.stages[1].programs] == [1, 2]
        made.stages[1].go.set()
        assert [driver.result().entry, driver.result().entry] == [2, 3]


def test_the_window_is_a_limit(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=2) as made:
        driver = driven(made, 2)
        made.stages[1].go.clear()
        for _ in range(3):
            driver.send_step()
        error = refused(list, driver.call)
        assert isinstance(error, LimitExceeded)
        assert "at most 2 open" in error.expected
        assert free(made)


def test_a_client_that_closes_gets_its_open_results_first(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=2) as made:
        driver = driven(made, 2)
        made.stages[1].delay_seconds = 0.2
        driver.send_step()
        driver.done()
        assert [reply.result.entry for reply in driver.call] == [2]
        assert free(made)


def state_of(*names: tuple[str, str]) -> dict[str, Any]:
    """A LoadState entry that names values of the optimizer's state."""
    items = [run_pb2.OptimizerStateName(parameter=parameter, state=state) for parameter, state in names]
    return {"load_state": run_pb2.LoadState(optimizer_state=items)}


@pytest.mark.parametrize(
    ("bad", "kind", "part"),
    [
        ({"number": 9}, FrameError, "expected entry 2"),
        ({"number": 1}, FrameError, "entry 2"),
        ({"generation": 7}, StaleGeneration, "generation 1"),
        ({"train_step": run_pb2.TrainStep(step=1)}, FrameError, "1 to 4"),
        ({"evaluate": run_pb2.Evaluate(micro_batches=split((1,) * 5))}, FrameError, "got 5"),
        ({"evaluate": run_pb2.Evaluate(micro_batches=split((2, 0)))}, FrameError, "at least 1 row"),
        ({"evaluate": run_pb2.Evaluate(micro_batches=[run_pb2.MicroBatch(first_row=3, rows=1)])}, FrameError, "row 0"),
        ({"evaluate": run_pb2.Evaluate(micro_batches=[run_pb2.MicroBatch(rows=1, replica=1)])}, FrameError, "replica"),
        ({"train_step": run_pb2.TrainStep(step=1, micro_batches=split((1,)))}, OptimizerError, "1 parameter groups"),
        ({"train_step": run_pb2.TrainStep(step=0, micro_batches=split((1,)))}, FrameError, "step 1"),
        ({"train_step": run_pb2.TrainStep(step=2, micro_batches=split((1,)))}, FrameError, "step 1"),
        (state_of(("strange", "exp_avg")), OptimizerError, "strange"),
        (state_of(("W0", "")), FrameError, "1 to 64 bytes"),
        (state_of(("W0", "s" * 65)), FrameError, "65"),
        (state_of(("W0", "step"), ("W0", "step")), FrameError, "twice"),
        (state_of(*(("W0", f"s{index}") for index in range(100))), LimitExceeded, "16 for each"),
        ({"load_state": run_pb2.LoadState(weight_version=2**60)}, FrameError, "number of steps"),
        ({"save_state": run_pb2.SaveState(directory="../a", token="t")}, SettingsError, "relative"),
        ({"save_state": run_pb2.SaveState(directory="a", token="t")}, FrameError, "not announced"),
        ({"load_state": run_pb2.LoadState(checkpoint=run_pb2.StoredState(directory=".."))}, SettingsError, "relative"),
        ({"load_state": run_pb2.LoadState(checkpoint=run_pb2.StoredState(directory="a"))}, FrameError, "no hash"),
    ],
)
def test_entries_that_are_not_valid_end_the_run(tmp_path: Path, bad: dict[str, Any], kind: type, part: str) -> None:
    with cluster(tmp_path, stages=1) as made:
        driver = driven(made, 1)
        driver.send(**({"fetch_state": run_pb2.FetchState()} if len(bad) == 1 and "number" in bad else {}) | bad)
        error = refused(driver.result)
        assert isinstance(error, kind)
        assert part.lower().replace("expected ", "").replace("got ", "") in str(error).lower()
        assert run_state(made) == coordinator_pb2.RUN_STATE_FAILED
        assert free(made)


def test_steps_are_numbered_without_gaps_from_where_the_loaded_state_is(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=1) as made:
        driver = driven(made, 1)
        driver.send(load_state=run_pb2.LoadState(weight_version=100))
        driver.result()
        driver.step = 100
        driver.send_step()
        driver.result()
        driver.step = 110
        driver.send_step()
        assert "step 102" in str(refused(driver.result))


def test_fewer_servers_than_stages(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=2) as made:
        error = refused(made.stub.CreateRun, run_request(3))
        assert isinstance(error, PlanError)
        assert "3 servers" in error.message
        assert "2 stage servers are free" in error.message
        assert "gradwire-stage-server" in error.remedy
        create(made, 2)  # none was kept
        error = refused(made.stub.CreateRun, run_request(1))
        assert "0 stage servers are free" in error.message
        assert "2 of them busy" in error.got


def test_more_stages_than_the_model_can_be_cut_into(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=1) as made:
        error = refused(made.stub.CreateRun, run_request(9, nodes=4))
        assert isinstance(error, PlanError)
        assert "at most 4 stages" in error.expected
        assert error.got == "9 stages"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"replicas": 0}, PlanError),
        ({"replicas": 2}, PlanError),
        ({"stages": 1, "replicas": 5}, PlanError),
        ({"stages": 512, "replicas": 3}, PlanError),
        ({"exchange": "gossip"}, PlanError),
        ({"compression": "topk(density=2)"}, PlanError),
        ({"tensor": 2}, PlanError),
        ({"stages": 0}, PlanError),
        ({"micro_batches": 0}, PlanError),
        ({"window": 99}, PlanError),
        ({"expected_rows": 0}, PlanError),
        ({"stall_seconds": 0.5}, PlanError),
        ({"stall_seconds": float("nan")}, PlanError),
        ({"step_seconds": -1.0}, PlanError),
        ({"precision": tensors_pb2.DATA_TYPE_FLOAT16}, PlanError),
        ({"precision": tensors_pb2.DATA_TYPE_INT8}, PlanError),
        ({"schedule": "zigzag"}, PlanError),
        ({"cuts": [9]}, PlanError),
    ],
)
def test_plans_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, Any], kind: type) -> None:
    with cluster(tmp_path, stages=2) as made:
        assert isinstance(refused(made.stub.CreateRun, run_request(**{"stages": 2, **change})), kind)
        create(made, 2)  # the servers are free


@pytest.mark.parametrize(("extra", "part"), [("stranger", "not a parameter"), ("W0", "twice")])
def test_an_optimizer_that_does_not_fit_the_model_is_refused(tmp_path: Path, extra: str, part: str) -> None:
    with cluster(tmp_path, stages=1) as made:
        request = run_request(1)
        request.optimizer.groups.add(parameters=[extra])
        error = refused(made.stub.CreateRun, request)
        assert isinstance(error, OptimizerError)
        assert part in error.message


def test_the_users_cuts_are_used(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=2) as made:
        assert [stage.nodes for stage in create(made, 2, cuts=[1]).plan.stages] == [1, 5]


def test_a_server_that_cannot_prepare_is_named_and_the_others_are_freed(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=2) as made:
        made.stages[1].failure = ModelError("operator aten.magic is not allowed", remedy="use another")
        error = refused(made.stub.CreateRun, run_request(2))
        assert isinstance(error, ModelError)
        assert "stage 1 (server stage-1" in error.message
        assert "aten.magic" in error.message
        assert error.remedy == "use another"
        assert free(made)
        made.stages[1].failure = None
        create(made, 2)


def test_unknown_runs_and_second_drivers_are_refused(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=1) as made:
        error = refused(made.stub.EndRun, coordinator_pb2.EndRunRequest(run="nonesuch"))
        assert isinstance(error, RunNotFound)
        stranger = Driver(made, coordinator_pb2.CreateRunReply(run="nonesuch", generation=1))
        stranger.send()
        assert isinstance(refused(stranger.result), RunNotFound)
        run = create(made, 1)
        first, second = Driver(made, run), Driver(made, run)
        first.send()
        first.result()
        second.send()
        assert isinstance(refused(second.result), ServerBusy)
        first.send_step()
        assert first.result().entry == 2  # the first is not disturbed


def test_a_stream_names_one_run_only(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=2) as made:
        driver = driven(made, 1)
        other = create(made, 1)
        driver._run = other
        driver.send_step()
        assert isinstance(refused(driver.result), FrameError)


def test_prediction_without_a_prediction_graph(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=1) as made:
        request = run_request(1)
        request.model.ClearField("predict")
        driver = Driver(made, made.stub.CreateRun(request))
        driver.send()
        driver.result()
        driver.send(predict=run_pb2.Predict(micro_batches=split((1,))))
        assert isinstance(refused(driver.result), ModelError)


def test_metrics_show_servers_runs_and_steps(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=2, metrics=True) as made:
        driver = driven(made, 2)
        driver.send_step()
        driver.result()
        with urllib.request.urlopen(f"http://{made.service.metrics_address}/metrics") as page:
            text = page.read().decode()
        run = made.status().runs[0].run
        assert 'gradwire_servers{role="stage"} 2.0' in text
        assert 'gradwire_runs{state="active"} 1.0' in text
        assert f'gradwire_steps_total{{run="{run}"}} 1.0' in text
        assert f'gradwire_loss{{run="{run}"}} 2.5' in text
        assert f'gradwire_step_duration_seconds_count{{run="{run}"}} 1.0' in text
        assert f'gradwire_bubble_ratio{{replica="0",run="{run}",shard="0",stage="1"}} 0.2' in text
        assert 'gradwire_info{role="coordinator",version="test"} 1.0' in text


def test_the_log_holds_what_a_recovery_needs(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=1) as made:
        driver = driven(made, 1)
        driver.send_step()
        driver.result()
        name = made.status().runs[0].run
        logged = made.log.run(name)
        assert logged.request == run_request(1)
        assert logged.state == coordinator_pb2.RUN_STATE_ACTIVE
        step = made.log.entries(name)[1].train_step
        assert (step.step, [part.rows for part in step.micro_batches]) == (1, [2, 2, 2, 2])
    assert logged.request.model.train.kind == graph_pb2.GRAPH_KIND_TRAIN


def test_a_client_that_waits_hears_that_the_coordinator_lives(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=1) as made:
        driver = driven(made, 1)
        made.stages[0].go.clear()
        driver.send_step()
        for _ in range(2):
            began = time.monotonic()
            reply = next(driver.call)
            assert not reply.HasField("result")
            assert time.monotonic() - began < 4.0
        made.stages[0].go.set()
        assert driver.result().entry == 2
