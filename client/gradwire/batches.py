"""Batches: how a loader gives them, and the one rule by which they are split into micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from gradwire_protocol.errors import BatchError, DataError
from gradwire_protocol.v1 import run_pb2

# The arguments of one call: in order, or by keyword.
Batch = tuple[Any, ...] | dict[str, Any]


def split_sizes(rows: int, parts: int) -> list[int]:
    """Return the sizes that `torch.tensor_split` gives, without empty parts.

    They differ by one at most, larger ones first; fewer than `parts` where there are fewer rows.
    """
    if rows < 1:
        raise BatchError("A batch has no rows", expected="1 row or more in dimension 0", got=str(rows))
    parts = min(parts, rows)
    size, larger = divmod(rows, parts)
    return [size + 1] * larger + [size] * (parts - larger)


def micro_batches(rows: int, parts: int) -> list[run_pb2.MicroBatch]:
    """Return the micro-batches of a batch, all for replica 0."""
    result: list[run_pb2.MicroBatch] = []
    first_row = 0
    for index, size in enumerate(split_sizes(rows, parts)):
        result.append(run_pb2.MicroBatch(index=index, replica=0, first_row=first_row, rows=size))
        first_row += size
    return result


def as_arguments(batch: Any) -> Batch:
    """Return a loader's batch as arguments: a dict by keyword, a tuple or list in order, anything else alone."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def batches_of(loader: Iterable[Any], steps: int | None) -> Iterator[Any]:
    """Yield the loader's batches: once, or as many as `steps`, beginning the loader anew when it ends."""
    if not isinstance(loader, Iterable):
        raise BatchError("The loader is not iterable", expected="an iterable of batches", got=repr(type(loader)))
    if steps is None:
        yield from loader
        return
    taken = 0
    while taken < steps:
        before = taken
        for batch in loader:
            yield batch
            taken += 1
            if taken == steps:
                return
        if taken == before:
            raise DataError(
                "The loader has no more batches",
                expected=f"{steps} steps",
                got=f"{taken}, then an empty pass",
                remedy="give a loader that can be iterated over again (not a generator), or fewer steps",
            )


def length_of(loader: Iterable[Any]) -> int | None:
    """Return the number of batches of one pass, if the loader knows it."""
    return len(loader) if isinstance(loader, Sized) else None
