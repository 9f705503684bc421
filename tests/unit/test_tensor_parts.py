"""Where parts of values lie: reshaping and cutting up a part gives the same as taking the part afterwards."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gradwire_coordinator.tensor.parts import Part, UnevenError, pieces, reshaped
from gradwire_protocol.splits import part_ranges, whole_shape, whole_spec
from gradwire_protocol.v1 import graph_pb2

SHARDS = 2


def take(whole: np.ndarray, part: Part, shard: int, shards: int = SHARDS) -> np.ndarray:
    """The part of one server."""
    ranges = part_ranges(part.sections, shards, shard)
    return np.concatenate([whole.take(range(first, end), part.dim) for first, end in ranges], part.dim)


@st.composite
def factored(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of as many elements, of which one joins dimensions of the other."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=5))
    joins = draw(st.lists(st.booleans(), min_size=len(sizes) - 1, max_size=len(sizes) - 1))
    joined = [sizes[0]]
    for size, joins_last in zip(sizes[1:], joins, strict=True):
        if joins_last:
            joined[-1] *= size
        else:
            joined.append(size)
    return (sizes, joined) if draw(st.booleans()) else (joined, sizes)


@given(factored(), st.data())
def test_a_part_that_keeps_its_split_under_a_new_shape_is_the_part_of_the_reshaped_whole(
    shapes: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    before, after = shapes
    dims = [dim for dim, size in enumerate(before) if size % SHARDS == 0]
    assume(dims)
    dim = data.draw(st.sampled_from(dims))
    counts = [count for count in range(1, before[dim] + 1) if before[dim] % (count * SHARDS) == 0]
    count = data.draw(st.sampled_from(counts))
    part = Part(dim, (before[dim] // count,) * count)
    uneven, made = 0, None
    try:
        made = reshaped(part, before, after, SHARDS)
    except UnevenError as error:
        uneven = error.size
    assert uneven % SHARDS or count > 1 or not uneven
    if made is None:
        return
    whole = np.arange(math.prod(before)).reshape(before)
    local = [*after]
    local[made.dim] //= SHARDS
    for shard in range(SHARDS):
        expected = take(whole.reshape(after), made, shard)
        assert take(whole, part, shard).reshape(local).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("part", "before", "after", "expected"),
    [
        # Outputs of one projection to heads, and back.
        (Part(2, (32,)), [2, 8, 32], [2, 8, 4, 8], Part(2, (4,))),
        (Part(2, (4,)), [2, 8, 4, 8], [2, 8, 32], Part(2, (32,))),
        # Fused of three: heads are behind the dimension of three.
        (Part(2, (32, 32, 32)), [2, 8, 96], [2, 8, 3, 4, 8], Part(3, (4,))),
        (Part(3, (4,)), [2, 8, 3, 4, 8], [2, 8, 96], Part(2, (32, 32, 32))),
        # Other dimensions do as they like.
        (Part(2, (32,)), [2, 8, 32], [16, 32], Part(1, (32,))),
        # Keys that are repeated for several heads each.
        (Part(1, (2,)), [2, 2, 3, 8, 4], [2, 6, 8, 4], Part(1, (6,))),
        # A part cannot go into a dimension that has whole rows of others in it.
        (Part(1, (4,)), [3, 4, 5], [3, 20], Part(1, (20,))),
    ],
)
def test_splits_follow_views(part: Part, before: list[int], after: list[int], expected: Part) -> None:
    assert reshaped(part, before, after, SHARDS) == expected


def test_heads_that_do_not_divide_are_named() -> None:
    with pytest.raises(UnevenError) as caught:
        reshaped(Part(2, (12,)), [2, 8, 12], [2, 8, 3, 4], SHARDS)
    assert caught.value.size == 3


def test_rows_of_a_micro_batch_do_not_join_what_is_split() -> None:
    rows = 2**61 - 1
    assert reshaped(Part(1, (4,)), [rows, 4], [4 * rows], SHARDS) is None


def test_pieces_are_whole_sections() -> None:
    part = Part(1, (4, 4, 8))
    assert pieces(part, [4, 4, 8]) == [Part(1, (4,)), Part(1, (4,)), Part(1, (8,))]
    assert pieces(part, [8, 8]) == [Part(1, (4, 4)), Part(1, (8,))]
    assert pieces(part, [6, 10]) is None
    assert pieces(Part(0, (8,)), [4, 4]) is None


def test_the_parts_of_all_servers_are_the_whole() -> None:
    ranges = [part_ranges((6, 4), 2, shard) for shard in range(2)]
    assert ranges == [[(0, 3), (6, 8)], [(3, 6), (8, 10)]]


def test_a_part_knows_its_whole() -> None:
    spec = graph_pb2.TensorSpec(name="w", shape=[5, 3], split=graph_pb2.TensorSplit(dimension=0, sections=[6, 4]))
    assert whole_shape(spec) == (10, 3)
    assert list(whole_spec(spec).shape) == [10, 3]
    assert not whole_spec(spec).HasField("split")
    assert whole_shape(graph_pb2.TensorSpec(shape=[5, 3])) == (5, 3)
