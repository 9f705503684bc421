"""Who is named when a run stands still, and when it is none: on activities as servers send them."""

from __future__ import annotations

import dataclasses
from typing import Any

from gradwire_coordinator.server_place import ServerPlace
from gradwire_coordinator.stalls import Standing, find_late, find_stall
from gradwire_protocol.errors import Stalled
from gradwire_protocol.v1 import run_pb2, stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb

LIMIT = 60.0


def forward_from(stage: int, micro_batch: int = 7) -> stage_pb2.Wait:
    key = pb.MessageKey(entry=3, micro_batch=micro_batch, value="h", direction=pb.DIRECTION_FORWARD, source_stage=stage)
    return stage_pb2.Wait(kind=stage_pb2.WAIT_KIND_MESSAGE, message=key, server=f"s{stage}", stage=stage)


def backward_from(stage: int) -> stage_pb2.Wait:
    key = pb.MessageKey(entry=3, micro_batch=2, value="h", direction=pb.DIRECTION_BACKWARD, source_stage=stage)
    return stage_pb2.Wait(kind=stage_pb2.WAIT_KIND_MESSAGE, message=key, server=f"s{stage}", stage=stage)


def room_at(stage: int) -> stage_pb2.Wait:
    return stage_pb2.Wait(kind=stage_pb2.WAIT_KIND_ROOM, server=f"s{stage}", stage=stage)


ROWS = stage_pb2.Wait(
    kind=stage_pb2.WAIT_KIND_MESSAGE, message=pb.MessageKey(entry=3, value="x", direction=pb.DIRECTION_BATCH)
)
COLLECT = stage_pb2.Wait(kind=stage_pb2.WAIT_KIND_COLLECT)


def waiting(stage: int, wait: stage_pb2.Wait, **changes: Any) -> Standing:
    activity = stage_pb2.Activity(
        run="r", stages=[stage], entry=3, action=f"{stage}F7", phase="wait-activation", wait=wait, waiting_seconds=61
    )
    return standing(stage, activity, **changes)


def computing(stage: int, phase: str = "forward", action: str = "", **changes: Any) -> Standing:
    activity = stage_pb2.Activity(
        run="r", stages=[stage], entry=3, action=action or f"{stage}F{stage}", phase=phase, progress=9
    )
    return standing(stage, activity, **changes)


def idle(stage: int, entry: int, **changes: Any) -> Standing:
    return standing(stage, stage_pb2.Activity(run="r", stages=[stage], entry=entry, phase="wait-step"), **changes)


def standing(
    stage: int, activity: stage_pb2.Activity | None, stages: list[int] | None = None, **changes: Any
) -> Standing:
    fields: dict[str, Any] = {
        "owes": 3,
        "owed_seconds": 100.0,
        "silent_seconds": 0.5,
        "still_seconds": 61.0,
        "client_still_seconds": 90.0,
        **changes,
    }
    return Standing(
        position=stage,
        place=ServerPlace(stages=stages or [stage]),
        server=f"s{stage}",
        address=f"10.0.0.{stage}:7000",
        activity=activity,
        **fields,
    )


def find(*servers: Standing, client_seconds: float = 100.0) -> Stalled | None:
    return find_stall(servers, client_seconds=client_seconds, limit_seconds=LIMIT)


def test_a_server_that_computes_without_end_is_named_with_what_it_does_and_who_waits() -> None:
    error = find(computing(0, still_seconds=80.0), waiting(1, forward_from(0)))
    assert error is not None
    assert error.message == (
        "Stage 0 (server s0 at 10.0.0.0:7000) has made no progress for 80.0 s: "
        "it is running the forward of micro-batch 0 (0F0, entry 3)"
    )
    assert "stall_seconds" in error.remedy
    assert error.expected == "progress within 60 s, the plan's stall_seconds"


def test_it_is_found_through_those_who_wait_for_it_first() -> None:
    # Stage 1 has the older entry, and so is looked at first.
    error = find(computing(0, owes=4, still_seconds=80.0), waiting(1, forward_from(0)))
    assert error is not None
    assert error.message.startswith("Stage 0 (server s0 at")
    assert "stage 1 has waited 61.0 s for the forward of micro-batch 7 (value 'h') from stage 0" in error.got


