from __future__ import annotations

import json

from gradwire.plain import to_plain
from gradwire_protocol.v1 import coordinator_pb2, run_pb2


def test_all_fields_are_there_and_numbers_are_numbers() -> None:
    run = coordinator_pb2.RunStatus(run="a", state=coordinator_pb2.RUN_STATE_ACTIVE, last_entry=2**60)
    plain = to_plain(coordinator_pb2.GetStatusReply(version="1", runs=[run]))
    assert plain["version"] == "1"
    assert plain["servers"] == []
    (found,) = plain["runs"]
    assert (found["run"], found["state"], found["last_entry"]) == ("a", "RUN_STATE_ACTIVE", 2**60)
    assert found["loss"] is None
    assert found["plan"] is None
    assert json.loads(json.dumps(plain)) == plain


def test_lists_of_numbers_and_of_texts_stay_lists() -> None:
    assert to_plain(run_pb2.Plan(cuts=[3, 4]))["cuts"] == [3, 4]
    assert to_plain(run_pb2.OptimizerGroup(parameters=["w"]))["parameters"] == ["w"]
