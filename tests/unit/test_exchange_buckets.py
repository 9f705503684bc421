"""Buckets of gradients: each trained parameter once, in the order in which backwards finish them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st

from gradwire_protocol.v1 import graph_pb2, stage_pb2
from gradwire_stage.exchange.buckets import make_buckets


def segment(stage: int, names: Sequence[str], graph: int = graph_pb2.GRAPH_KIND_TRAIN) -> stage_pb2.Segment:
    uses = [graph_pb2.TensorUse(value=f"value.{name}", tensor=name) for name in names]
    return stage_pb2.Segment(stage=stage, graph=graph, tensors=uses)


def test_the_last_parameter_of_the_last_stage_comes_first() -> None:
    parameters = {name: torch.zeros(10) for name in "abcd"}
    segments = [segment(0, "ab"), segment(2, "cd"), segment(0, "ab", graph_pb2.GRAPH_KIND_EVALUATE)]
    buckets = make_buckets(segments, parameters, maximum_bytes=1000)
    assert [bucket.names for bucket in buckets] == [("d", "c"), ("b", "a")]
    assert [bucket.stages for bucket in buckets] == [{2}, {0}]


def test_what_several_stages_use_is_ready_with_the_first_of_them() -> None:
    parameters = {name: torch.zeros(10) for name in "ab"}
    buckets = make_buckets([segment(0, "a"), segment(3, "ab")], parameters)
    assert [(bucket.names, bucket.stages) for bucket in buckets] == [(("b",), {3}), (("a",), {0, 3})]


def test_what_is_not_trained_or_only_evaluated_is_in_none() -> None:
    segments = [segment(0, ["a", "constant"]), segment(0, ["evaluated"], graph_pb2.GRAPH_KIND_EVALUATE)]
    buckets = make_buckets(segments, {"a": torch.zeros(3), "evaluated": torch.zeros(3)})
    assert [bucket.names for bucket in buckets] == [("a",)]


def test_what_shards_have_parts_of_is_apart_from_what_all_of_them_have() -> None:
    """So that a codec makes the same of the latter on all shards."""
    parameters = {name: torch.zeros(10) for name in "abcd"}
    buckets = make_buckets([segment(0, "abcd")], parameters, split={"b", "c"})
    assert [bucket.names for bucket in buckets] == [("d",), ("c", "b"), ("a",)]


def test_some_are_alone_wherever_they_stand() -> None:
    parameters = {name: torch.zeros(10) for name in "abcdef"}
    buckets = make_buckets([segment(0, "abcdef")], parameters, alone={"b", "c", "f"})
    assert [bucket.names for bucket in buckets] == [("f",), ("e", "d"), ("c",), ("b",), ("a",)]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 40), st.sampled_from([torch.float32, torch.float64]), st.sets(st.integers(0, 3), min_size=1)
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 200),
)
def test_every_parameter_is_in_one_bucket_within_its_limit(
    described: list[tuple[int, torch.dtype, set[int]]], most: int
) -> None:
    parameters = {f"p{number}": torch.zeros(size, dtype=kind) for number, (size, kind, _) in enumerate(described)}
    segments = [
        segment(stage, [f"p{number}" for number, (_, _, stages) in enumerate(described) if stage in stages])
        for stage in range(4)
    ]
    buckets = make_buckets(segments, parameters, maximum_bytes=most)
    assert sorted(name for bucket in buckets for name in bucket.names) == sorted(parameters)
    for bucket in buckets:
        assert {parameters[name].dtype for name in bucket.names} == {bucket.data_type}
        assert bucket.sizes == [parameters[name].numel() for name in bucket.names]
        assert len(bucket.names) == 1 or sum(parameters[name].nbytes for name in bucket.names) <= most
    lowest = [min(bucket.stages) for bucket in buckets]
    assert lowest == sorted(lowest, reverse=True)
