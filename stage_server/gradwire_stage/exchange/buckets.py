"""Which gradients replicas exchange together: buckets, in the order in which a backward finishes them.

Worked out once, when a run is prepared, and the same at all replicas of a server, which hold the same segments.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from gradwire_protocol.v1 import graph_pb2, stage_pb2

# A round of the ring then takes about as long as its latency on a slow link, and a model has many of them.
BUCKET_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Bucket:
    """Parameters of one type, whose gradients travel as one flat tensor in this order."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    data_type: torch.dtype
    # Of this server: the bucket is ready when all of them have done their last backward.
    stages: frozenset[int]
    # Whether other servers of the pipeline hold these, too, and add their gradients.
    tied: bool = False

    @property
    def sizes(self) -> list[int]:
        """Elements of each parameter."""
        return [shape.numel() for shape in self.shapes]


def make_buckets(
    segments: Iterable[stage_pb2.Segment],
    parameters: Mapping[str, torch.Tensor],
    *,
    tied: Collection[str] = (),
    split: Collection[str] = (),
    alone: Collection[str] = (),
    maximum_bytes: int = BUCKET_BYTES,
) -> tuple[Bucket, ...]:
    """Return the buckets of the parameters that the training segments of a server use.

    Backwards go from the last stage to the first and through a segment from its end: so do the buckets. What several
    stages use is ready with the first of them. A parameter of more than `maximum_bytes` has a bucket of its own. Those
    that are `tied` have buckets for themselves, and so have those that are `split` between shards: what a codec makes
    of a bucket depends on all of it, and must be the same on all shards for what all of them have. Each of those that
    are to be `alone` has a bucket of its own.
    """
    trained = [segment for segment in segments if segment.graph == graph_pb2.GRAPH_KIND_TRAIN]
    stages_of: dict[str, set[int]] = {}
    for segment in trained:
        for use in segment.tensors:
            if use.tensor in parameters:
                stages_of.setdefault(use.tensor, set()).add(segment.stage)
    buckets: list[Bucket] = []
    names: list[str] = []
    filled = 0

    def close() -> None:
        nonlocal filled
        if names:
            shapes = tuple(parameters[name].shape for name in names)
            stages = frozenset[int]().union(*(stages_of[name] for name in names))
            buckets.append(Bucket(tuple(names), shapes, parameters[names[0]].dtype, stages, names[0] in tied))
        names.clear()
        filled = 0

    for segment in sorted(trained, key=lambda each: -each.stage):
        own = [use.tensor for use in segment.tensors if min(stages_of.get(use.tensor, {-1})) == segment.stage]
        for name in reversed(list(dict.fromkeys(own))):
            tensor = parameters[name]
            if names and (
                filled + tensor.nbytes > maximum_bytes
                or tensor.dtype != parameters[names[0]].dtype
                or (name in tied, name in split) != (names[0] in tied, names[0] in split)
                or not {name, names[0]}.isdisjoint(alone)
            ):
                close()
            names.append(name)
            filled += tensor.nbytes
        close()
    return tuple(buckets)
