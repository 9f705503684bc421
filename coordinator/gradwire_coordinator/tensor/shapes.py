"""Rules of operators that give a value another shape: views, and the size of a dimension."""

from __future__ import annotations

from collections.abc import Sequence

from gradwire_coordinator.tensor.calls import (
    integers_of,
    of_integer,
    of_integers,
    of_value,
    set_argument,
)
from gradwire_coordinator.tensor.known_values import Place
from gradwire_coordinator.tensor.operands import dim_of, split_operand
from gradwire_coordinator.tensor.parts import Part, UnevenError, reshaped, sizes_of
from gradwire_coordinator.tensor.rewriter import NotKeptError, Rewriter, Rule
from gradwire_protocol.errors import PlanError
from gradwire_protocol.v1 import graph_pb2


def view(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """Split what becomes of the split dimension; literal sizes of it become local ones."""
    part, before = split_operand(rewriter, node)
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
    part, before = split_operand(rewriter, node)
    return rewriter.keep(node, _reshaped(rewriter, node, part, before))


def unflatten(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """As a view, whose sizes are those of one dimension only."""
    part, before = split_operand(rewriter, node)
    dim = dim_of(node, 1, "dim", len(before))
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
    part, before = split_operand(rewriter, node)
    made = part.at(part.dim + len(node.output.shape) - len(before))
    _localise(rewriter, node, 1, made)
    return rewriter.keep(node, made)


def transpose(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    part, sizes = split_operand(rewriter, node)
    first, second = dim_of(node, 1, "dim0", len(sizes)), dim_of(node, 2, "dim1", len(sizes))
    return rewriter.keep(node, part.at({first: second, second: first}.get(part.dim, part.dim)))


def last_two(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """Exchange the last two dimensions, where there are two."""
    part, sizes = split_operand(rewriter, node)
    count = len(sizes)
    exchanged = {count - 1: count - 2, count - 2: count - 1} if count > 1 else {}
    return rewriter.keep(node, part.at(exchanged.get(part.dim, part.dim)))


def permute(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    part, sizes = split_operand(rewriter, node)
    order = integers_of(node, 1, "dims")
    if order is None:
        raise NotKeptError
    return rewriter.keep(node, part.at([dim % len(sizes) for dim in order].index(part.dim)))


def movedim(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """Follow the split dimension to where it is moved, or to where that leaves it."""
    part, sizes = split_operand(rewriter, node)
    count = len(sizes)
    given, wanted = integers_of(node, 1, "source"), integers_of(node, 2, "destination")
    if given is None or wanted is None:
        raise NotKeptError
    moved = {to % count: source % count for source, to in zip(given, wanted, strict=True)}
    rest = iter(dim for dim in range(count) if dim not in moved.values())
    order = [moved[dim] if dim in moved else next(rest) for dim in range(count)]
    return rewriter.keep(node, part.at(order.index(part.dim)))


def unsqueeze(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    part, sizes = split_operand(rewriter, node)
    dim = dim_of(node, 1, "dim", len(sizes) + 1)
    return rewriter.keep(node, part.at(part.dim + (dim <= part.dim)))


def squeeze(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """Dimensions that go are named: of the split one a server may have one element, too."""
    part, sizes = split_operand(rewriter, node)
    dims = integers_of(node, 1, "dim")
    named = range(len(sizes)) if dims is None else [dim % len(sizes) for dim in dims]
    gone = [dim for dim in named if sizes[dim] == 1]
    made = rewriter.beside(
        node.name, "aten.squeeze.dims", [of_value(node.arguments[0].value), of_integers(gone)], node.output
    )
    return rewriter.keep(made, part.at(part.dim - sum(dim < part.dim for dim in gone)))


def size(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """The size of a dimension: of the split one, as much more as there are servers."""
    part, sizes = split_operand(rewriter, node)
    if dim_of(node, 1, "dim", len(sizes)) != part.dim:
        return rewriter.keep(node, None)
    local = rewriter.make(f"{node.name}.local", node.target, list(node.arguments), node.output, None)
    rewriter.make(node.name, "python.mul", [of_value(local), of_integer(rewriter.shards)], node.output, None)
    return None


RULES: dict[str, Rule] = {
    **dict.fromkeys(("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default"), view),
    "aten.flatten.using_ints": flatten,
    "aten.unflatten.int": unflatten,
    **dict.fromkeys(("aten.expand.default", "aten.broadcast_to.default"), expand),
    **dict.fromkeys(("aten.transpose.int", "aten.swapaxes.default", "aten.swapdims.default"), transpose),
    **dict.fromkeys(("aten.t.default", "aten.mT.default", "aten.adjoint.default"), last_two),
    "aten.permute.default": permute,
    **dict.fromkeys(
        ("aten.movedim.int", "aten.movedim.intlist", "aten.moveaxis.int", "aten.moveaxis.intlist"), movedim
    ),
    "aten.unsqueeze.default": unsqueeze,
    **dict.fromkeys(("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims"), squeeze),
    "aten.sym_size.int": size,
}