def test_a_chain_of_waits_leads_to_its_root() -> None:
    servers = [waiting(3, forward_from(2)), waiting(2, forward_from(1)), computing(1, owes=4, phase="encode")]
    error = find(*servers, computing(0, still_seconds=1.0))
    assert error is not None
    assert error.message.startswith("Stage 1 (server s1 at 10.0.0.1:7000) has made no progress for 61.0 s: it is encod")


def test_no_stall_while_the_root_moves() -> None:
    slow = computing(0, still_seconds=59.0)
    assert find(slow, waiting(1, forward_from(0), still_seconds=500.0, owed_seconds=600.0)) is None


def test_no_stall_while_anyone_on_the_way_moves() -> None:
    # Chunks of a large message come in: a slow link.
    moving = waiting(1, forward_from(0), still_seconds=0.4)
    assert find(idle(0, 3, owes=0), moving, waiting(2, forward_from(1))) is None


def test_those_who_wait_for_each_other_have_lost_a_message() -> None:
    error = find(waiting(0, backward_from(1)), waiting(1, forward_from(0)))
    assert error is not None
    assert error.message == "Stages 0, 1 have waited for each other for 61.0 s: a message between them was lost"
    assert "forward of micro-batch 7 (value 'h') from stage 0" in error.got
    assert "backward of micro-batch 2 (gradient of 'h') from stage 1" in error.got
    assert "10.0.0.0:7000" in error.remedy


def test_servers_with_several_stages_are_named_by_all_of_them() -> None:
    first = waiting(0, backward_from(1), stages=[0, 3])
    second = waiting(1, forward_from(0), stages=[1, 2])
    error = find(first, second)
    assert error is not None
    assert error.message.startswith("Stages 0, 3 and 1, 2 have waited for each other for 61.0 s")
    assert "the network between stages 0, 3 at 10.0.0.0:7000 and stages 1, 2 at 10.0.0.1:7000" in error.remedy
    slow = find(computing(0, still_seconds=80.0, stages=[0, 3]), second)
    assert slow is not None
    assert slow.message.startswith("Stages 0, 3 (server s0 at 10.0.0.0:7000)")


def test_a_disk_that_does_not_answer_is_named() -> None:
    disk = stage_pb2.Wait(kind=stage_pb2.WAIT_KIND_DISK, server="s1", stage=1)
    error = find(waiting(0, forward_from(1)), waiting(1, disk))
    assert error is not None
    assert error.message.startswith("Stage 1 (server s1")
    assert "for a checkpoint to be written to disk" in error.message
    assert "--checkpoint-root" in error.remedy
    assert find(waiting(0, forward_from(1)), waiting(1, disk, still_seconds=1.0)) is None


def test_back_pressure_is_a_wait_like_others() -> None:
    error = find(waiting(0, room_at(1)), computing(1, owes=4))
    assert error is not None
    assert error.message.startswith("Stage 1 (server s1")
    assert "for stage 1 to take what was sent to it" in error.got


def test_a_message_of_an_owner_that_has_finished_was_lost() -> None:
    owner = idle(0, 3, owes=0, still_seconds=70.0)
    owner.activity.unreceipted.add(server="s1", messages=2, size_bytes=4096)  # type: ignore[union-attr]
    error = find(owner, waiting(1, forward_from(0)))
    assert error is not None
    assert error.message == (
        "Stage 1 (server s1 at 10.0.0.1:7000) has waited 61.0 s for forward of micro-batch 7 (value 'h') from stage 0, "
        "which has finished its part"
    )
    assert "stage 0: 2 messages of 4096 bytes are sent and not received" in error.got
    assert "stage 0 at 10.0.0.0:7000 and stage 1 at 10.0.0.1:7000" in error.remedy


def test_the_client_is_named_where_it_owes() -> None:
    for wait, words in (
        (ROWS, "rows of micro-batch 0 (input 'x') from the client"),
        (COLLECT, "the client to collect"),
    ):
        error = find(waiting(0, wait), waiting(1, forward_from(0)))
        assert error is not None
        assert error.message.startswith("The client has made no progress for 61.0 s: Stage 0 (server s0 at")
        assert words in error.message


def test_no_stall_while_the_client_moves_elsewhere() -> None:
    assert find(waiting(0, ROWS), waiting(1, forward_from(0), client_still_seconds=2.0)) is None
    assert find(waiting(0, ROWS), waiting(1, forward_from(0)), client_seconds=2.0) is None


