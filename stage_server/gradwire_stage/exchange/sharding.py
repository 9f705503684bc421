"""Who of the replicas updates which part of the parameters, where the optimizer's state is sharded (ZeRO, stage 1).

Gradients are then reduced and scattered, each replica updates its part, and the updated weights are gathered: as many
bytes travel as without it, and the optimizer's state takes 1 / replicas of the memory (Rajbhandari et al., 2020). The
parts are ranges of the buckets' flat tensors; for optimizers that look at whole matrices they are whole parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from gradwire_protocol.errors import OptimizerError
from gradwire_stage.exchange.buckets import Bucket
from gradwire_stage.optimizer import StateValue


@dataclass(frozen=True)
class Range:
    """What a part has of one parameter: elements `first` to `first + size` of it, from `offset` on in the part."""

    name: str
    first: int
    size: int
    offset: int


@dataclass(frozen=True)
class Parts:
    """A bucket, cut into one part for each place. sizes: in elements, by place; ranges: of each."""

    sizes: tuple[int, ...]
    ranges: tuple[tuple[Range, ...], ...]


class Sharding:
    """The parts of all buckets, and the slices of parameters that this replica updates."""

    def __init__(
        self,
        buckets: Sequence[Bucket],
        parameters: Mapping[str, torch.Tensor],
        *,
        places: int,
        own: int,
        whole: bool,
    ) -> None:
        """own: this replica's place. whole: no parameter is cut."""
        shared = [bucket for bucket in buckets if not bucket.tied]
        owners = _owners(shared, places) if whole else {}
        ordered = [
            _by_owner(bucket, owners, places) if whole and not bucket.tied else (bucket, None) for bucket in buckets
        ]
        self.buckets = tuple(bucket for bucket, _ in ordered)
        self.own = own
        # None: of a bucket that everybody updates.
        self.parts = tuple(
            None if bucket.tied else _cut(bucket, sizes or _equal(sum(bucket.sizes), places))
            for bucket, sizes in ordered
        )
        # What this replica updates, over the parameters' memory: by name, and where in the parameter it begins.
        self.slices: dict[str, torch.nn.Parameter] = {}
        self.firsts: dict[str, int] = {}
        for part in self.parts:
            for piece in part.ranges[own] if part is not None else ():
                self.slices[piece.name] = _slice(parameters[piece.name], piece)
                self.firsts[piece.name] = piece.first

        # The parameters of which each replica updates a part only.
        self.names = frozenset(name for bucket in self.buckets if not bucket.tied for name in bucket.names)

    def own_state(self, name: str, parameter: torch.Tensor, value: StateValue) -> StateValue | None:
        """Return what of a value of the optimizer's state goes with the own slice of a parameter; None without one."""
        kept = self.slices.get(name)
        if kept is None or not isinstance(value, torch.Tensor) or value.dim() == 0 or kept.shape == parameter.shape:
            return None if kept is None else value
        if value.shape != parameter.shape:
            raise OptimizerError(
                f"A value of the optimizer's state of {name!r} cannot be shared out to replicas",
                expected=f"shape {list(parameter.shape)}, or a number",
                got=f"shape {list(value.shape)}",
                remedy='use zero="off"',
            )
        first = self.firsts[name]
        return value.reshape(-1)[first : first + kept.numel()].clone()


def _owners(buckets: Iterable[Bucket], places: int) -> dict[str, int]:
    """Give each parameter, the largest first, to the place that has the least."""
    sizes = {name: size for bucket in buckets for name, size in zip(bucket.names, bucket.sizes, strict=True)}
    loads = [0] * places
    owners = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


def _by_owner(bucket: Bucket, owners: Mapping[str, int], places: int) -> tuple[Bucket, tuple[int, ...]]:
    """Return a bucket in the order of its parameters' owners, and how many elements each has."""
    order = sorted(range(len(bucket.names)), key=lambda number: owners[bucket.names[number]])
    sizes = [0] * places
    for name, size in zip(bucket.names, bucket.sizes, strict=True):
        sizes[owners[name]] += size
    names = tuple(bucket.names[number] for number in order)
    shapes = tuple(bucket.shapes[number] for number in order)
    return dataclasses.replace(bucket, names=names, shapes=shapes), tuple(sizes)


def _equal(elements: int, places: int) -> tuple[int, ...]:
    """Return the sizes of `torch.tensor_split`."""
    size, larger = divmod(elements, places)
    return (size + 1,) * larger + (size,) * (places - larger)


def _cut(bucket: Bucket, sizes: tuple[int, ...]) -> Parts:
    ranges = []
    begin = 0
    for size in sizes:
        end, at, own = begin + size, 0, []
        for name, elements in zip(bucket.names, bucket.sizes, strict=True):
            first, last = max(begin, at), min(end, at + elements)
            if first < last:
                own.append(Range(name, first - at, last - first, first - begin))
            at += elements
        ranges.append(tuple(own))
        begin = end
    return Parts(sizes, tuple(ranges))


def _slice(parameter: torch.Tensor, piece: Range) -> torch.nn.Parameter:
    """Return a part of a parameter over its own memory; all of it in its own shape."""
    whole = parameter.detach()
    if piece.size == whole.numel():
        return torch.nn.Parameter(whole)
    return torch.nn.Parameter(whole.view(-1)[piece.first : piece.first + piece.size])
