"""What a coordinator makes of a plan with replicas: who gets what, who reports what, and how servers are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from coordinator_cluster import cluster, create, driven, free, refused, run_request, split, wait_until

from gradwire_protocol.errors import FrameError, ModelError, PlanError, from_rpc_error
from gradwire_protocol.v1 import run_pb2

PLAN: dict[str, Any] = {"replicas": 2, "micro_batches": 5, "expected_rows": 10, "schedule": "gpipe"}
STEP = split((2, 2, 2, 2, 2), replicas=2)


def test_servers_go_by_position_one_replica_after_the_other(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=4) as made:
        reply = create(made, 2, **PLAN, compression="int8")
        assert [(server.replica, list(server.stages)) for server in reply.servers] == [
            (0, [0]),
            (0, [1]),
            (1, [0]),
            (1, [1]),
        ]
        first, second = reply.servers[:2], reply.servers[2:]
        assert [list(server.tensors) for server in first] == [list(server.tensors) for server in second]
        assert [list(server.results) for server in first] == [list(server.results) for server in second]
        # The first replica alone delivers what all of them have.
        assert [list(server.owned_tensors) for server in second] == [[], []]
        assert all(server.owned_tensors for server in first)
        assert list(reply.plan.replica_shares) == [0.5, 0.5]
        assert reply.plan.compression == "int8"
        assert [(each.server, each.replica) for each in reply.plan.prediction.servers] == [
            (f"stage-{place}", place // 2) for place in range(4)
        ]
        for stage in made.stages:
            request = stage.prepared
            assert request is not None
            assert [(peer.server, peer.replica, list(peer.stages)) for peer in request.peers] == [
                (f"stage-{place}", place // 2, [place % 2]) for place in range(4)
            ]
            assert (request.stages, request.compression) == (2, "int8")
        assert made.stages[0].prepared.segments == made.stages[2].prepared.segments


def test_each_replica_runs_its_own_micro_batches_and_reports_their_losses(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=4) as made:
        driver = driven(made, 2, **PLAN, zero="off")
        driver.send_step(micro_batches=STEP)
        result = driver.result()
        # As if one server had reported all: (index + 1) · rows, over all rows.
        assert result.loss == pytest.approx(sum(2 * (index + 1) for index in range(5)) / 10)
        assert result.weight == 10
        assert set(result.timings) == {f"stage-{place}" for place in range(4)}
        # A step so small that one replica has nothing to do.
        driver.send_step(micro_batches=split((3,)), max_gradient_norm=1.0)
        assert driver.result().loss == 1.0
        driver.send(evaluate=run_pb2.Evaluate(micro_batches=split((1, 1), replicas=2)))
        assert driver.result().loss == pytest.approx(1.5)
        programs = [[text for _, text in stage.programs[1:]] for stage in made.stages]
        assert programs == [
            ["0F0 0F2 0F4 0B0 0B2 0B4 REDUCE UPDATE", "0F0 0B0 REDUCE NORM UPDATE", "0F0"],
            ["1F0 1F2 1F4 1B0 1B2 1B4 REDUCE UPDATE", "1F0 1B0 REDUCE NORM UPDATE", "1F0"],
            ["0F1 0F3 0B1 0B3 REDUCE UPDATE", "REDUCE NORM UPDATE", "0F1"],
            ["1F1 1F3 1B1 1B3 REDUCE UPDATE", "REDUCE NORM UPDATE", "1F1"],
        ]
        driver.done()
        wait_until(lambda: free(made))


def test_a_micro_batch_for_a_replica_that_is_not_there_ends_the_run(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=2) as made:
        driver = driven(made, 1, **PLAN)
        driver.send_step(micro_batches=split((2, 2, 2), replicas=3))
        with pytest.raises(grpc.RpcError) as caught:
            driver.result()
        error = from_rpc_error(caught.value)
        assert isinstance(error, FrameError)
        assert "replica 0 to 1" in error.expected
        assert "for replica 2" in error.got


@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_server_that_fails_is_named_with_its_replica(tmp_path: Path, fails_at: int) -> None:
    with cluster(tmp_path, stages=4) as made:
        made.stages[3].failure = ModelError("an operator failed")
        made.stages[3].fails_at = fails_at
        if fails_at == 0:
            error = refused(made.stub.CreateRun, run_request(2, **PLAN))
            assert "Cannot prepare stage 1 of replica 1 (server stage-3" in error.message
            return
        driver = driven(made, 2, **PLAN)
        driver.send_step(micro_batches=STEP)
        with pytest.raises(grpc.RpcError) as caught:
            driver.result()
        assert from_rpc_error(caught.value).message.startswith("Stage 1 of replica 1 (server stage-3")


def test_servers_must_suffice_for_all_replicas(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=3) as made:
        error = refused(made.stub.CreateRun, run_request(2, **PLAN))
        assert isinstance(error, PlanError)
        assert "takes 4 servers" in error.message
