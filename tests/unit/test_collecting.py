"""How errors name the servers of a run."""

from __future__ import annotations

from gradwire.collecting import peer_name
from gradwire_protocol.v1 import coordinator_pb2


def test_a_server_is_named_with_its_replica_where_there_are_several() -> None:
    first = coordinator_pb2.ServerLayout(server="a", address="10.0.0.1:70", stages=[0, 2])
    second = coordinator_pb2.ServerLayout(server="b", address="10.0.0.2:70", stages=[0, 2], replica=1)
    alone = coordinator_pb2.CreateRunReply(servers=[first])
    both = coordinator_pb2.CreateRunReply(servers=[first, second])
    assert peer_name(first, alone) == "stages 0, 2 on a at 10.0.0.1:70"
    assert peer_name(first, both) == "stages 0, 2 of replica 0 on a at 10.0.0.1:70"
    assert peer_name(second, both) == "stages 0, 2 of replica 1 on b at 10.0.0.2:70"


def test_a_server_is_named_with_its_shard_where_there_are_several() -> None:
    first = coordinator_pb2.ServerLayout(server="a", address="10.0.0.1:70", stages=[1])
    second = coordinator_pb2.ServerLayout(server="b", address="10.0.0.2:70", stages=[1], shard=1)
    layout = coordinator_pb2.CreateRunReply(servers=[first, second])
    assert peer_name(first, layout) == "stage 1 (shard 0) on a at 10.0.0.1:70"
    assert peer_name(second, layout) == "stage 1 (shard 1) on b at 10.0.0.2:70"
