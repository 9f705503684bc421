"""Which messages a server takes from whom, in a run of two replicas with two stages each, perhaps of several shards."""

from __future__ import annotations

import pytest

from gradwire_protocol.errors import FrameError
from gradwire_protocol.v1 import stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.arrivals import BETWEEN_REPLICAS, CLIENT, Arrivals, key_of
from gradwire_stage.keys import Key
from gradwire_stage.places import Places

# Ids need not be numbered from 0.
FIRST, SECOND = 2, 5


def arrivals(stage: int = 1, replica: int = SECOND, *, shard: int = 0, shards: int = 1) -> Arrivals:
    """What this stage's server of this replica takes; the first stage sends it a value, and has its gradient back."""
    peers = [
        stage_pb2.Peer(
            server=f"{place}-of-{each}" + (f"-{part}" if part else ""), stages=[place], replica=each, shard=part
        )
        for each in (FIRST, SECOND)
        for place in (0, 1)
        for part in range(shards)
    ]
    own = next(peer for peer in peers if (peer.replica, list(peer.stages), peer.shard) == (replica, [stage], shard))
    segment = stage_pb2.Segment(stage=stage)
    if stage == 1:
        segment.incoming.add(value="h", producer_stage=0)
    else:
        segment.incoming.add(value="x", from_batch=True)
    request = stage_pb2.PrepareRequest(server=own.server, stages=2, peers=peers, segments=[segment])
    return Arrivals(request, Places(request, own))


def between(direction: pb.Direction, stage: int, replica: int) -> Key:
    return Key(3, 0, "", direction, stage, source_member=replica)


def test_the_senders_replica_is_part_of_the_key() -> None:
    key = pb.MessageKey(entry=3, value="0", direction=pb.DIRECTION_REDUCE, source_stage=1, source_member=FIRST)
    found = key_of(pb.TensorHeader(key=key))
    assert found == Key(3, 0, "0", pb.DIRECTION_REDUCE, 1, source_member=FIRST)
    assert found != found._replace(source_member=SECOND)
    assert found.to_proto().source_member == FIRST


@pytest.mark.parametrize("direction", sorted(BETWEEN_REPLICAS))
def test_what_goes_between_replicas_is_from_the_server_that_the_key_names(direction: pb.Direction) -> None:
    found = arrivals()
    key = between(direction, 1, FIRST)
    found.check(key)
    assert found.sender(key) == f"1-of-{FIRST}"
    # A stream of its own: it holds up no activation.
    assert found.stream(key) == (f"1-of-{FIRST}", True)


@pytest.mark.parametrize("direction", sorted(BETWEEN_REPLICAS))
def test_replicas_that_are_not_there_are_refused(direction: pb.Direction) -> None:
    for replica in (0, 1, SECOND + 1):
        with pytest.raises(FrameError, match="not come from a replica of this run"):
            arrivals().check(between(direction, 1, replica))


@pytest.mark.parametrize("stage", [0, 1])
def test_weights_and_norms_may_be_of_any_stage_and_replica(stage: int) -> None:
    for replica in (FIRST, SECOND):
        for direction in (pb.DIRECTION_WEIGHT, pb.DIRECTION_NORM):
            arrivals().check(between(direction, stage, replica))


@pytest.mark.parametrize(("stage", "replica"), [(0, FIRST), (0, SECOND), (1, SECOND)])
def test_gradients_are_exchanged_with_the_same_stages_of_other_replicas_only(stage: int, replica: int) -> None:
    with pytest.raises(FrameError, match="same stages of other replicas") as caught:
        arrivals().check(between(pb.DIRECTION_REDUCE, stage, replica))
    assert caught.value.expected == f"stages [1] of another replica than {SECOND}"


@pytest.mark.parametrize("direction", [pb.DIRECTION_REDUCE, pb.DIRECTION_NORM, pb.DIRECTION_WEIGHT])
def test_stages_that_are_not_there_are_refused_for_any_replica(direction: pb.Direction) -> None:
    for replica in (FIRST, SECOND):
        with pytest.raises(FrameError, match="not come from a stage of this run"):
            arrivals().check(between(direction, 2, replica))


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        (1, Key(3, 0, "h", pb.DIRECTION_FORWARD, 0)),
        (1, Key(3, 0, "w", pb.DIRECTION_TIED, 0)),
        (1, Key(3, 0, "w", pb.DIRECTION_MOVED, 0)),
        (0, Key(3, 0, "x", pb.DIRECTION_BATCH, 0)),
        (0, Key(0, 0, "w", pb.DIRECTION_STATE, 0, "exp_avg")),
    ],
)
def test_all_else_stays_in_its_replica(stage: int, key: Key) -> None:
    found = arrivals(stage)
    found.check(key)
    from_client = key.direction in (pb.DIRECTION_BATCH, pb.DIRECTION_STATE)
    assert found.sender(key) == (CLIENT if from_client else f"0-of-{SECOND}")
    for replica in (FIRST, SECOND):
        with pytest.raises(FrameError, match="Only what goes between replicas or shards names one"):
            found.check(key._replace(source_member=replica))


@pytest.mark.parametrize("stage", [0, 1])
def test_shards_take_parts_from_the_others_of_their_own_stage(stage: int) -> None:
    found = arrivals(stage, shard=1, shards=3)
    for shard, server in ((0, f"{stage}-of-{SECOND}"), (2, f"{stage}-of-{SECOND}-2")):
        key = between(pb.DIRECTION_GROUP, stage, shard)
        found.check(key)
        assert found.sender(key) == server
        # On a stream with nothing else, and no bulk: computing waits for it.
        assert found.stream(key) == (server, False)
    for wrong in (
        between(pb.DIRECTION_GROUP, stage, 1),
        between(pb.DIRECTION_GROUP, stage, 3),
        between(pb.DIRECTION_GROUP, 1 - stage, 0),
    ):
        with pytest.raises(FrameError, match="other shards of their own stages"):
            found.check(wrong)


def test_a_lone_shard_gets_no_parts() -> None:
    with pytest.raises(FrameError, match="other shards"):
        arrivals().check(between(pb.DIRECTION_GROUP, 1, 0))


def test_all_else_stays_among_the_servers_of_a_shard() -> None:
    found = arrivals(1, shard=1, shards=2)
    assert found.sender(Key(3, 0, "h", pb.DIRECTION_FORWARD, 0)) == f"0-of-{SECOND}-1"
    for direction in (pb.DIRECTION_REDUCE, pb.DIRECTION_NORM, pb.DIRECTION_WEIGHT):
        key = between(direction, 1, FIRST)
        found.check(key)
        assert found.sender(key) == f"1-of-{FIRST}-1"
