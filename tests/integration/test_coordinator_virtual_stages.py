"""Runs with several stages on each server, as a coordinator lays them out: over real gRPC, with nothing computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from coordinator_cluster import cluster, driven, refused, run_request, split

from gradwire_protocol.errors import StageFailed
from gradwire_protocol.v1 import run_pb2, tensors_pb2


def test_a_server_gets_all_of_its_stages_and_each_tensor_once(tmp_path: Path) -> None:
    """Six nodes, the first and the last tied: stages 0 and 3 are on one server, which holds what they share once."""
    with cluster(tmp_path, stages=2) as made:
        driver = driven(made, 2, schedule="zb-v", virtual_stages=2, cuts=[1, 3, 5])
        requests = [stage.prepared for stage in made.stages]
        first, second = (request for request in requests if request is not None)
        assert [list(peer.stages) for peer in first.peers] == [[0, 3], [1, 2]]
        assert (first.stages, second.stages) == (4, 4)
        assert [(s.stage, s.graph) for s in first.segments] == [(s, g) for s in (0, 3) for g in (1, 2, 3)]
        assert [(t.spec.name, list(t.holder_stages)) for t in first.tensors] == [("W0", [0, 3])]
        assert [(t.spec.name, list(t.holder_stages)) for t in second.tensors] == [
            ("W1", [1]),
            ("W2", [1]),
            ("W3", [2]),
            ("W4", [2]),
        ]
        # Within a server nothing travels: no message of stage 2 for stage 1, or back.
        assert {(bound.source_stage, bound.direction) for bound in second.bounds} == {
            (0, tensors_pb2.DIRECTION_FORWARD),
            (3, tensors_pb2.DIRECTION_BACKWARD),
        }
        driver.send_step((2, 2))
        result = driver.result()
        assert set(result.timings) == {"stage-0", "stage-1"}
        assert made.stages[0].programs[1] == (2, "0F0 0F1 3F0 3I0 3W0 3F1 3I1 3W1 0B0 0B1 UPDATE")
        driver.send(evaluate=run_pb2.Evaluate(micro_batches=split((3, 1))))
        driver.result()
        assert [stage.programs[2][1] for stage in made.stages] == ["0F0 0F1 3F0 3F1", "1F0 1F1 2F0 2F1"]
        status = made.status().runs[0].plan
        assert [(stage.stage, stage.server) for stage in status.stages] == [(0, 0), (1, 1), (2, 1), (3, 0)]
        assert (status.schedule, status.virtual_stages) == ("zb-v", 2)
        # Two values cross, each 2 × 4 numbers of 4 bytes, for four micro-batches.
        assert [stage.boundary_bytes for stage in status.stages] == [128, 0, 128, 0]


def test_what_several_stages_of_a_server_read_is_sent_there_once(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=2) as made:
        request = run_request(2, schedule="interleaved-1f1b", virtual_stages=2, cuts=[1, 3, 5])
        for graph in (request.model.train, request.model.evaluate, request.model.predict):
            graph.nodes[3].arguments.add(value="x")  # stage 2, on the server of stage 0
        reply = made.stub.CreateRun(request)
        assert [list(server.stages) for server in reply.servers] == [[0, 2], [1, 3]]
        assert [[(use.graph, list(use.values)) for use in server.inputs] for server in reply.servers] == [
            [(kind, ["x"]) for kind in (1, 2, 3)],
            [],
        ]
        assert [list(server.owned_tensors) for server in reply.servers] == [["W0", "W3", "W4"], ["W1", "W2"]]
        assert [list(server.tensors) for server in reply.servers] == [["W0", "W3", "W4"], ["W0", "W1", "W2"]]
        assert [list(server.results) for server in reply.servers] == [[], ["n5"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "zb-v", "virtual_stages": 1}, "zb-v is not made for 1 virtual stages"),
        ({"schedule": "1f1b", "virtual_stages": 2}, "1f1b is not made for 2 virtual stages"),
        ({"schedule": "auto", "virtual_stages": 0}, "virtual_stages is out of range"),
        ({"schedule": "auto", "virtual_stages": 4}, "cannot be cut into 8 stages"),
        ({"schedule": "zb-v", "virtual_stages": 2, "cuts": [1]}, "The number of cuts"),
    ],
)
def test_stages_on_each_server_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with cluster(tmp_path, stages=2) as made:
        assert message in refused(made.stub.CreateRun, run_request(2, **changes)).message


def test_a_server_that_fails_is_named_by_all_of_its_stages(tmp_path: Path) -> None:
    with cluster(tmp_path, stages=2) as made:
        made.stages[1].failure, made.stages[1].fails_at = StageFailed("out of memory"), 2
        driver = driven(made, 2, schedule="zb-v", virtual_stages=2)
        driver.send_step()
        error = refused(driver.result)
        assert error.message.startswith("Stages 1, 2 (server stage-1 at")
        assert "failed during entry 2: out of memory" in error.message
