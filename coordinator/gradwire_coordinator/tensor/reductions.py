"""Rules of operators that reduce or normalise along dimensions."""

from __future__ import annotations

from gradwire_coordinator.tensor.calls import (
    argument,
    integers_of,
    of_value,
    set_argument,
    value_of,
)
from gradwire_coordinator.tensor.known_values import Place
from gradwire_coordinator.tensor.operands import split_operand
from gradwire_coordinator.tensor.rewriter import NotKeptError, Rewriter, Rule
from gradwire_protocol.v1 import graph_pb2


def reduction(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """Over other dimensions each server reduces its part; sums and means over the split one are added up."""
    part, sizes = split_operand(rewriter, node)
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
    part, sizes = split_operand(rewriter, node)
    shape = integers_of(node, 1, "normalized_shape")
    if shape is None or part.dim >= len(sizes) - len(shape):
        raise NotKeptError
    for position, name in ((2, "weight"), (3, "bias")):
        value = value_of(node, position, name)
        if value:
            set_argument(node, position, name, of_value(rewriter.copied(value)))
    return rewriter.keep(node, part)


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            *("aten.sum.default", "aten.sum.dim_IntList", "aten.mean.default", "aten.mean.dim", "aten.amax.default"),
            *("aten.amin.default",),
        ),
        reduction,
    ),
    **dict.fromkeys(("aten.layer_norm.default", "aten.rms_norm.default"), normalisation),
}
