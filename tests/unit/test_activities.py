"""What servers do, in words."""

from __future__ import annotations

from typing import Any

import pytest

from gradwire_protocol.activities import activity_words, doing_words, message_words, stage_lines
from gradwire_protocol.v1 import stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb


def activity(**changes: Any) -> stage_pb2.Activity:
    return stage_pb2.Activity(**{"run": "r", "generation": 1, "stages": [2], "entry": 3, **changes})


def wait_for(direction: pb.Direction, stage: int = 1, **key: Any) -> stage_pb2.Wait:
    message = pb.MessageKey(entry=3, direction=direction, source_stage=stage, **key)
    server = "" if direction in (pb.DIRECTION_BATCH, pb.DIRECTION_STATE) else f"s{stage}"
    return stage_pb2.Wait(kind=stage_pb2.WAIT_KIND_MESSAGE, message=message, server=server, stage=stage)


@pytest.mark.parametrize(
    ("direction", "words"),
    [
        (pb.DIRECTION_BATCH, "rows of micro-batch 7 (input 'h') from the client"),
        (pb.DIRECTION_FORWARD, "forward of micro-batch 7 (value 'h') from stage 1"),
        (pb.DIRECTION_BACKWARD, "backward of micro-batch 7 (gradient of 'h') from stage 1"),
        (pb.DIRECTION_STATE, "tensor 'h' from the client"),
        (pb.DIRECTION_TIED, "gradient of the tied tensor 'h' from stage 1"),
        (pb.DIRECTION_NORM, "sum of squared gradients from stage 1 of replica 2"),
        (pb.DIRECTION_WEIGHT, "weight of the loss from stage 1 of replica 2"),
        (pb.DIRECTION_REDUCE, "part of the gradients (h) from stage 1 of replica 2"),
        (pb.DIRECTION_GROUP, "part of micro-batch 7 (h) from shard 2 of its stage"),
        (pb.DIRECTION_MOVED, "tensor 'h' from stage 1"),
        (pb.DIRECTION_RESULT, "'h' from stage 1"),
    ],
)
def test_every_message_has_words(direction: pb.Direction, words: str) -> None:
    key = pb.MessageKey(micro_batch=7, value="h", direction=direction, source_stage=1, source_member=2)
    assert message_words(key) == words


@pytest.mark.parametrize(
    ("action", "phase", "words"),
    [
        ("2F7", "forward", "running the forward of micro-batch 7 (2F7, entry 3)"),
        ("2F7", "encode", "encoding (2F7, entry 3)"),
        ("2B0", "backward", "running the backward of micro-batch 0 (2B0, entry 3)"),
        ("2B0", "forward", "running the forward of micro-batch 0 again (2B0, entry 3)"),
        ("2I0", "forward", "running the forward of micro-batch 0 again (2I0, entry 3)"),
        ("2I0", "backward", "running the input gradients of micro-batch 0 (2I0, entry 3)"),
        ("2W0", "backward", "running the weight gradients of micro-batch 0 (2W0, entry 3)"),
        ("2B0", "decode", "decoding (2B0, entry 3)"),
        ("REDUCE", "update", "adding the gradients of replicas and tied parameters (REDUCE, entry 3)"),
        ("NORM", "update", "clipping the gradients (NORM, entry 3)"),
        ("UPDATE", "update", "updating the weights (UPDATE, entry 3)"),
        ("UPDATE", "encode", "encoding (UPDATE, entry 3)"),
        ("GATHER", "update", "bringing the weights of replicas together (GATHER, entry 3)"),
        ("AVERAGE", "update", "averaging the weights of replicas (AVERAGE, entry 3)"),
        ("copying the model's state", "encode", "copying the model's state (entry 3)"),
        ("", "encode", "ending (entry 3)"),
        ("", "wait-step", "idle after entry 3"),
    ],
)
def test_every_phase_has_words(action: str, phase: str, words: str) -> None:
    assert doing_words(activity(action=action, phase=phase)) == words


def test_before_the_first_entry_it_is_idle() -> None:
    assert doing_words(activity(entry=0)) == "idle before its first entry"


