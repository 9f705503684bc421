"""Takes tensors apart for tensor-parallel servers, and puts them together: along one dimension, section by section."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradwire_protocol.errors import FrameError
from gradwire_protocol.splits import part_ranges, whole_shape
from gradwire_protocol.v1 import graph_pb2


def own_part(whole: torch.Tensor, dimension: int, sections: Sequence[int], *, shards: int, shard: int) -> torch.Tensor:
    """Return one shard's part: a view where there is one section. FrameError unless the sections make up the whole."""
    _check(whole.shape, dimension, sections, shards, whole.shape[dimension] if dimension < whole.dim() else 0)
    pieces = [whole.narrow(dimension, first, end - first) for first, end in part_ranges(sections, shards, shard)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dimension)


def joined(parts: Sequence[torch.Tensor], dimension: int, sections: Sequence[int]) -> torch.Tensor:
    """Return the whole, a new tensor, of the parts of all shards. FrameError unless they fit together."""
    shards, first = len(parts), parts[0]
    size = first.shape[dimension] if dimension < first.dim() else 0
    _check(first.shape, dimension, sections, shards, size * shards)
    for shard, part in enumerate(parts):
        if part.shape != first.shape or part.dtype != first.dtype:
            raise FrameError(
                f"The part of shard {shard} does not fit those of others",
                expected=f"shape {list(first.shape)}, {first.dtype}",
                got=f"shape {list(part.shape)}, {part.dtype}",
            )
    if len(sections) == 1:
        return torch.cat(list(parts), dimension)
    pieces = [torch.split(part, [section // shards for section in sections], dimension) for part in parts]
    return torch.cat([of_shard[number] for number in range(len(sections)) for of_shard in pieces], dimension)


def part_of_tensor(spec: graph_pb2.TensorSpec, whole: torch.Tensor, *, shards: int, shard: int) -> torch.Tensor:
    """Return what one shard holds of a tensor of the model, or of anything else of the whole tensor's shape.

    All of what has another shape, and of a tensor that is not split.
    """
    if not spec.HasField("split") or tuple(whole.shape) != whole_shape(spec):
        return whole
    return own_part(whole, spec.split.dimension, spec.split.sections, shards=shards, shard=shard)


def is_part(spec: graph_pb2.TensorSpec, tensor: torch.Tensor) -> bool:
    """Whether a tensor is one shard's part of what has the shape of a tensor of the model."""
    return spec.HasField("split") and tuple(tensor.shape) == tuple(spec.shape)


def _check(shape: torch.Size, dimension: int, sections: Sequence[int], shards: int, size: int) -> None:
    if dimension >= len(shape) or sum(sections) != size or any(section % shards for section in sections):
        raise FrameError(
            "A tensor cannot be shared so",
            expected=f"dimension {dimension} in sections {list(sections)} for {shards} shards",
            got=f"shape {list(shape)}",
        )
