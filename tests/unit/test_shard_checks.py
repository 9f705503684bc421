"""What a request to prepare a run must say of tensor-parallel servers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gradwire_protocol.errors import FrameError
from gradwire_protocol.v1 import graph_pb2, stage_pb2
from gradwire_stage.shard_checks import check_shards, check_split, check_spread


def request(shards: int = 2) -> stage_pb2.PrepareRequest:
    return stage_pb2.PrepareRequest(
        stages=3,
        transport="grpc",
        peers=[
            stage_pb2.Peer(server=f"{replica}{stages}{shard}", replica=replica, stages=stages, shard=shard)
            for replica in (0, 1)
            for stages in ([0, 2], [1])
            for shard in range(shards)
        ],
    )


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_every_stage_of_every_replica_has_all_shards(shards: int) -> None:
    made = request(shards)
    for own in made.peers:
        assert check_shards(made, own) == shards


def test_sums_have_a_transport_where_there_are_any() -> None:
    made = request(1)
    made.transport = ""
    with pytest.raises(FrameError, match="transport of the sums"):
        check_shards(made, made.peers[0])
    del made.peers[2:]
    assert check_shards(made, made.peers[0]) == 1


def _shard(position: int, shard: int) -> Callable[[stage_pb2.PrepareRequest], None]:
    return lambda made: setattr(made.peers[position], "shard", shard)


def _swap_stages(made: stage_pb2.PrepareRequest) -> None:
    """Shard 1 of replica 1 cuts otherwise."""
    made.peers[5].stages[:] = [0]
    made.peers[7].stages[:] = [1, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_shard(1, 3), "numbers of shards"),
        (lambda made: [setattr(peer, "shard", peer.shard + 1) for peer in made.peers], "numbers of shards"),
        (lambda made: made.peers.pop(), "shard 1 of replica 1 do not host each stage once"),
        (_shard(3, 0), "shard 0 of replica 0 do not host each stage once"),
        (_swap_stages, "Shard 1 of replica 1 has no server like this one"),
        (lambda made: setattr(made, "transport", ""), "transport"),
        (lambda made: setattr(made, "transport", "mpi"), "transport"),
        (lambda made: made.peers.add(server="p", stages=[3], parameter_server=True), "parameter servers"),
    ],
)
def test_what_is_no_grid_is_refused(change: Callable[[stage_pb2.PrepareRequest], object], words: str) -> None:
    made = request()
    change(made)
    with pytest.raises(FrameError, match=words):
        check_shards(made, made.peers[0])


def spec(shape: list[int], dimension: int, sections: list[int]) -> graph_pb2.TensorSpec:
    split = graph_pb2.TensorSplit(dimension=dimension, sections=sections)
    return graph_pb2.TensorSpec(name="w", shape=shape, split=split)


def test_a_tensor_is_shared_along_one_dimension() -> None:
    check_split(spec([6, 4], 0, [12]), 2)
    check_split(spec([4, 6], 1, [6, 6]), 2)
    check_split(graph_pb2.TensorSpec(name="w", shape=[3]), 1)


@pytest.mark.parametrize(
    ("wrong", "shards"),
    [
        (spec([6, 4], 2, [12]), 2),
        (spec([6, 4], 0, []), 2),
        (spec([6, 4], 0, [6]), 2),
        (spec([6, 4], 0, [3, 9]), 2),
        (spec([6, 4], 0, [14, -2]), 2),
        (spec([6, 4], 0, [12, 0]), 2),
        (spec([6, 4], 0, [6]), 1),
        (spec([], 0, [2]), 2),
    ],
)
def test_other_ways_to_share_a_tensor_are_refused(wrong: graph_pb2.TensorSpec, shards: int) -> None:
    with pytest.raises(FrameError, match="'w' cannot be shared so"):
        check_split(wrong, shards)


def test_only_what_goes_from_stage_to_stage_travels_in_parts() -> None:
    check_spread("It", [stage_pb2.IncomingValue(value="h", spread_dimension=1)], 2)
    check_spread("It", [stage_pb2.OutgoingValue(value="h"), stage_pb2.OutgoingValue(value="g")], 1)
    for values, shards in (
        ([stage_pb2.IncomingValue(value="h", spread_dimension=1)], 1),
        ([stage_pb2.IncomingValue(value="h", spread_dimension=99)], 2),
        ([stage_pb2.IncomingValue(value="h", from_batch=True, spread_dimension=0)], 2),
    ):
        with pytest.raises(FrameError, match="wrong dimension that 'h' travels in parts of"):
            check_spread("It", values, shards)
    with pytest.raises(FrameError, match="travels in parts"):
        check_spread("It", [stage_pb2.OutgoingValue(value="h", spread_dimension=0)], 1)