def test_a_wait_names_what_its_owner_does() -> None:
    waiting = activity(action="2F7", wait=wait_for(pb.DIRECTION_FORWARD, micro_batch=7, value="h"), waiting_seconds=4.0)
    owner = activity(stages=[1], action="1F7", phase="encode")
    words = "has waited 4.1 s for the forward of micro-batch 7 (value 'h') from stage 1"
    assert activity_words(waiting, age_seconds=0.1) == words
    assert activity_words(waiting, {"s1": owner}.get, age_seconds=0.1) == f"{words}, which is encoding (1F7, entry 3)"
    owner.wait.CopyFrom(wait_for(pb.DIRECTION_BATCH, micro_batch=7, value="x"))
    assert activity_words(waiting, {"s1": owner}.get, age_seconds=0.1) == (
        f"{words}, which waits for rows of micro-batch 7 (input 'x') from the client"
    )


def test_waits_for_room_and_for_the_client_have_words() -> None:
    room = stage_pb2.Wait(kind=stage_pb2.WAIT_KIND_ROOM, server="s1", stage=1)
    assert activity_words(activity(wait=room)) == "has waited 0.0 s for stage 1 to take what was sent to it"
    collect = stage_pb2.Wait(kind=stage_pb2.WAIT_KIND_COLLECT)
    assert activity_words(activity(wait=collect)) == "has waited 0.0 s for the client to collect the results of entry 3"


def test_lines_are_by_run_and_in_the_order_of_stages() -> None:
    servers = [
        ("s1", activity(stages=[1], phase="wait-step"), 0.0),
        ("free", stage_pb2.Activity(), 0.0),
        ("s0", activity(stages=[0], action="0F1", phase="forward"), 0.0),
        ("t", activity(run="q", stages=[4], phase="wait-step"), 0.0),
    ]
    assert stage_lines(servers) == {
        "q": ["stage 4 is idle after entry 3"],
        "r": ["stage 0 is running the forward of micro-batch 1 (0F1, entry 3)", "stage 1 is idle after entry 3"],
    }


def test_what_a_server_sends_cannot_make_a_line_endless() -> None:
    assert len(activity_words(activity(action="x" * 10_000, phase="forward"))) < 500
    wait = wait_for(pb.DIRECTION_FORWARD, value="v" * 10_000)
    assert len(activity_words(activity(wait=wait), {"s1": activity(wait=wait)}.get)) < 1000


def test_servers_of_several_replicas_are_told_apart() -> None:
    servers = [(f"s{place}", activity(stages=[place % 2], phase="wait-step"), 0.0) for place in (3, 0, 2, 1)]
    lines = stage_lines(servers, {f"s{place}": place // 2 for place in range(4)}.get)
    assert lines["r"] == [
        f"stage {stage} of replica {replica} is idle after entry 3" for replica in (0, 1) for stage in (0, 1)
    ]


def test_servers_that_share_a_stage_are_told_apart() -> None:
    servers = [(f"s{place}", activity(stages=[place // 2], phase="wait-step"), 0.0) for place in (3, 0, 2, 1)]
    shards = {f"s{place}": place % 2 for place in range(4)}
    assert stage_lines(servers, shard_of=shards.get)["r"] == [
        f"stage {stage} (shard {shard}) is idle after entry 3" for stage in (0, 1) for shard in (0, 1)
    ]
    key = pb.MessageKey(micro_batch=2, value="7", direction=pb.DIRECTION_GROUP, source_stage=1, source_member=3)
    assert message_words(key) == "part of micro-batch 2 (7) from shard 3 of its stage"


def test_servers_of_several_shards_are_told_apart() -> None:
    servers = [(f"s{place}", activity(stages=[place // 2], phase="wait-step"), 0.0) for place in (3, 0, 2, 1)]
    shard_of = {f"s{place}": place % 2 for place in range(4)}.get
    assert stage_lines(servers, shard_of=shard_of)["r"] == [
        f"stage {stage} (shard {shard}) is idle after entry 3" for stage in (0, 1) for shard in (0, 1)
    ]
    assert stage_lines(servers[:1], lambda server: 4, shard_of)["r"] == [
        "stage 1 (shard 1) of replica 4 is idle after entry 3"
    ]


def test_a_parameter_server_is_called_what_it_is() -> None:
    of_server = stage_pb2.Activity(run="r", stages=[2], entry=3, parameter_server=True, phase="wait-step")
    of_stage = stage_pb2.Activity(run="r", stages=[1], entry=3, phase="wait-step")
    assert stage_lines([("p", of_server, 0.0), ("s", of_stage, 0.0)]) == {
        "r": ["stage 1 is idle after entry 3", "parameter server is idle after entry 3"]
    }
