"""What tensor-parallel servers of a stage exchange in the middle of an action: each waits until it has the result.

Leaves to others: what is exchanged (`operators.py`), the rounds of it (`exchange/collectives.py`) or torch's own
collectives in their place (`gradwire_stage.torch_transport`), and whole tensors of the model (`whole.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.exchange.collectives import Group, Steps, direct_all_gather, direct_all_reduce
from gradwire_stage.exchange.driver import Members, run_to_end
from gradwire_stage.keys import Key
from gradwire_stage.timeline import Timeline

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState

T = TypeVar("T")

# Of the name of an exchange, in a message's `value`; rounds and what stands before it take the rest.
_NAME_BYTES = 400


class Shards(Protocol):
    """The servers that run the same segments, each with its part of the split tensors, as one of them sees them.

    All of them make the same calls in the same order. A name is unique in a pass; nobody writes to a tensor that was
    handed in, and what comes back is new, or read-only.
    """

    @property
    def own(self) -> int:
        """This one's place, from 0."""

    @property
    def size(self) -> int: ...

    def all_reduce(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of what all have, of the same bits everywhere. Of any strides."""

    def all_gather(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return what all have, in their order. Of any type and strides."""


class TensorGroup:
    """The own group, for one pass of a micro-batch through a segment, or one step's end. For the compute thread.

    While it waits the timeline is in WAIT_EXCHANGE, otherwise in the phase that it is called in.
    """

    def __init__(self, run: RunState, timeline: Timeline[Any], *, entry: int, micro_batch: int, about: str) -> None:
        """about: tells the pass from all others of the entry and micro-batch."""
        self.own = run.places.shard
        self.size = run.places.shards
        self._run = run
        self._timeline = timeline
        self._entry = entry
        self._micro_batch = micro_batch
        self._about = about

    def all_reduce(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        transport = self._run.shard_transport
        if transport is not None:
            return self.run(name, lambda _: transport.all_reduce(tensor))
        return self.run(name, lambda group: direct_all_reduce(group, tensor.detach()))

    def all_gather(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        transport = self._run.shard_transport
        if transport is not None:
            return self.run(name, lambda _: transport.all_gather(tensor))
        return self.run(name, lambda group: direct_all_gather(group, tensor.detach(), "a"))

    def run(self, name: str, collective: Callable[[Group], Steps[T]]) -> T:
        """Run a collective, under a name that no other of the pass has."""
        members = shard_members(self._run, self._entry, self._micro_batch, f"{self._about}/{short_name(name)}")
        return run_to_end(self._run, self._timeline, members, collective(members))


def shard_members(run: RunState, entry: int, micro_batch: int, name: str) -> Members:
    """Return the servers of the own group. name: of the collective, which no other of the micro-batch has."""

    def key(shard: int, step: str) -> Key:
        return Key(entry, micro_batch, f"{name}/{step}", pb.DIRECTION_GROUP, run.first_stage, source_member=shard)

    return Members(run.peers, run.places.shard, run.places.group_servers, key)


class LoneGroup:
    """One server that stands for so many: what the others would have is made up, of the right shape and type.

    For measuring what the nodes of a segment cost.
    """

    own = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def all_reduce(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    def all_gather(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.detach()] * self.size


def short_name(name: str) -> str:
    """Return a name, or where it is too long for a message's key something short that stands for it."""
    encoded = name.encode()
    if len(encoded) <= _NAME_BYTES:
        return name
    return f"{encoded[: _NAME_BYTES // 2].decode(errors='ignore')}…{hashlib.sha256(encoded).hexdigest()}"
