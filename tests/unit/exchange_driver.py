"""Runs the collectives of several members in one process, in any order of progress, and checks what they send."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from gradwire_protocol.gradient_codecs import parse_compression
from gradwire_stage.exchange.collectives import Group, Pending, Receive, Steps
from gradwire_stage.exchange.reducers import Reducer, make_reducer

T = TypeVar("T")
# Ids of so many members.
MEMBERS = {1: (3,), 2: (0, 1), 3: (0, 4, 5), 4: (0, 1, 2, 3), 5: (1, 2, 3, 5, 8)}


@dataclass
class Wire:
    """All messages of one collective: by sender, receiver and round, with a copy that tells whether one was changed."""

    sent: dict[tuple[int, int, str], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    taken: set[tuple[int, int, str]] = field(default_factory=set)

    def check(self) -> None:
        """Fail if a message was written to after it had been sent, or sent for nothing."""
        assert self.taken == set(self.sent), "some messages were sent for nothing"
        for key, (tensor, copy) in self.sent.items():
            assert same_bits(tensor, copy), f"{key} was written to after it had been sent"

    def bytes_of(self, member: int) -> int:
        """Return the bytes that a member has sent."""
        return sum(tensor.nbytes for (sender, _, _), (tensor, _) in self.sent.items() if sender == member)


@dataclass
class MemoryGroup:
    """A group's member whose messages go over a `Wire`."""

    own: int
    members: tuple[int, ...]
    wire: Wire

    def send(self, member: int, name: str, tensor: torch.Tensor) -> None:
        key = (self.own, member, name)
        assert member in self.members
        assert member != self.own
        assert key not in self.wire.sent, f"{key} was sent twice"
        self.wire.sent[key] = (tensor, tensor.clone())


def run_members(
    start: Callable[[Group], Steps[T]], members: Sequence[int], seed: int | None = None
) -> tuple[list[T], Wire]:
    """Return every member's result, and the wire. seed: of a random order of progress; None: one after the other."""
    wire, order = Wire(), random.Random(seed)
    running = {member: start(MemoryGroup(member, tuple(members), wire)) for member in members}
    needs: dict[int, Receive | Pending | None] = dict.fromkeys(members)
    results: dict[int, T] = {}
    while running:
        able = [member for member in running if _ready(member, needs[member], wire)]
        assert able, f"nobody can go on: {needs}"
        member = able[0] if seed is None else order.choice(able)
        try:
            needs[member] = running[member].send(_take(member, needs[member], wire))  # type: ignore[arg-type]
        except StopIteration as ended:
            results[member] = ended.value
            del running[member]
    wire.check()
    return [results[member] for member in members], wire


class Replicas:
    """Members of a group, each with its reducer of a bucket of tensors of these shapes."""

    def __init__(self, text: str, replicas: int, *shapes: Sequence[int]) -> None:
        self.shapes = [torch.Size(shape) for shape in shapes]
        self.size = sum(shape.numel() for shape in self.shapes)
        self.members = MEMBERS[replicas]
        self.reducers: dict[int, Reducer] = {
            member: make_reducer(parse_compression(text), self.shapes) for member in self.members
        }
        self.step = 0
        self.wire = Wire()

    def reduce(self, gradients: Sequence[torch.Tensor], seed: int | None = None) -> torch.Tensor:
        """Return the sum that all members have got; they have the same bits, and have not touched their gradients."""
        own = dict(zip(self.members, gradients, strict=True))
        copies = [gradient.clone() for gradient in gradients]
        results, self.wire = run_members(
            lambda group: self.reducers[group.own].all_reduce(group, own[group.own], self.step), self.members, seed
        )
        self.step += 1
        for result, gradient, copy in zip(results, gradients, copies, strict=True):
            assert same_bits(result, results[0])
            assert same_bits(gradient, copy)
            assert result.dtype == gradient.dtype
            assert result.shape == gradient.shape
        return results[0]

    def draw(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        return [torch.randn(self.size, generator=generator, dtype=torch.float64).to(dtype) for _ in self.members]

    def forget(self) -> None:
        """Clear what the members keep of gradients."""
        for reducer in self.reducers.values():
            for name, tensor in reducer.state().items():
                if not name.startswith("right"):
                    tensor.zero_()


def exact_sum(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([gradient.double() for gradient in gradients]).sum(dim=0)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are of one type and shape and have the same bytes."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def _ready(member: int, need: Receive | Pending | None, wire: Wire) -> bool:
    return not isinstance(need, Receive) or (need.member, member, need.round) in wire.sent


def _take(member: int, need: Receive | Pending | None, wire: Wire) -> torch.Tensor | None:
    if not isinstance(need, Receive):
        return None
    key = (need.member, member, need.round)
    assert key not in wire.taken, f"{key} was asked for twice"
    wire.taken.add(key)
    return wire.sent[key][0]
