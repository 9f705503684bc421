"""Rules of operators that take values apart, or put them together."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradwire_coordinator.tensor.calls import (
    integer_of,
    integers_of,
    of_integer,
    of_integers,
    of_value,
    set_argument,
)
from gradwire_coordinator.tensor.known_values import Place
from gradwire_coordinator.tensor.operands import dim_of, split_operand
from gradwire_coordinator.tensor.parts import Part, is_static, pieces
from gradwire_coordinator.tensor.rewriter import NotKeptError, Rewriter, Rule
from gradwire_protocol.v1 import graph_pb2


def slice_(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    part, sizes = split_operand(rewriter, node)
    dim = dim_of(node, 1, "dim", len(sizes), 0)
    if dim != part.dim:
        return rewriter.keep(node, part)
    start, end = integer_of(node, 2, "start", 0), integer_of(node, 3, "end", part.size)
    if start is None or end is None or integer_of(node, 4, "step", 1) != 1:
        raise NotKeptError
    first, last = (min(max(at + part.size if at < 0 else at, 0), part.size) for at in (start, end))
    if (first, last) == (0, part.size):
        return rewriter.keep(node, part)
    return _range(rewriter, node, part, first, last, (2, 3))


def narrow(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    part, sizes = split_operand(rewriter, node)
    dim = dim_of(node, 1, "dim", len(sizes))
    if dim != part.dim:
        return rewriter.keep(node, part)
    raise NotKeptError


def _range(
    rewriter: Rewriter, node: graph_pb2.Node, part: Part, first: int, last: int, positions: tuple[int, int]
) -> Place:
    """Take whole sections."""
    found = pieces(part, [size for size in (first, last - first, part.size - last) if size])
    if found is None or last <= first:
        raise NotKeptError
    own = found[1] if first else found[0]
    for position, name, at in zip(positions, ("start", "end"), (first, last), strict=True):
        set_argument(node, position, name, of_integer(at // rewriter.shards))
    return rewriter.keep(node, own)


def select(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    part, sizes = split_operand(rewriter, node)
    dim = dim_of(node, 1, "dim", len(sizes))
    if dim == part.dim:
        raise NotKeptError
    return rewriter.keep(node, part.at(part.dim - (dim < part.dim)))


def unbind(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    part, sizes = split_operand(rewriter, node)
    dim = dim_of(node, 1, "dim", len(sizes), 0)
    if dim == part.dim or not is_static(sizes[dim]):
        raise NotKeptError
    return rewriter.keep(node, (part.at(part.dim - (dim < part.dim)),) * sizes[dim])


def cut_up(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """split, chunk and their kin: along another dimension each piece keeps the split; along the same, sections part."""
    part, sizes = split_operand(rewriter, node)
    dim = dim_of(node, 2, "dim", len(sizes), 0)
    whole = sizes[dim]
    cut = _piece_sizes(node, whole)
    if dim != part.dim:
        return rewriter.keep(node, (part,) * len(cut))
    found = pieces(part, cut)
    if found is None:
        raise NotKeptError
    local = [size // rewriter.shards for size in cut]
    made = rewriter.beside(
        node.name,
        "aten.split_with_sizes.default",
        [of_value(node.arguments[0].value), of_integers(local), of_integer(dim)],
        node.output,
    )
    return rewriter.keep(made, tuple(found))


def _piece_sizes(node: graph_pb2.Node, whole: int) -> list[int]:
    if not is_static(whole):
        raise NotKeptError
    name = node.target.split(".")[1].removeprefix("unsafe_")
    given = integers_of(node, 1, "split_size_or_sections")
    if given is None:
        raise NotKeptError
    if name == "split_with_sizes" or node.target == "aten.split.sizes":
        return given
    size = given[0] if name == "split" else -(-whole // given[0])
    return [min(size, whole - first) for first in range(0, whole, size)]


def getitem(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """One of a tuple's values."""
    place = rewriter.place(node.arguments[0].value)
    if not isinstance(place, tuple):
        raise NotKeptError
    return rewriter.keep(node, place[node.arguments[1].integer])


def join(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """cat: along another dimension all need the same split; along the same one after the other."""
    values = [item.value for item in node.arguments[0].list.items]
    # Tensors of no elements, which older code joins, count for nothing.
    filled = [value for value in values if math.prod(rewriter.sizes(value))]
    dimensions = len(node.output.shape)
    dim = dim_of(node, 1, "dim", dimensions, 0)
    found = [rewriter.part_of(value) for value in filled]
    if all(part is not None and part.dim == dim for part in found):
        return rewriter.keep(node, Part(dim, tuple(size for part in found if part for size in part.sections)))
    return _of_equal_parts(rewriter, node, filled, dim)


def _of_equal_parts(rewriter: Rewriter, node: graph_pb2.Node, filled: Sequence[str], dim: int | None) -> Place:
    found = {part for value in filled if (part := rewriter.part_of(value)) is not None}
    if len(found) != 1:
        raise NotKeptError
    (part,) = found
    if part.dim == dim:
        raise NotKeptError
    for item in node.arguments[0].list.items:
        if item.value in filled:
            item.value = rewriter.part(item.value, part)
    return rewriter.keep(node, part)


def stack(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    values = [item.value for item in node.arguments[0].list.items]
    dim = dim_of(node, 1, "dim", len(node.output.shape), 0)
    found = {rewriter.part_of(value) for value in values}
    part = next(iter(found))
    if len(found) != 1 or part is None:
        raise NotKeptError
    return rewriter.keep(node, part.at(part.dim + (dim <= part.dim)))


def glu(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """The first half times the other's gate: along the split dimension, where both halves are shared alike."""
    part, sizes = split_operand(rewriter, node)
    if dim_of(node, 1, "dim", len(sizes), -1) != part.dim:
        return rewriter.keep(node, part)
    halves = pieces(part, [part.size // 2] * 2)
    if halves is None or halves[0] != halves[1]:
        raise NotKeptError
    return rewriter.keep(node, halves[0])


RULES: dict[str, Rule] = {
    "aten.slice.Tensor": slice_,
    "aten.narrow.default": narrow,
    "aten.select.int": select,
    "aten.unbind.int": unbind,
    **dict.fromkeys(
        (
            *("aten.split.Tensor", "aten.split.sizes", "aten.split_with_sizes.default", "aten.chunk.default"),
            *("aten.unsafe_split.Tensor", "aten.unsafe_split_with_sizes.default", "aten.unsafe_chunk.default"),
        ),
        cut_up,
    ),
    "aten.glu.default": glu,
    "python.getitem": getitem,
    **dict.fromkeys(("aten.cat.default", "aten.concat.default", "aten.concatenate.default"), join),
    "aten.stack.default": stack,
}
