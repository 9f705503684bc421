"""Collectives among the members of a group, as generators: the ring all-reduce, its two halves, and what else there is.

Rings send least, round after round. Where somebody waits for the result, rounds are what counts: the direct ones take
one or two, in which all send to all.

A generator sends what it can without waiting, and yields which message it needs next; whoever runs it hands that
message in when it is there (`driver.py`). So several of them make progress side by side on one thread, between two
actions of a stage. In place of a message it may need something that goes on by itself. Leaves to others: where messages
travel, and codecs (`reducers.py`).

Members are ids, in ascending order; nothing depends on what numbers they are. What a generator yields and sends is
named by a round, which is unique within a collective; two collectives of one group that run at the same time must have
different names. Nobody writes to a tensor that was sent, and received ones are read-only.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from gradwire_protocol.errors import FrameError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Receive:
    """A message that a collective waits for: the one that `member` sends under this round."""

    member: int
    round: str


class Pending(Protocol):
    """Something that a collective has begun and that goes on by itself, until `result` is there."""

    @property
    def result(self) -> torch.Tensor: ...

    def is_done(self) -> bool:
        """Whether it has ended. Raises what it has failed with."""

    def wait(self) -> None:
        """Wait until it has, or until the run ends. Raises why."""


# A collective in progress: yields what it needs, is sent the tensor, returns its result.
Steps = Generator[Receive | Pending, torch.Tensor, T]


class Group(Protocol):
    """The members of a collective, as one of them sees them."""

    @property
    def own(self) -> int: ...

    @property
    def members(self) -> Sequence[int]:
        """All of them, ascending; `own` is one."""

    def send(self, member: int, name: str, tensor: torch.Tensor) -> None:
        """Send to another member, named by the round. Does not wait; nobody may write to the tensor afterwards."""


class Ring:
    """The neighbours of a group's member, who sends to the next and receives from the one before."""

    def __init__(self, group: Group) -> None:
        members = tuple(group.members)
        self.size = len(members)
        self.place = members.index(group.own)
        self.before = members[self.place - 1]
        self.next = members[(self.place + 1) % self.size]

    def passing(self, hop: int) -> int:
        """Return the place whose part is sent on at a hop: its own first, then what came at the hop before."""
        return (self.place - hop) % self.size


def all_reduce(group: Group, flat: torch.Tensor, name: str = "") -> Steps[torch.Tensor]:
    """Return the sum over the members, a new tensor of the same bits everywhere; 2 (n − 1) / n of its bytes are sent.

    A ring (Patarasuk and Yuan, 2009): parts travel round and are added up, then the sums travel round. flat: 1-d, of
    the same size and type at every member.
    """
    ring = Ring(group)
    if ring.size == 1:
        return flat.clone()
    total = torch.empty_like(flat)
    parts, totals = flat.tensor_split(ring.size), total.tensor_split(ring.size)
    own = yield from _reduce_parts(group, ring, parts, name)
    totals[(ring.place + 1) % ring.size].copy_(own)
    for hop in range(ring.size - 1):
        group.send(ring.next, f"{name}g{hop}", own)
        place = ring.passing(hop)
        own = yield Receive(ring.before, f"{name}g{hop}")
        totals[place].copy_(_fitting(own, parts[place], ring.before))
    return total


def reduce_scatter(group: Group, parts: Sequence[torch.Tensor], name: str = "") -> Steps[torch.Tensor]:
    """Return the sum over the members of one part: of the one at the own place. parts: by place, 1-d, of any sizes."""
    ring = Ring(group)
    if ring.size == 1:
        return parts[0].clone()
    # The ring ends one place behind the own one.
    turned = [parts[(place - 1) % ring.size] for place in range(ring.size)]
    total = yield from _reduce_parts(group, ring, turned, name)
    return total


def _reduce_parts(group: Group, ring: Ring, parts: Sequence[torch.Tensor], name: str) -> Steps[torch.Tensor]:
    """Add one part up here, the one of the place behind the own one; return it."""
    partial = parts[ring.place]
    for hop in range(ring.size - 1):
        group.send(ring.next, f"{name}s{hop}", partial)
        place = ring.passing(hop + 1)
        received = yield Receive(ring.before, f"{name}s{hop}")
        fitting = _fitting(received, parts[place], ring.before)
        # Into memory of its own, the last one too: it goes on its way, and the result is the caller's to write to.
        partial = fitting + parts[place]
    return partial


def all_gather(group: Group, tensor: torch.Tensor, name: str = "") -> Steps[list[torch.Tensor]]:
    """Return the tensors of all members, by place. They may differ in shape."""
    ring = Ring(group)
    found = [tensor] * ring.size
    for hop in range(ring.size - 1):
        group.send(ring.next, f"{name}a{hop}", tensor)
        tensor = yield Receive(ring.before, f"{name}a{hop}")
        found[ring.passing(hop + 1)] = tensor
    return found


