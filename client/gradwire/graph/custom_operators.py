"""Operators of the user's own (torch.library) in a graph: which may be there, and what servers must have.

Their code stays where it is: stage servers run the one that they were started with.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from gradwire.graph.source import location_of_node
from gradwire_protocol.errors import ModelError
from gradwire_protocol.operators import MAXIMUM_SCHEMA_BYTES, MAXIMUM_TARGET_BYTES, is_custom
from gradwire_protocol.v1 import graph_pb2 as pb


def check_custom_operator(node: fx.Node, target: str) -> None:
    """ModelError for a call of a custom operator that cannot be part of a graph."""
    schema = _schema(target)
    if any(item.alias_info is not None for item in (*schema.arguments, *schema.returns)):
        raise ModelError(
            f"Custom operator {target} writes to its arguments, or returns them, at {location_of_node(node)}",
            expected="operators that return new tensors",
            got=str(schema)[:MAXIMUM_SCHEMA_BYTES],
            remedy="return what it writes as a new tensor, with mutates_args=() and no alias in the schema",
        )
    if len(target.encode()) > MAXIMUM_TARGET_BYTES or len(str(schema).encode()) > MAXIMUM_SCHEMA_BYTES:
        raise ModelError(
            f"Custom operator {target[:80]} has too long a name or schema, at {location_of_node(node)}",
            expected=f"at most {MAXIMUM_TARGET_BYTES} and {MAXIMUM_SCHEMA_BYTES} bytes",
            got=f"{len(target.encode())} and {len(str(schema).encode())}",
        )


def custom_operators(graphs: Iterable[pb.Graph]) -> list[pb.CustomOperator]:
    """Return the custom operators of some graphs, each once, with their schemas in this process."""
    targets = dict.fromkeys(node.target for graph in graphs for node in graph.nodes if is_custom(node.target))
    return [pb.CustomOperator(target=target, schema=str(_schema(target))) for target in targets]


def _schema(target: str) -> torch._C.FunctionSchema:
    namespace, name, overload = target.split(".")
    found: torch._C.FunctionSchema = getattr(getattr(getattr(torch.ops, namespace), name), overload)._schema
    return found
