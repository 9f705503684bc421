"""What rules ask of a node first: the part that it works on, and the dimensions that it names."""

from __future__ import annotations

from gradwire_coordinator.tensor.calls import integer_of, value_of
from gradwire_coordinator.tensor.parts import Part
from gradwire_coordinator.tensor.rewriter import NotKeptError, Rewriter
from gradwire_protocol.v1 import graph_pb2


def split_operand(rewriter: Rewriter, node: graph_pb2.Node) -> tuple[Part, list[int]]:
    """Return the part and the sizes of a node's first operand."""
    value = value_of(node, 0, "self")
    part = rewriter.part_of(value)
    if part is None:
        raise NotKeptError
    return part, rewriter.sizes(value)


def dim_of(node: graph_pb2.Node, position: int, name: str, dimensions: int, default: int | None = None) -> int:
    """Return a dimension that a node names, from 0."""
    found = integer_of(node, position, name, -1 if default is None else default)
    if found is None:
        raise NotKeptError
    return found % dimensions