def all_gather_along(group: Group, tensor: torch.Tensor, dim: int, name: str = "") -> Steps[torch.Tensor]:
    """Return the members' tensors joined along a dimension, by place."""
    found = yield from all_gather(group, tensor, name)
    return torch.cat(found, dim)


def direct_all_reduce(group: Group, tensor: torch.Tensor, name: str = "") -> Steps[torch.Tensor]:
    """Return the sum over the members, a new tensor of the same bits everywhere, added up in their order.

    Two members swap all of it in one round. More of them add up a part each and then swap the sums: two rounds, in
    which 2 (n − 1) / n of the bytes are sent. tensor: of the same shape and type at every member.
    """
    size = len(group.members)
    if size == 1:
        return tensor.clone()
    if size == 2:
        return _in_order(group, (yield from direct_all_gather(group, tensor, f"{name}w")), tensor)
    place = list(group.members).index(group.own)
    parts = tensor.reshape(-1).tensor_split(size)
    for member, part in zip(group.members, parts, strict=True):
        if member != group.own:
            group.send(member, f"{name}s", part)
    found = []
    for member in group.members:
        found.append(parts[place] if member == group.own else (yield Receive(member, f"{name}s")))
    sums = yield from direct_all_gather(group, _in_order(group, found, parts[place]), f"{name}g")
    for member, total, part in zip(group.members, sums, parts, strict=True):
        _fitting(total, part, member)
    return torch.cat(sums).view(tensor.shape)


def direct_all_gather(group: Group, tensor: torch.Tensor, name: str = "") -> Steps[list[torch.Tensor]]:
    """Return the tensors of all members, by place, in one round. They may differ in shape."""
    for member in group.members:
        if member != group.own:
            group.send(member, name, tensor)
    found = []
    for member in group.members:
        found.append(tensor if member == group.own else (yield Receive(member, name)))
    return found


def gather_when_asked(
    group: Group, tensor: torch.Tensor, root: int, name: str = ""
) -> Steps[list[torch.Tensor] | None]:
    """Return, at the root, the tensors of all members, by place; None elsewhere.

    Each sends when the root asks: however many there are of these, one lies at the root at a time.
    """
    if group.own != root:
        yield Receive(root, f"{name}q")
        group.send(root, f"{name}d", tensor)
        return None
    found = []
    for member in group.members:
        if member != root:
            group.send(member, f"{name}q", torch.zeros((), dtype=torch.uint8, device=tensor.device))
            found.append((yield Receive(member, f"{name}d")))
        else:
            found.append(tensor)
    return found


def broadcast(group: Group, tensor: torch.Tensor | None, root: int, name: str = "") -> Steps[torch.Tensor]:
    """Return the root's tensor, which goes from member to member. tensor: the root's; None elsewhere."""
    ring = Ring(group)
    if group.own == root:
        if tensor is None:
            raise FrameError("The root of a broadcast has nothing to send", expected="a tensor", got="None")
        received = tensor
    else:
        received = yield Receive(ring.before, f"{name}b")
    if ring.next != root:
        group.send(ring.next, f"{name}b", received)
    return received


def scatter(group: Group, tensor: torch.Tensor | None, root: int, dim: int, name: str = "") -> Steps[torch.Tensor]:
    """Return the own part of the root's tensor, split along a dimension (`torch.tensor_split`) by places."""
    members = group.members
    if group.own != root:
        received = yield Receive(root, f"{name}c")
        return received
    if tensor is None:
        raise FrameError("The root of a scatter has nothing to send", expected="a tensor", got="None")
    own = tensor
    for member, part in zip(members, tensor.tensor_split(len(members), dim), strict=True):
        if member == root:
            own = part
        else:
            group.send(member, f"{name}c", part.contiguous())
    return own


def gather(group: Group, tensor: torch.Tensor, root: int, dim: int, name: str = "") -> Steps[torch.Tensor | None]:
    """Return, at the root, the members' tensors joined along a dimension, by place; None elsewhere."""
    if group.own != root:
        group.send(root, f"{name}d", tensor)
        return None
    found = []
    for member in group.members:
        found.append(tensor if member == root else (yield Receive(member, f"{name}d")))
    return torch.cat(found, dim)


def barrier(group: Group, name: str = "") -> Steps[None]:
    """Return when every member has come here."""
    yield from all_gather(group, torch.zeros((), dtype=torch.uint8), f"{name}barrier-")


def _in_order(group: Group, parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Add up what the members have sent, at least two of them, by place."""
    for member, part in zip(group.members, parts, strict=True):
        _fitting(part, like, member)
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total


def _fitting(received: torch.Tensor, part: torch.Tensor, member: int) -> torch.Tensor:
    """Return what was received; FrameError unless it is a part like the own one."""
    if received.shape != part.shape or received.dtype != part.dtype:
        raise FrameError(
            f"A part of a sum that member {member} sent does not fit",
            expected=f"shape {list(part.shape)}, {part.dtype}",
            got=f"shape {list(received.shape)}, {received.dtype}",
        )
    return received
