from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradwire.batches import as_arguments, batches_of, length_of, micro_batches, split_sizes
from gradwire_protocol.errors import BatchError, DataError


@given(rows=st.integers(1, 200), parts=st.integers(1, 64))
def test_sizes_are_those_of_tensor_split_without_empty_parts(rows: int, parts: int) -> None:
    expected = [len(part) for part in torch.zeros(rows).tensor_split(parts) if len(part)]
    assert split_sizes(rows, parts) == expected


def test_no_rows_are_refused() -> None:
    with pytest.raises(BatchError):
        split_sizes(0, 4)


def test_exact_sizes() -> None:
    assert split_sizes(12, 4, exactly=3) == [3, 3, 3, 3]
    assert split_sizes(3, 4, exactly=3) == [3]
    assert [(part.index, part.first_row, part.rows) for part in micro_batches(6, 4, exactly=3)] == [
        (0, 0, 3),
        (1, 3, 3),
    ]
    for rows in (1, 7, 15):
        with pytest.raises(BatchError, match=rf"3 or 6 or 9 or 12 rows.*Got: {rows} rows"):
            split_sizes(rows, 4, exactly=3)
    with pytest.raises(BatchError, match="3 or 6 or … or 60 rows"):
        split_sizes(4, 20, exactly=3)


def test_micro_batches_follow_each_other() -> None:
    parts = micro_batches(7, 3)
    assert [(part.index, part.first_row, part.rows) for part in parts] == [(0, 0, 3), (1, 3, 2), (2, 5, 2)]


def test_a_loaders_batch_becomes_arguments() -> None:
    x = torch.zeros(2)
    assert as_arguments({"x": x}) == {"x": x}
    assert as_arguments([x, x]) == (x, x)
    assert as_arguments(x) == (x,)


def test_without_steps_a_loader_is_gone_through_once() -> None:
    assert list(batches_of([1, 2, 3], None)) == [1, 2, 3]


def test_with_steps_a_loader_begins_anew() -> None:
    assert list(batches_of([1, 2, 3], 7)) == [1, 2, 3, 1, 2, 3, 1]


def test_an_iterator_is_taken_from_without_losing_a_batch() -> None:
    numbers = iter(range(10))
    assert list(batches_of(numbers, 3)) == [0, 1, 2]
    assert list(batches_of(numbers, 2)) == [3, 4]


def test_a_loader_that_runs_dry_is_an_error_that_says_so() -> None:
    with pytest.raises(DataError, match="3, then an empty pass"):
        list(batches_of(iter([1, 2, 3]), 5))


def test_a_loader_must_be_iterable() -> None:
    with pytest.raises(BatchError, match="not iterable"):
        list(batches_of(5, None))  # type: ignore[arg-type]


def test_length_is_known_or_not() -> None:
    assert length_of([1, 2]) == 2
    assert length_of(iter([1, 2])) is None


def test_micro_batches_are_dealt_out_to_replicas() -> None:
    assert [part.replica for part in micro_batches(7, 5, shares=[0.5, 0.5])] == [0, 1, 0, 1, 0]
    assert [part.replica for part in micro_batches(8, 4, exactly=2, shares=[0.25, 0.75])] == [1, 0, 1, 1]
    # A last batch with fewer rows than replicas.
    assert [(part.index, part.replica) for part in micro_batches(1, 8, shares=[1 / 3] * 3)] == [(0, 0)]
