"""Makes up the values that nodes are measured on: legal ones, in the shapes and types that the graph tells.

Numbers are of the size that a model's have, for arithmetic on vanishing ones is slow, and indices are spread over what
they may point to, for the cost of a table's gradient depends on that. Leaves running to `profiling_runs.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from gradwire_protocol.frames import ELEMENT_BYTES
from gradwire_protocol.group_operators import CROSS_ENTROPY, EMBEDDING
from gradwire_protocol.torch_tensors import TORCH_TYPES
from gradwire_protocol.v1 import graph_pb2 as pb

# So many random numbers are drawn; larger tensors repeat them, which is as fast as memory.
_DRAWN = 1 << 16
# Operators whose result has the elements of their first argument: an index stays one.
_REARRANGING = frozenset(
    f"aten.{name}"
    for name in (
        *("view.default", "_unsafe_view.default", "reshape.default", "flatten.using_ints", "unflatten.int"),
        *("squeeze.default", "squeeze.dim", "squeeze.dims", "unsqueeze.default", "transpose.int", "t.default"),
        *("permute.default", "expand.default", "slice.Tensor", "select.int", "narrow.default", "alias.default"),
        *("detach.default", "contiguous.default", "clone.default", "to.dtype", "_to_copy.default", "ravel.default"),
    )
)
# Operators that take indices: (what is indexed, in which dimension, the indices), by positions of arguments.
_LOOKUPS = {
    "aten.embedding.default": (0, 0, 1),
    "aten.embedding_bag.default": (0, 0, 1),
    "aten.embedding_bag.padding_idx": (0, 0, 1),
    "aten.cross_entropy_loss.default": (0, 1, 1),
    "aten.nll_loss.default": (0, 1, 1),
    "aten.nll_loss_nd.default": (0, 1, 1),
    "aten.nll_loss2d.default": (0, 1, 1),
    # Of the own part: what other servers have is not here to be looked up.
    EMBEDDING: (0, 0, 1),
    CROSS_ENTROPY: (0, 1, 1),
}
# The same, with the dimension as argument 1.
_GATHERS = frozenset({"aten.gather.default", "aten.index_select.default"})


class Maker:
    """Makes values on a device, always the same ones."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)

    def tensor(self, spec: pb.TensorSpec) -> torch.Tensor:
        """Make a tensor of the model. Weights keep the size of what they are multiplied with; all else is ones."""
        dtype, shape = TORCH_TYPES[spec.data_type], list(spec.shape)
        floating = dtype.is_floating_point or dtype.is_complex
        if floating and len(shape) > 1:
            made = self._spread(shape, dtype, 1 / math.sqrt(max(1, math.prod(shape[1:]))))
        elif floating or dtype == torch.bool:
            made = torch.ones(shape, dtype=dtype, device=self._device)
        else:
            # Tables of positions and the like: what points anywhere can point to the first.
            made = torch.zeros(shape, dtype=dtype, device=self._device)
        if spec.kind == pb.TENSOR_KIND_PARAMETER:
            return nn.Parameter(made, requires_grad=spec.requires_grad)
        return made

    def value(self, spec: pb.ValueSpec, rows: int, bound: int | None = None) -> torch.Tensor:
        """Make a tensor that travels; bound: integers are indices below this. Unbounded ones are ones, as in masks."""
        dtype, shape = TORCH_TYPES[spec.data_type], sizes(spec, rows)
        if dtype.is_floating_point or dtype.is_complex:
            return self._spread(shape, dtype, 1.0)
        if bound is None or dtype == torch.bool:
            return torch.ones(shape, dtype=dtype, device=self._device)
        return torch.randint(max(1, bound), shape, generator=self._generator, device=self._device).to(dtype)

    def _spread(self, shape: Sequence[int], dtype: torch.dtype, scale: float) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype, device=self._device)
        count = made.numel()
        size = max(1, min(count, _DRAWN))
        drawn = torch.randn(size, generator=self._generator, device=self._device).mul_(scale).to(dtype)
        flat, whole = made.view(-1), count - count % size
        flat[:whole].view(-1, size).copy_(drawn)
        flat[whole:].copy_(drawn[: count - whole])
        return made


def sizes(spec: pb.ValueSpec, rows: int) -> list[int]:
    """Return the shape of a tensor, for a micro-batch of so many rows."""
    return [max(0, size.fixed + size.per_row * rows) for size in spec.shape]


def size_bytes(spec: pb.ValueSpec, rows: int) -> int:
    """Return the size of a value; nothing for what is no tensor."""
    if spec.kind != pb.VALUE_KIND_TENSOR:
        return 0
    return math.prod(sizes(spec, rows)) * ELEMENT_BYTES.get(spec.data_type, 8)


def index_bounds(graph: pb.Graph, tensors: Mapping[str, pb.TensorSpec], rows: int) -> dict[str, int]:
    """Return for each input that is used as an index, perhaps rearranged before, below what it must be."""
    shapes = {use.value: list(tensors[use.tensor].shape) for use in graph.tensors}
    shapes |= {item.value: sizes(item.spec, rows) for item in graph.inputs}
    input_of = {item.value: item.value for item in graph.inputs}
    bounds: dict[str, int] = {}
    for node in graph.nodes:
        shapes[node.name] = sizes(node.output, rows)
        for indexed, dimension, index in _lookups(node):
            given, shape = input_of.get(index), shapes.get(indexed, [])
            # Classes of a single sample stand in its only dimension.
            dimension = min(dimension, len(shape) - 1)
            if given is not None and shape:
                bounds[given] = min(bounds.get(given, shape[dimension]), shape[dimension])
        if node.target in _REARRANGING and node.arguments and node.arguments[0].value in input_of:
            input_of[node.name] = input_of[node.arguments[0].value]
    return bounds


def _lookups(node: pb.Node) -> Iterator[tuple[str, int, str]]:
    """Yield what a node indexes, in which dimension, and by which value."""
    arguments = node.arguments
    if node.target in _LOOKUPS and len(arguments) > 1:
        indexed, dimension, index = _LOOKUPS[node.target]
        yield arguments[indexed].value, dimension, arguments[index].value
    elif node.target in _GATHERS and len(arguments) > 2:
        yield arguments[0].value, arguments[1].integer, arguments[2].value
    elif node.target == "aten.index.Tensor" and len(arguments) > 1:
        for dimension, item in enumerate(arguments[1].list.items):
            yield arguments[0].value, dimension, item.value
