"""Which messages a run can get here, from whom, and how many of them the schedule lets lie untaken.

Worked out once, when a run is prepared. Leaves keeping them to mailbox.py.
"""

from __future__ import annotations

from gradwire_protocol.errors import FrameError
from gradwire_protocol.v1 import stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.keys import FROM_CLIENT, Key, Source
from gradwire_stage.places import Places

CLIENT = "client"
EXCHANGE = frozenset(
    {
        *(pb.DIRECTION_TIED, pb.DIRECTION_NORM, pb.DIRECTION_WEIGHT, pb.DIRECTION_MOVED, pb.DIRECTION_REDUCE),
        pb.DIRECTION_WEIGHTS,
    }
)
# Whose keys name the sender's replica. Those of DIRECTION_GROUP name its shard.
BETWEEN_REPLICAS = frozenset({pb.DIRECTION_WEIGHT, pb.DIRECTION_NORM, pb.DIRECTION_REDUCE})
_BY_MICRO_BATCH = frozenset({pb.DIRECTION_BATCH, pb.DIRECTION_FORWARD, pb.DIRECTION_BACKWARD})


def key_of(header: pb.TensorHeader) -> Key:
    """Return the key of a message within its run."""
    key = header.key
    return Key(key.entry, key.micro_batch, key.value, key.direction, key.source_stage, key.state, key.source_member)


def is_answered(header: pb.TensorHeader) -> bool:
    """Whether a step cannot end without an answer to this message: a wanted gradient, or the next forward."""
    return header.key.direction == pb.DIRECTION_BACKWARD or header.tensor.requires_grad


class Arrivals:
    """The messages of one run that a server can get."""

    def __init__(self, request: stage_pb2.PrepareRequest, places: Places) -> None:
        self._places = places
        self._server_of_stage = places.server_of_stage
        self._replica = places.replica
        # The senders of what goes from one replica to others.
        self._server_of = places.server_at
        self._own_stages = frozenset(
            stage for stage, server in self._server_of_stage.items() if server == request.server
        )
        self._last_stage = request.stages - 1
        self._sources = _sources(request)
        self.bounds = {
            Source(bound.direction, bound.source_stage, bound.value): bound.messages for bound in request.bounds
        }

    def check(self, key: Key) -> None:
        """Refuse what cannot be meant for this server. FrameError."""
        if key.state and key.direction not in (pb.DIRECTION_STATE, pb.DIRECTION_MOVED):
            raise FrameError("Only state has names of the optimizer's values", expected="no state", got=str(key))
        if key.direction not in FROM_CLIENT and (
            key.direction == pb.DIRECTION_RESULT or key.source_stage not in self._server_of_stage
        ):
            raise FrameError(
                "A message does not come from a stage of this run",
                expected=f"stage 0 to {self._last_stage}, and no result",
                got=str(key),
            )
        if key.direction in BETWEEN_REPLICAS:
            self._check_replica(key)
        elif key.direction == pb.DIRECTION_GROUP:
            self._check_shard(key)
        elif key.source_member:
            raise FrameError("Only what goes between replicas or shards names one", expected="number 0", got=str(key))
        if key.direction == pb.DIRECTION_WEIGHTS and key.source_stage <= self._last_stage:
            raise FrameError("Weights come from parameter servers only", got=str(key))
        if key.direction in _BY_MICRO_BATCH and Source.of(key) not in self._sources:
            raise FrameError("No stage here reads such a message", expected="a value of the segments", got=str(key))

    def _check_replica(self, key: Key) -> None:
        if (key.source_member, key.source_stage) not in self._server_of:
            raise FrameError("A message does not come from a replica of this run", got=str(key))
        if self._places.is_parameter_server:
            return
        if key.direction == pb.DIRECTION_REDUCE and (
            key.source_member == self._replica or key.source_stage not in self._own_stages
        ):
            raise FrameError(
                "Gradients are exchanged with the same stages of other replicas",
                expected=f"stages {sorted(self._own_stages)} of another replica than {self._replica}",
                got=str(key),
            )

    def _check_shard(self, key: Key) -> None:
        group = self._places.group_servers
        if (
            key.source_member not in group
            or key.source_member == self._places.shard
            or key.source_stage not in self._own_stages
        ):
            raise FrameError(
                "Tensor-parallel servers exchange something with the other shards of their own stages",
                expected=f"stages {sorted(self._own_stages)} of one of the shards {sorted(group)}, and not of the own",
                got=f"stage {key.source_stage} of shard {key.source_member}",
            )

    def sender(self, key: Key) -> str:
        """Return the server that a message comes from, or CLIENT."""
        if key.direction == pb.DIRECTION_GROUP:
            return self._places.group_servers[key.source_member]
        if key.direction in BETWEEN_REPLICAS:
            return self._server_of[key.source_member, key.source_stage]
        return CLIENT if key.direction in FROM_CLIENT else self._server_of_stage[key.source_stage]

    def stream(self, key: Key) -> tuple[str, bool]:
        """Return what tells the streams apart that messages come on."""
        return self.sender(key), key.direction in EXCHANGE


def _sources(request: stage_pb2.PrepareRequest) -> frozenset[Source]:
    found = set()
    for segment in request.segments:
        for value in segment.incoming:
            if value.from_batch:
                found.add(Source(pb.DIRECTION_BATCH, 0, value.value))
                continue
            found.add(Source(pb.DIRECTION_FORWARD, value.producer_stage, value.value))
            if value.HasField("gradient_from_stage"):
                found.add(Source(pb.DIRECTION_BACKWARD, value.gradient_from_stage, value.value))
        for made in segment.outgoing:
            found.add(Source(pb.DIRECTION_BACKWARD, made.consumer_stages[0], made.value))
    return frozenset(found)
