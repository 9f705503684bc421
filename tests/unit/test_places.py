"""Who is who in a run: replicas, stages and shards, as one of the servers sees them."""

from __future__ import annotations

import itertools

import pytest

from gradwire_protocol.v1 import stage_pb2
from gradwire_stage.places import Places


def name(replica: int, stage: int, shard: int) -> str:
    return f"r{replica}s{stage}t{shard}"


def places(replica: int, stage: int, shard: int, *, shards: int = 2, zero: bool = False) -> Places:
    grid = list(itertools.product((3, 4), (0, 1), range(shards)))
    peers = [
        stage_pb2.Peer(server=name(*place), replica=place[0], stages=[place[1]], shard=place[2])
        for place in reversed(grid)
    ]
    request = stage_pb2.PrepareRequest(peers=peers, stages=2, shard_optimizer=zero)
    return Places(request, peers[len(peers) - 1 - grid.index((replica, stage, shard))])


@pytest.mark.parametrize("shard", [0, 1])
def test_what_pipelines_and_replicas_exchange_stays_in_a_shard(shard: int) -> None:
    found = places(4, 1, shard)
    assert found.servers == ((0, name(4, 0, shard)), (1, name(4, 1, shard)))
    assert found.server_of_stage == {stage: name(4, stage, shard) for stage in (0, 1)}
    assert found.replica_servers == {replica: name(replica, 1, shard) for replica in (3, 4)}
    assert list(found.replica_servers) == [3, 4]
    assert found.holders([0, 1]) == found.servers
    assert found.last_server == name(4, 1, shard)
    assert sorted(found.weight_readers) == sorted(
        name(replica, stage, shard) for replica in (3, 4) for stage in (0, 1) if (replica, stage) != (4, 1)
    )
    assert found.norm_servers == [(4, stage, name(4, stage, shard)) for stage in (0, 1)]
    assert len(places(4, 1, shard, zero=True).norm_servers) == 4
    assert found.server_at == {(replica, stage): name(replica, stage, shard) for replica in (3, 4) for stage in (0, 1)}


def test_a_group_has_the_servers_of_the_same_stages_and_replica() -> None:
    found = places(4, 1, 2, shards=3)
    assert found.shards == 3
    assert list(found.group_servers.items()) == [(shard, name(4, 1, shard)) for shard in range(3)]
    assert len(found.everyone_else) == 11
    assert found.first_stages[name(3, 1, 0)] == 1


def test_one_server_answers_for_all_that_have_its_stages() -> None:
    for stage in (0, 1):
        grid = [(replica, shard, places(replica, stage, shard)) for replica in (3, 4) for shard in (0, 1)]
        assert [(replica, shard) for replica, shard, found in grid if found.leads] == [(3, 0), (3, 1)]
        assert [(replica, shard) for replica, shard, found in grid if found.speaks] == [(3, 0), (4, 0)]
        assert [(replica, shard) for replica, shard, found in grid if found.answers] == [(3, 0)]


def test_a_run_without_shards_has_groups_of_one() -> None:
    found = places(3, 0, 0, shards=1)
    assert found.shards == 1
    assert found.group_servers == {0: name(3, 0, 0)}
    assert found.speaks
