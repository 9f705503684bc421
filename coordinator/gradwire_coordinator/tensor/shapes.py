"""Rules of operators that rearrange elements: views, cuts, joins."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradwire_coordinator.tensor.calls import (
    argument,
    integer_of,
    integers_of,
    of_integer,
    of_integers,
    of_value,
    set_argument,
    value_of,
)
from gradwire_coordinator.tensor.parts import Part, UnevenError, is_static, pieces, reshaped, sizes_of
from gradwire_coordinator.tensor.rewriter import NotKeptError, Place, Rewriter, Rule
from gradwire_protocol.errors import PlanError
from gradwire_protocol.v1 import graph_pb2


def _split(rewriter: Rewriter, node: graph_pb2.Node) -> tuple[Part, list[int]]:
    """Return the part and the sizes of a node's first operand."""
    value = value_of(node, 0, "self")
    part = rewriter.part_of(value)
    if part is None:
        raise NotKeptError
    return part, rewriter.sizes(value)


def _dim(node: graph_pb2.Node, position: int, name: str, dimensions: int, default: int | None = None) -> int:
    """Return a dimension that a node names, from 0."""
    found = integer_of(node, position, name, -1 if default is None else default)
    if found is None:
        raise NotKeptError
    return found % dimensions


def view(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """Split what becomes of the split dimension; literal sizes of it become local ones."""
    part, before = _split(rewriter, node)
    made = _reshaped(rewriter, node, part, before)
    _localise(rewriter, node, 1, made)
    return rewriter.keep(node, made)


def _reshaped(rewriter: Rewriter, node: graph_pb2.Node, part: Part, before: Sequence[int]) -> Part:
    try:
        made = reshaped(part, before, sizes_of(node.output), rewriter.shards)
    except UnevenError as error:
        raise PlanError(
            f"{error.size} heads, or what else this dimension counts, cannot be shared by {rewriter.shards} servers",
            expected=f"a multiple of {rewriter.shards}",
            got=str(error.size),
            remedy=f"use a tensor that divides {error.size}, or leave the parameters that it comes from whole",
        ) from error
    if made is None:
        raise NotKeptError
    return made


def _localise(rewriter: Rewriter, node: graph_pb2.Node, position: int, part: Part) -> None:
    """Put the local size in the place of the whole one in a list of sizes."""
    if position >= len(node.arguments) or node.arguments[position].WhichOneof("kind") != "list":
        raise NotKeptError
    items = node.arguments[position].list.items
    # A list of sizes may be shorter than the value, and then is of its last dimensions.
    place = part.dim - (len(node.output.shape) - len(items))
    if place < 0:
        return
    size = items[place]
    if size.WhichOneof("kind") != "integer":
        raise NotKeptError
    if size.integer != -1:
        size.integer = part.size // rewriter.shards


def flatten(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """Split what becomes of the split dimension; no sizes are written out."""
    part, before = _split(rewriter, node)
    return rewriter.keep(node, _reshaped(rewriter, node, part, before))


def unflatten(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """As a view, whose sizes are those of one dimension only."""
    part, before = _split(rewriter, node)
    dim = _dim(node, 1, "dim", len(before))
    sizes = integers_of(node, 2, "sizes")
    if sizes is None:
        raise NotKeptError
    made = _reshaped(rewriter, node, part, before)
    place = made.dim - dim
    if 0 <= place < len(sizes) and sizes[place] != -1:
        sizes[place] = made.size // rewriter.shards
        set_argument(node, 2, "sizes", of_integers(sizes))
    return rewriter.keep(node, made)


def expand(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """Keep the split; new dimensions come in front."""
    part, before = _split(rewriter, node)
    made = part.at(part.dim + len(node.output.shape) - len(before))
    _localise(rewriter, node, 1, made)
    return rewriter.keep(node, made)


def transpose(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    part, sizes = _split(rewriter, node)
    first, second = _dim(node, 1, "dim0", len(sizes)), _dim(node, 2, "dim1", len(sizes))
    return rewriter.keep(node, part.at({first: second, second: first}.get(part.dim, part.dim)))


def last_two(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """Exchange the last two dimensions, where there are two."""
    part, sizes = _split(rewriter, node)
    count = len(sizes)
    exchanged = {count - 1: count - 2, count - 2: count - 1} if count > 1 else {}
    return rewriter.keep(node, part.at(exchanged.get(part.dim, part.dim)))


def permute(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    part, sizes = _split(rewriter, node)
    order = integers_of(node, 1, "dims")
    if order is None:
        raise NotKeptError
    return rewriter.keep(node, part.at([dim % len(sizes) for dim in order].index(part.dim)))


def unsqueeze(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    part, sizes = _split(rewriter, node)
    dim = _dim(node, 1, "dim", len(sizes) + 1)
    return rewriter.keep(node, part.at(part.dim + (dim <= part.dim)))


def squeeze(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """Dimensions that go are named: of the split one a server may have one element, too."""
    part, sizes = _split(rewriter, node)
    dims = integers_of(node, 1, "dim")
    named = range(len(sizes)) if dims is None else [dim % len(sizes) for dim in dims]
    gone = [dim for dim in named if sizes[dim] == 1]
    made = rewriter.beside(
        node.name, "aten.squeeze.dims", [of_value(node.arguments[0].value), of_integers(gone)], node.output
    )
    return rewriter.keep(made, part.at(part.dim - sum(dim < part.dim for dim in gone)))


def slice_(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    part, sizes = _split(rewriter, node)
    dim = _dim(node, 1, "dim", len(sizes), 0)
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
    part, sizes = _split(rewriter, node)
    dim = _dim(node, 1, "dim", len(sizes))
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
    part, sizes = _split(rewriter, node)
    dim = _dim(node, 1, "dim", len(sizes))
    if dim == part.dim:
        raise NotKeptError
    return rewriter.keep(node, part.at(part.dim - (dim < part.dim)))


def unbind(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    part, sizes = _split(rewriter, node)
    dim = _dim(node, 1, "dim", len(sizes), 0)
    if dim == part.dim or not is_static(sizes[dim]):
        raise NotKeptError
    return rewriter.keep(node, (part.at(part.dim - (dim < part.dim)),) * sizes[dim])


def cut_up(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """split, chunk and their kin: along another dimension each piece keeps the split; along the same, sections part."""
    part, sizes = _split(rewriter, node)
    dim = _dim(node, 2, "dim", len(sizes), 0)
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
    dim = _dim(node, 1, "dim", dimensions, 0)
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
    dim = _dim(node, 1, "dim", len(node.output.shape), 0)
    found = {rewriter.part_of(value) for value in values}
    part = next(iter(found))
    if len(found) != 1 or part is None:
        raise NotKeptError
    return rewriter.keep(node, part.at(part.dim + (dim <= part.dim)))


def size(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """The size of a dimension: of the split one, as much more as there are servers."""
    part, sizes = _split(rewriter, node)
    if _dim(node, 1, "dim", len(sizes)) != part.dim:
        return rewriter.keep(node, None)
    local = rewriter.make(f"{node.name}.local", node.target, list(node.arguments), node.output, None)
    rewriter.make(node.name, "python.mul", [of_value(local), of_integer(rewriter.shards)], node.output, None)
    return None


def reduction(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """Over other dimensions each server reduces its part; sums and means over the split one are added up."""
    part, sizes = _split(rewriter, node)
    given = integers_of(node, 1, "dim")
    dims = range(len(sizes)) if not given else sorted(dim % len(sizes) for dim in given)
    kind = node.target.split(".")[1]
    if part.dim not in dims:
        keeps = argument(node, 2, "keepdim")
        gone = 0 if keeps is not None and keeps.boolean else sum(dim < part.dim for dim in dims)
        return rewriter.keep(node, part.at(part.dim - gone))
    rewriter.needs_product()
    if kind == "sum":
        return rewriter.summed(node)
    if kind == "mean":
        share = graph_pb2.Argument(real=1.0 / rewriter.shards)
        output = node.output
        return rewriter.summed(
            node, lambda total, name: rewriter.beside(name, "aten.mul.Scalar", [of_value(total), share], output)
        )
    raise NotKeptError


def normalisation(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """layer_norm and rms_norm: keep a split along a dimension that is not normalised."""
    part, sizes = _split(rewriter, node)
    shape = integers_of(node, 1, "normalized_shape")
    if shape is None or part.dim >= len(sizes) - len(shape):
        raise NotKeptError
    for position, name in ((2, "weight"), (3, "bias")):
        value = value_of(node, position, name)
        if value:
            set_argument(node, position, name, of_value(rewriter.copied(value)))
    return rewriter.keep(node, part)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default"), view),
    "aten.flatten.using_ints": flatten,
    "aten.unflatten.int": unflatten,
    **dict.fromkeys(("aten.expand.default", "aten.broadcast_to.default"), expand),
    **dict.fromkeys(("aten.transpose.int", "aten.swapaxes.default", "aten.swapdims.default"), transpose),
    **dict.fromkeys(("aten.t.default", "aten.mT.default", "aten.adjoint.default"), last_two),
    "aten.permute.default": permute,
    "aten.unsqueeze.default": unsqueeze,
    **dict.fromkeys(("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims"), squeeze),
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
    "python.getitem": getitem,
    **dict.fromkeys(("aten.cat.default", "aten.concat.default", "aten.concatenate.default"), join),
    "aten.stack.default": stack,
    "aten.sym_size.int": size,
    **dict.fromkeys(
        (
            *("aten.sum.default", "aten.sum.dim_IntList", "aten.mean.default", "aten.mean.dim", "aten.amax.default"),
            *("aten.amin.default",),
        ),
        reduction,
    ),
    **dict.fromkeys(("aten.layer_norm.default", "aten.rms_norm.default"), normalisation),
}
