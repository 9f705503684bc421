"""Where the parts of a split tensor lie in the whole one (`TensorSplit`). Pure; knows no tensors."""

from __future__ import annotations

from collections.abc import Sequence

from gradwire_protocol.v1 import graph_pb2


def part_ranges(sections: Sequence[int], shards: int, shard: int) -> list[tuple[int, int]]:
    """Return (first, end) of each section's part along the dimension, for one of so many servers."""
    found, start = [], 0
    for size in sections:
        part = size // shards
        found.append((start + shard * part, start + (shard + 1) * part))
        start += size
    return found


def whole_shape(spec: graph_pb2.TensorSpec) -> tuple[int, ...]:
    """Return the shape of the whole tensor."""
    shape = list(spec.shape)
    if spec.HasField("split"):
        shape[spec.split.dimension] = sum(spec.split.sections)
    return tuple(shape)


def whole_spec(spec: graph_pb2.TensorSpec) -> graph_pb2.TensorSpec:
    """Return the description of the whole tensor, as files and clients have it."""
    made = graph_pb2.TensorSpec()
    made.CopyFrom(spec)
    del made.shape[:]
    made.shape.extend(whole_shape(spec))
    made.ClearField("split")
    return made
