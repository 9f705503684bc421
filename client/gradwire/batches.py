"""Batches: how a loader gives them, and the one rule by which they are split into micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

from gradwire_protocol.dealing import deal
from gradwire_protocol.errors import BatchError, DataError
from gradwire_protocol.v1 import run_pb2

# The arguments of one call: in order, or by keyword.
Batch = tuple[Any, ...] | dict[str, Any]
_SHOWN = 8


def split_sizes(rows: int, parts: int, exactly: int | None = None) -> list[int]:
    """Return the sizes that `torch.tensor_split` gives, without empty parts.

    They differ by one at most, larger ones first; fewer than `parts` where there are fewer rows. exactly: the size that
    each must have, so that there are as many as that makes.
    """
    if rows < 1:
        raise BatchError("A batch has no rows", expected="1 row or more in dimension 0", got=str(rows))
    if exactly is not None:
        return _equal_sizes(rows, parts, exactly)
    parts = min(parts, rows)
    size, larger = divmod(rows, parts)
    return [size + 1] * larger + [size] * (parts - larger)


def _equal_sizes(rows: int, parts: int, exactly: int) -> list[int]:
    if rows % exactly or rows > parts * exactly:
        sizes = [str(exactly * count) for count in range(1, parts + 1)]
        shown = sizes if len(sizes) <= _SHOWN else [*sizes[:2], "…", sizes[-1]]
        raise BatchError(
            f"The rows of a batch do not make micro-batches of exactly {exactly}",
            expected=f"{' or '.join(shown)} rows: micro_batch_rows={exactly}, in at most {parts} micro-batches",
            got=f"{rows} rows",
            remedy="leave out a last batch that is smaller (drop_last=True of a DataLoader)",
        )
    return [exactly] * (rows // exactly)


def micro_batches(
    rows: int, parts: int, exactly: int | None = None, shares: Sequence[float] = (1.0,)
) -> list[run_pb2.MicroBatch]:
    """Return the micro-batches of a batch. exactly: the rows that each must have. shares: of them, by replica."""
    result: list[run_pb2.MicroBatch] = []
    first_row = 0
    sizes = split_sizes(rows, parts, exactly)
    for index, (size, replica) in enumerate(zip(sizes, deal(len(sizes), shares), strict=True)):
        result.append(run_pb2.MicroBatch(index=index, replica=replica, first_row=first_row, rows=size))
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
