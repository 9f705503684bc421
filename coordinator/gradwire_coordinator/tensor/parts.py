"""Parts of values: along which dimension a value is split between servers, and what becomes of it under a new shape.

Pure arithmetic. Leaves to others: which operators keep a split (`rules_*.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gradwire_protocol.v1 import graph_pb2

# Stands for the rows of a micro-batch where shapes are compared: no size that a model has is a multiple of it.
_ROWS = 2**61 - 1


@dataclass(frozen=True)
class Part:
    """A value of which each server has a part: along `dim`, an equal share of each section. Sizes are the whole's."""

    dim: int
    sections: tuple[int, ...]

    @property
    def size(self) -> int:
        """Of the whole value along the dimension."""
        return sum(self.sections)

    def at(self, dim: int) -> Part:
        """Return the same split along another dimension."""
        return Part(dim, self.sections)


def sizes_of(spec: graph_pb2.ValueSpec) -> list[int]:
    """Return the sizes of a value for comparing: those that depend on the rows are multiples of a large prime."""
    return [size.fixed + size.per_row * _ROWS for size in spec.shape]


def is_static(size: int) -> bool:
    """Whether a size, as `sizes_of` gives it, is the same for all micro-batches."""
    return size < _ROWS


class UnevenError(Exception):
    """A new shape would need a part of something that does not divide: a size, and what it counts."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def reshaped(part: Part, before: Sequence[int], after: Sequence[int], shards: int) -> Part | None:
    """Return the split of a value with another shape of the same elements in the same order; None if it has none.

    UnevenError where a dimension that the split one is taken apart into would have to be divided, and cannot be.
    """
    for own, made in _groups(before, after):
        if part.dim in own:
            return _in_group(part, [before[dim] for dim in own], own.index(part.dim), made, after, shards)
    return None


def _in_group(
    part: Part, sizes: Sequence[int], place: int, made: Sequence[int], after: Sequence[int], shards: int
) -> Part | None:
    outer, inner = math.prod(sizes[:place]), math.prod(sizes[place + 1 :])
    if not is_static(outer * part.size * inner):
        return None
    sections = [size * inner for size in part.sections] * outer
    uneven = 0
    for position, dim in enumerate(made):
        outer = math.prod(after[other] for other in made[:position])
        inner = math.prod(after[other] for other in made[position + 1 :])
        if len(sections) % outer or any(size % inner for size in sections):
            continue
        scaled = [size // inner for size in sections]
        own = scaled[: len(scaled) // outer]
        if own * outer != scaled or sum(own) != after[dim]:
            continue
        if all(size % shards == 0 for size in own):
            return Part(dim, tuple(own))
        uneven = uneven or after[dim]
    if uneven:
        raise UnevenError(uneven)
    return None


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return which dimensions become which: the shortest runs of both shapes that have as many elements."""
    found: list[tuple[list[int], list[int]]] = []
    first, second = 0, 0
    while first < len(before) or second < len(after):
        # A dimension of one element comes and goes by itself.
        if first < len(before) and before[first] == 1:
            found.append(([first], []))
            first += 1
            continue
        if second < len(after) and after[second] == 1:
            found.append(([], [second]))
            second += 1
            continue
        own: list[int] = []
        made: list[int] = []
        left, right = 1, 1
        while not own or left != right:
            if left <= right and first < len(before):
                left *= before[first]
                own.append(first)
                first += 1
            elif second < len(after):
                right *= after[second]
                made.append(second)
                second += 1
            else:
                return found
        found.append((own, made))
    return found


def pieces(part: Part, sizes: Sequence[int]) -> list[Part] | None:
    """Return the split of each piece of a value that is cut up along its split dimension; None within a section."""
    found, rest = [], list(part.sections)
    for size in sizes:
        own: list[int] = []
        while rest and sum(own) < size:
            own.append(rest.pop(0))
        if sum(own) != size or not own:
            return None
        found.append(Part(part.dim, tuple(own)))
    return found
