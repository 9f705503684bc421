"""The grid of replicas, stages and shards: who is where, and what each is told."""

from __future__ import annotations

import itertools
from typing import Any

from sharded_samples import WIDTH, blocks_request, known, sharded, units

from gradwire_coordinator.layout import Layout, lay_out
from gradwire_coordinator.planner import PlannedRun, plan_run
from gradwire_protocol.v1 import coordinator_pb2 as pb
from gradwire_protocol.v1 import graph_pb2, run_pb2

GRID = list(itertools.product(range(2), range(2), range(2)))
# Of a micro-batch: two rows.
WHOLE = 4 * 2 * WIDTH


def laid_out(**changes: Any) -> tuple[pb.CreateRunRequest, PlannedRun, Layout]:
    """Two replicas of two stages of two shards."""
    asked = blocks_request(2, **{"replicas": 2, "schedule": "1f1b", "cuts": [4], **changes})
    model = sharded(asked)
    planned = plan_run(asked, model, units(4), known(model, 4))
    return asked, planned, lay_out("r", 1, asked, planned)


def test_servers_are_numbered_by_replica_position_and_shard() -> None:
    _, planned, layout = laid_out()
    names = [f"stage-{number}" for number in range(8)]
    assert [server.server for server in layout.servers] == names
    assert [server.server for server in planned.servers] == names
    assert [(place.replica, *place.stages, place.shard) for place in layout.places] == GRID
    assert [place.name for place in layout.places][5:7] == [
        "stage 0 (shard 1) of replica 1",
        "stage 1 (shard 0) of replica 1",
    ]
    assert [place.leads for place in layout.places] == [(replica, shard) == (0, 0) for replica, _, shard in GRID]
    for request in layout.prepare:
        assert [(peer.server, peer.replica, *peer.stages, peer.shard) for peer in request.peers] == [
            (name, *place) for name, place in zip(names, GRID, strict=True)
        ]
        assert request.transport == "grpc"
        assert request.stages == 2
    assert [request.server for request in layout.prepare] == names
    assert [(server.server, server.replica, *server.stages, server.shard) for server in layout.for_client] == [
        (name, *place) for name, place in zip(names, GRID, strict=True)
    ]
    assert [(each.server, each.replica, *each.stages, each.shard) for each in layout.summary.prediction.servers] == [
        (name, *place) for name, place in zip(names, GRID, strict=True)
    ]


def test_losses_are_counted_from_the_first_shard_of_each_replica() -> None:
    _, _, layout = laid_out()
    assert layout.loss_from == {2: 0, 6: 1}
    assert layout.loss_copies == {3: 0, 7: 1}


def test_all_shards_of_a_stage_do_the_same() -> None:
    _, _, layout = laid_out()
    for first in range(0, 8, 2):
        one, other = layout.prepare[first : first + 2]
        assert one.segments
        assert list(one.segments) == list(other.segments)
        assert list(one.tensors) == list(other.tensors)
        assert list(one.bounds) == list(other.bounds)
    entry = run_pb2.Entry(number=1, train_step=run_pb2.TrainStep(step=1))
    for index in range(4):
        entry.train_step.micro_batches.add(index=index, replica=index % 2, rows=2)
    programs = layout.programs.of_entry(entry)
    assert len(programs) == 8
    assert programs[0::2] == programs[1::2]
    assert len({program.SerializeToString() for program in programs}) == 4
    fetch = run_pb2.Entry(number=2, fetch_state=run_pb2.FetchState())
    assert layout.programs.of_entry(fetch) == [run_pb2.Program()] * 8


def test_servers_hold_parts_and_the_client_delivers_whole_tensors() -> None:
    _, _, layout = laid_out()
    held = {item.spec.name: item.spec for item in layout.prepare[0].tensors}
    assert sorted(held) == ["down0", "scale0", "up0"]
    assert (list(held["up0"].shape), held["up0"].split.dimension) == ([16, 8], 0)
    assert (list(held["down0"].shape), held["down0"].split.dimension) == ([8, 16], 1)
    assert not held["scale0"].HasField("split")
    for number, (replica, position, shard) in enumerate(GRID):
        own = layout.for_client[number]
        names = [f"{name}{position}" for name in ("scale", "up", "down")]
        assert list(own.tensors) == names
        assert list(own.owned_tensors) == (names if (replica, shard) == (0, 0) else [])
        read = {use.graph: list(use.values) for use in own.inputs}
        assert read[graph_pb2.GRAPH_KIND_TRAIN] == (["x"] if position == 0 else ["target"])
        assert list(own.results) == (["d1"] if (position, shard) == (1, 0) else [])


def test_whole_values_cross_boundaries_in_parts() -> None:
    _, _, layout = laid_out()
    for number, (_, position, _) in enumerate(GRID):
        for segment in layout.prepare[number].segments:
            crossing = segment.outgoing if position == 0 else [one for one in segment.incoming if not one.from_batch]
            assert [(one.value, one.spread_dimension) for one in crossing] == [("d0", 1)]
        sizes = {(bound.value, bound.message_bytes) for bound in layout.prepare[number].bounds}
        assert sizes == {("d0", WHOLE // 2)}


def test_with_one_shard_nothing_is_said_of_any() -> None:
    asked = blocks_request(2, tensor=1, schedule="1f1b")
    model = sharded(asked)
    planned = plan_run(asked, model, units(2, 1), known(model, 2))
    layout = lay_out("r", 1, asked, planned)
    assert not layout.loss_copies
    assert not layout.summary.HasField("tensor")
    for request in layout.prepare:
        assert not request.transport
        assert not any(one.HasField("spread_dimension") for segment in request.segments for one in segment.incoming)
    assert [place.name for place in layout.places] == ["stage 0", "stage 1"]
