"""What autograd keeps from a forward to its backward, in bytes: each piece of memory once, however many groups keep it.

The model's own tensors do not count: they are there anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from gradwire_stage.segment import Value

# A place: the position among a group's incoming values, and behind them its outgoing ones.
Place = int


@dataclass(frozen=True)
class Kept:
    """What one group keeps, by the first place that has the same memory; `inner` has none."""

    inner: int
    by_place: dict[Place, int]
    # For each outgoing value the first place with the same memory; None: it is memory of the model.
    outgoing: tuple[Place | None, ...]


class SavedStorages:
    """Sizes of the pieces of memory that autograd saves, by address."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    def recording(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Return a context in which what is saved is noted."""
        return torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


def kept_of(
    saved: SavedStorages, incoming: Sequence[Value], outgoing: Sequence[Value], tensors: Iterable[torch.Tensor]
) -> Kept:
    """Sort out what a group's forward saved, while all of it is alive."""
    places: dict[int, Place] = {}
    for place, value in enumerate([*incoming, *outgoing]):
        if isinstance(value, torch.Tensor):
            places.setdefault(value.untyped_storage().data_ptr(), place)
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    inner, by_place = 0, {}
    for address, size in saved.sizes.items():
        if address in places and address not in own:
            by_place[places[address]] = size
        elif address not in own:
            inner += size
    return Kept(inner, by_place, tuple(_place(value, places, own) for value in outgoing))


def _place(value: Value, places: dict[int, Place], own: set[int]) -> Place | None:
    if not isinstance(value, torch.Tensor):
        return None
    address = value.untyped_storage().data_ptr()
    return None if address in own else places[address]


class HeldBytes:
    """Adds up what groups keep, in their order.

    Memory goes by the values that have it, not by address: groups that are alike give the same tensors.
    """

    def __init__(self) -> None:
        # Values of the graph -> memory. Numbers are given as values come.
        self._memory: dict[str, int | None] = {}
        self._counted: set[int] = set()
        self._number = 0

    def add(self, incoming: Sequence[str], outgoing: Sequence[str], kept: Kept) -> int:
        """Return the bytes of a group that no group before it keeps."""
        memory = [self._of(name) for name in incoming]
        for place, name in zip(kept.outgoing, outgoing, strict=True):
            memory.append(None if place is None else memory[place] if place < len(memory) else self._new())
            self._memory[name] = memory[-1]
        total = kept.inner
        for place, size in kept.by_place.items():
            number = memory[place]
            if number is not None and number not in self._counted:
                self._counted.add(number)
                total += size
        return total

    def forget(self, names: Iterable[str]) -> None:
        """Let go of values that nobody reads any more."""
        for name in names:
            self._memory.pop(name, None)

    def _of(self, name: str) -> int | None:
        if name not in self._memory:
            self._memory[name] = self._new()
        return self._memory[name]

    def _new(self) -> int:
        self._number += 1
        return self._number