def test_between_entries_nothing_is_a_stall() -> None:
    assert find(idle(0, 3, owes=0, still_seconds=5000.0), idle(1, 3, owes=0, still_seconds=5000.0)) is None


def test_time_before_the_entry_does_not_count() -> None:
    # Idle for an hour; the entry came 5 s ago.
    assert find(idle(0, 2, still_seconds=3600.0, owed_seconds=5.0)) is None


def test_an_entry_that_does_not_arrive_is_named() -> None:
    error = find(idle(0, 2), waiting(1, forward_from(0)))
    assert error is not None
    assert error.message == "Stage 0 (server s0 at 10.0.0.0:7000) has not begun entry 3, sent to it 100.0 s ago"


def test_a_report_that_does_not_arrive_is_named() -> None:
    error = find(idle(0, 3))
    assert error is not None
    assert "has finished entry 3, but its report has not come" in error.message


def test_late_heartbeats_are_no_stall() -> None:
    # When last heard of, it had moved 2 s before.
    assert find(computing(0, silent_seconds=59.0, still_seconds=2.0)) is None
    assert find(computing(0, silent_seconds=10.0, still_seconds=55.0)) is None
    # Its progress is 61 s old, of which the entry was there for 40 when it was last heard of.
    assert find(computing(0, silent_seconds=10.0, still_seconds=61.0, owed_seconds=50.0)) is None


def test_a_server_that_falls_silent_for_the_limit_is_named() -> None:
    error = find(waiting(0, backward_from(1)), computing(1, silent_seconds=60.0, still_seconds=0.0))
    assert error is not None
    assert error.message == "Stage 1 (server s1 at 10.0.0.1:7000) has not been heard of for 60.0 s"
    assert "running the forward" in error.got
    assert "stage 0 has waited" in error.got


def test_a_server_that_has_told_nothing_of_the_run_is_named() -> None:
    error = find(standing(0, None))
    assert error is not None
    assert "without a sign of the run" in error.message


def test_a_wait_for_one_that_is_not_of_the_run_ends_there() -> None:
    error = find(waiting(0, backward_from(5)))
    assert error is not None
    assert "Stage 0" in error.message


def test_a_step_has_a_limit_of_its_own() -> None:
    servers = [computing(0, still_seconds=0.1), waiting(1, forward_from(0))]
    step = run_pb2.Entry(number=9, train_step=run_pb2.TrainStep(step=7))
    assert find_late((step, 5.0), servers, 5.0) is None
    assert find_late((step, 500.0), servers, 0.0) is None
    assert find_late(None, servers, 5.0) is None
    error = find_late((step, 5.1), servers, 5.0)
    assert error is not None
    assert error.message == "Step 7 has taken 5.1 s"
    assert "stage 0 is running the forward of micro-batch 0" in error.got
    # Taking weights has no such limit.
    assert find_late((run_pb2.Entry(number=1, load_state=run_pb2.LoadState()), 50.0), servers, 5.0) is None


def test_servers_of_several_replicas_are_named_with_theirs() -> None:
    def placed(standing: Standing, replica: int) -> Standing:
        place = ServerPlace(stages=standing.place.stages, replica=replica, replicas=2)
        return dataclasses.replace(standing, place=place)

    first, second = placed(waiting(0, backward_from(1)), 1), placed(waiting(1, forward_from(0)), 1)
    circle = find(first, second)
    assert circle is not None
    assert circle.message.startswith(
        "Stage 0 of replica 1 and stage 1 of replica 1 have waited for each other for 61.0 s"
    )
    slow = find(placed(computing(0, still_seconds=80.0), 0), second)
    assert slow is not None
    assert slow.message.startswith("Stage 0 of replica 0 (server s0 at 10.0.0.0:7000)")


def test_servers_of_several_shards_are_named_with_theirs() -> None:
    def placed(standing: Standing, shard: int) -> Standing:
        place = ServerPlace(stages=standing.place.stages, shard=shard, shards=2)
        return dataclasses.replace(standing, place=place)

    circle = find(placed(waiting(0, backward_from(1)), 1), placed(waiting(1, forward_from(0)), 1))
    assert circle is not None
    assert circle.message.startswith("Stage 0 (shard 1) and stage 1 (shard 1) have waited for each other for 61.0 s")
