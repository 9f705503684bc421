"""What names a message within its run."""

from __future__ import annotations

from typing import NamedTuple

from gradwire_protocol.activities import message_words
from gradwire_protocol.v1 import tensors_pb2 as pb

FROM_CLIENT = frozenset({pb.DIRECTION_BATCH, pb.DIRECTION_STATE})


class Key(NamedTuple):
    """A MessageKey without run and generation, which are the same for everything in one mailbox."""

    entry: int
    micro_batch: int
    value: str
    direction: pb.Direction
    source_stage: int
    # Of a value of the optimizer's state for the parameter `value`; otherwise empty.
    state: str = ""
    # Of what replicas or shards send each other: the sender's; otherwise 0.
    source_member: int = 0

    def __str__(self) -> str:
        return message_words(self)

    def to_proto(self, run: str = "", generation: int = 0) -> pb.MessageKey:
        """Return it as it travels in a header, or, of no run, in an activity."""
        return pb.MessageKey(run=run, generation=generation, **self._asdict())


class Source(NamedTuple):
    """What one stage sends under one name, once for each micro-batch."""

    direction: pb.Direction
    source_stage: int
    value: str

    @classmethod
    def of(cls, key: Key) -> Source:
        return cls(key.direction, key.source_stage, key.value)
