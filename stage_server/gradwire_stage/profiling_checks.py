"""Checks a request to measure costs before anything is made or run for it.

Operators' arguments are checked where segments are built, and what reads what where a graph is grouped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from gradwire_protocol.errors import FrameError, LimitExceeded, ModelError
from gradwire_protocol.frames import ELEMENT_BYTES, MAXIMUM_DIMENSIONS
from gradwire_protocol.group_operators import GROUP_OPERATORS
from gradwire_protocol.operators import is_allowed
from gradwire_protocol.v1 import graph_pb2, stage_pb2
from gradwire_stage.checks import MAXIMUM_TENSORS, PRECISIONS, check_name
from gradwire_stage.shard_checks import MAXIMUM_SHARDS

MAXIMUM_NODES = 100_000
MAXIMUM_GROUPS = 4096
MAXIMUM_ROW_COUNTS = 4
MAXIMUM_ROWS = 2**31
MAXIMUM_SECONDS = 60.0


def check_measure(request: stage_pb2.MeasureCostsRequest, operators: Mapping[str, Callable[..., Any]]) -> None:
    """Refuse what is not a graph to measure: FrameError, LimitExceeded; for a forbidden operator ModelError."""
    graph = request.graph
    for what, count, most in (
        ("nodes", len(graph.nodes), MAXIMUM_NODES),
        ("groups", len(request.ends), MAXIMUM_GROUPS),
        ("numbers of rows", len(request.rows), MAXIMUM_ROW_COUNTS),
    ):
        if not 1 <= count <= most:
            raise LimitExceeded(f"Costs cannot be measured for so many {what}", expected=f"1 to {most}", got=str(count))
    if len(request.tensors) > MAXIMUM_TENSORS:
        raise LimitExceeded("Too many tensors", expected=f"{MAXIMUM_TENSORS} at most", got=str(len(request.tensors)))
    if any(not 1 <= rows <= MAXIMUM_ROWS for rows in request.rows):
        raise FrameError("Wrong rows to measure", expected=f"1 to {MAXIMUM_ROWS}", got=str(list(request.rows)))
    # Written so that it refuses NaN, too.
    if not 0 < request.seconds <= MAXIMUM_SECONDS:
        raise FrameError("Wrong time to measure in", expected=f"up to {MAXIMUM_SECONDS:g} s", got=str(request.seconds))
    if request.tensor > MAXIMUM_SHARDS:
        raise LimitExceeded("Too many shards", expected=f"{MAXIMUM_SHARDS} at most", got=str(request.tensor))
    if request.precision not in PRECISIONS:
        raise FrameError("Wrong precision", expected="unspecified or BFLOAT16", got=str(request.precision))
    ends = list(request.ends)
    if ends[-1] != len(graph.nodes) or any(a >= b for a, b in itertools.pairwise([0, *ends])):
        raise FrameError(
            "The groups to measure are not the graph's", expected=f"ascending ends, {len(graph.nodes)} the last"
        )
    if not set(ends[:-1]) <= set(graph.allowed_cuts):
        raise FrameError("A group to measure ends where the graph must not be cut", expected="allowed cuts")
    _check_tensors(request)
    _check_nodes(graph, operators, request.tensor)


def _check_tensors(request: stage_pb2.MeasureCostsRequest) -> None:
    names = set()
    for spec in request.tensors:
        check_name(spec.name, "A tensor")
        if spec.name in names:
            raise FrameError(f"Tensor {spec.name!r} is described twice", expected="unique names")
        names.add(spec.name)
        if spec.data_type not in ELEMENT_BYTES:
            raise FrameError(f"Tensor {spec.name!r} has a wrong type", expected="a DataType", got=str(spec.data_type))
        if len(spec.shape) > MAXIMUM_DIMENSIONS or any(not 0 <= size < 2**48 for size in spec.shape):
            raise FrameError(
                f"Tensor {spec.name!r} has a wrong shape",
                expected=f"at most {MAXIMUM_DIMENSIONS} dimensions, none negative",
                got=str(list(spec.shape)[:40]),
            )


def _check_nodes(graph: graph_pb2.Graph, operators: Mapping[str, Callable[..., Any]], shards: int) -> None:
    for item in graph.inputs:
        check_name(item.value, "An input")
        _check_spec(item.value, item.spec)
    for node in graph.nodes:
        check_name(node.name, "A node")
        _check_spec(node.name, node.output)
        admitted = node.target in operators or (shards > 1 and node.target in GROUP_OPERATORS)
        if not is_allowed(node.target) and not admitted:
            raise ModelError(
                f"Operator '{node.target[:200]}' is not allowed in a graph",
                expected="an operator of the allow-list (gradwire_protocol/operators.py)",
                got=node.target[:200],
                remedy="custom operators need --operators MODULE on the server",
            )


def _check_spec(name: str, spec: graph_pb2.ValueSpec) -> None:
    if spec.kind != graph_pb2.VALUE_KIND_TENSOR:
        return
    if spec.data_type not in ELEMENT_BYTES or len(spec.shape) > MAXIMUM_DIMENSIONS:
        raise FrameError(
            f"{name!r} has a wrong type or shape",
            expected=f"a DataType and at most {MAXIMUM_DIMENSIONS} dimensions",
            got=f"{spec.data_type}, {len(spec.shape)} dimensions",
        )
    if any(abs(part) >= 2**48 for size in spec.shape for part in (size.fixed, size.per_row)):
        raise FrameError(f"{name!r} has a wrong shape", expected="sizes below 2⁴⁸", got=math.inf.__repr__())
