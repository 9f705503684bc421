"""Checks what a request to prepare a run says of tensor-parallel servers: who they are, and how they share tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from gradwire_protocol.errors import FrameError
from gradwire_protocol.frames import MAXIMUM_DIMENSIONS
from gradwire_protocol.transports import TRANSPORTS
from gradwire_protocol.v1 import graph_pb2, stage_pb2

MAXIMUM_SHARDS = 1024


def check_shards(request: stage_pb2.PrepareRequest, own: stage_pb2.Peer) -> int:
    """Check who shares the stages; return how many servers of each replica do."""
    workers = [peer for peer in request.peers if not peer.parameter_server]
    shards = sorted({peer.shard for peer in workers})
    if shards != list(range(len(shards))) or len(shards) > MAXIMUM_SHARDS:
        raise FrameError(
            "Wrong numbers of shards", expected=f"from 0, without gaps, {MAXIMUM_SHARDS} at most", got=str(shards[:20])
        )
    for replica, shard in itertools.product(sorted({peer.replica for peer in workers}), shards):
        where = f"replica {replica}" if len(shards) == 1 else f"shard {shard} of replica {replica}"
        servers = [list(peer.stages) for peer in workers if (peer.replica, peer.shard) == (replica, shard)]
        hosted = sorted(itertools.chain.from_iterable(servers))
        if hosted != list(range(request.stages)):
            raise FrameError(
                f"The servers of {where} do not host each stage once",
                expected=f"0 to {request.stages - 1}",
                got=str(hosted),
            )
        # What a server exchanges with the other replicas and shards is of the same stages.
        if not own.parameter_server and list(own.stages) not in servers:
            raise FrameError(
                f"{where.capitalize()} has no server like this one",
                expected=f"a server with the stages {list(own.stages)}",
                got=str(servers),
            )
    if len(shards) > 1 and any(peer.parameter_server for peer in request.peers):
        raise FrameError("Tensor-parallel servers cannot use parameter servers", expected="one of both", got="both")
    if (len(shards) > 1 or len({peer.replica for peer in workers}) > 1) and request.transport not in TRANSPORTS:
        raise FrameError(
            "Wrong transport of the sums of shards and replicas",
            expected=" or ".join(TRANSPORTS),
            got=repr(request.transport[:64]),
        )
    return len(shards)


def check_split(spec: graph_pb2.TensorSpec, shards: int) -> None:
    """Refuse a way to share a tensor that is none."""
    if not spec.HasField("split"):
        return
    dimension, sections = spec.split.dimension, list(spec.split.sections)
    if (
        shards < 2
        or dimension >= len(spec.shape)
        or not sections
        or any(size < 1 or size % shards for size in sections)
        or sum(sections) != spec.shape[dimension] * shards
    ):
        raise FrameError(
            f"Tensor {spec.name!r} cannot be shared so",
            expected=f"one of {len(spec.shape)} dimensions, in sections that are multiples of the {shards} shards, "
            "which make up the whole",
            got=f"dimension {dimension} in sections {sections[:20]}, parts of shape {list(spec.shape)}",
        )


def check_spread(
    name: str, values: Sequence[stage_pb2.IncomingValue] | Sequence[stage_pb2.OutgoingValue], shards: int
) -> None:
    """Refuse values of a segment that cannot travel in parts."""
    for value in values:
        if value.HasField("spread_dimension") and (
            shards < 2
            or value.spread_dimension >= MAXIMUM_DIMENSIONS
            or (isinstance(value, stage_pb2.IncomingValue) and value.from_batch)
        ):
            raise FrameError(
                f"{name} has a wrong dimension that {value.value!r} travels in parts of",
                expected=f"below {MAXIMUM_DIMENSIONS}, between stages of several shards",
                got=f"dimension {value.spread_dimension}, {shards} shards",
            )
