"""Who makes and who reads each value of a graph, checked as it is read: graphs come from the wire.

Leaves to others: which operators are allowed (the stage servers know), and where to cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from gradwire_protocol.errors import LimitExceeded, ModelError
from gradwire_protocol.frames import ELEMENT_BYTES, MAXIMUM_VALUE_BYTES
from gradwire_protocol.v1 import graph_pb2, tensors_pb2

MAXIMUM_NODES = 100_000
MAXIMUM_TENSORS = 100_000
_MAXIMUM_LIST_DEPTH = 8
_NUMBER_BYTES = 8
_NUMBERS = frozenset({graph_pb2.VALUE_KIND_INTEGER, graph_pb2.VALUE_KIND_REAL, graph_pb2.VALUE_KIND_BOOLEAN})
_FLOATING = frozenset(
    {
        tensors_pb2.DATA_TYPE_FLOAT64,
        tensors_pb2.DATA_TYPE_FLOAT32,
        tensors_pb2.DATA_TYPE_FLOAT16,
        tensors_pb2.DATA_TYPE_BFLOAT16,
        tensors_pb2.DATA_TYPE_COMPLEX64,
        tensors_pb2.DATA_TYPE_COMPLEX128,
    }
)


@dataclass(frozen=True)
class GraphIndex:
    """A graph and where its values are made and read, by position in the node list."""

    graph: graph_pb2.Graph
    # "train", "evaluate", "predict": for messages.
    name: str
    # Node name -> position.
    producers: dict[str, int]
    # Input value -> input.
    inputs: dict[str, graph_pb2.GraphInput]
    # Value of a tensor use -> TensorSpec.name.
    tensors: dict[str, str]
    # Value -> positions of the nodes that read it, ascending. The end of the graph (position len(nodes)) reads the loss
    # and its weight.
    readers: dict[str, tuple[int, ...]]
    # Tensors that the graph changes: in place, or by an update that it makes functionally.
    mutated: frozenset[str]

    def spec(self, value: str) -> graph_pb2.ValueSpec:
        """Return the shape and type of a node's value or an input."""
        if value in self.producers:
            return self.graph.nodes[self.producers[value]].output
        return self.inputs[value].spec

    def tensor_positions(self) -> dict[str, list[int]]:
        """Return for each tensor of the model the positions of the nodes that read or update it, ascending."""
        positions: dict[str, set[int]] = {}
        for value, tensor in self.tensors.items():
            positions.setdefault(tensor, set()).update(self.readers.get(value, ()))
        for update in self.graph.buffer_updates:
            positions.setdefault(update.tensor, set()).add(self.producers[update.value])
        return {tensor: sorted(found) for tensor, found in positions.items()}

    def usable_cuts(self, mutated: Iterable[str]) -> list[int]:
        """Return the allowed cuts that leave each tensor of `mutated`, and each mutated input, on one stage.

        A buffer that changes has one owner: a copy on another stage would keep its old value.
        """
        positions = self.tensor_positions()
        pinned = [positions[tensor] for tensor in mutated if tensor in positions]
        pinned += [list(self.readers.get(value, ())) for value in self.graph.mutated_inputs]
        barred = [0] * (len(self.graph.nodes) + 2)  # running sum: how many pinned ranges a cut would part
        for found in pinned:
            if found:
                barred[found[0] + 1] += 1
                barred[min(found[-1], len(self.graph.nodes)) + 1] -= 1
        usable, parted, allowed = [], 0, set(self.graph.allowed_cuts)
        for cut, change in enumerate(barred):
            parted += change
            if parted == 0 and cut in allowed:
                usable.append(cut)
        return usable


def value_bytes(spec: graph_pb2.ValueSpec, rows: int) -> int:
    """Return the size of a value, for a micro-batch of so many rows."""
    if spec.kind != graph_pb2.VALUE_KIND_TENSOR:
        return _NUMBER_BYTES
    elements = math.prod(max(0, size.fixed + size.per_row * rows) for size in spec.shape)
    return elements * ELEMENT_BYTES.get(spec.data_type, _NUMBER_BYTES)


def learned_values(index: GraphIndex, parameters: Collection[str]) -> frozenset[str]:
    """Return the values that a parameter has a part in. The others are masks, tables of positions and the like."""
    found: set[str] = {value for value, tensor in index.tensors.items() if tensor in parameters}
    for node in index.graph.nodes:
        if any(value in found for value in read_values(node)):
            found.add(node.name)
    return frozenset(found)


def can_need_gradient(spec: graph_pb2.ValueSpec) -> bool:
    """Whether a value is of a type that gradients exist for."""
    return spec.kind == graph_pb2.VALUE_KIND_TENSOR and spec.data_type in _FLOATING


def can_travel(spec: graph_pb2.ValueSpec) -> bool:
    """Whether a value can cross a cut: tensors and plain numbers can."""
    return spec.kind == graph_pb2.VALUE_KIND_TENSOR or spec.kind in _NUMBERS


def read_values(node: graph_pb2.Node) -> Iterator[str]:
    """Yield the names of the values that a node reads, as often as it does."""
    for argument in node.arguments:
        yield from _values(argument, 0)
    for keyword in node.keyword_arguments:
        yield from _values(keyword.value, 0)


def _values(argument: graph_pb2.Argument, depth: int) -> Iterator[str]:
    kind = argument.WhichOneof("kind")
    if kind == "value":
        yield argument.value
    elif kind == "list":
        if depth == _MAXIMUM_LIST_DEPTH:
            raise LimitExceeded(
                "The arguments of a node are nested too deep", expected=f"at most {_MAXIMUM_LIST_DEPTH} lists"
            )
        for item in argument.list.items:
            yield from _values(item, depth + 1)


def index_graph(graph: graph_pb2.Graph, name: str, tensors: dict[str, graph_pb2.TensorSpec]) -> GraphIndex:
    """Index a graph; ModelError if it is not one (unknown or repeated names, cuts out of range, …)."""
    _check_size(graph, name)
    known: set[str] = set()

    def add(value: str, what: str) -> None:
        if not 1 <= len(value.encode()) <= MAXIMUM_VALUE_BYTES:
            raise ModelError(
                f"The {name} graph has {what} without a proper name",
                expected=f"1 to {MAXIMUM_VALUE_BYTES} bytes",
                got=repr(value[:40]),
            )
        if value in known:
            raise ModelError(f"The {name} graph defines a value twice", expected="unique names", got=repr(value))
        known.add(value)

    def need(value: str, reader: str) -> None:
        if value not in known:
            raise ModelError(
                f"In the {name} graph, {reader} reads a value that nothing before it makes",
                expected="an input, a tensor, or an earlier node",
                got=repr(value),
            )

    def need_tensor(tensor: str, reader: str) -> None:
        if tensor not in tensors:
            raise ModelError(
                f"In the {name} graph, {reader} names a tensor that the model does not have", got=repr(tensor)
            )

    for entry in graph.inputs:
        add(entry.value, "an input")
    for use in graph.tensors:
        add(use.value, "a tensor")
        need_tensor(use.tensor, f"tensor use {use.value}")
    readers: dict[str, list[int]] = {}
    producers: dict[str, int] = {}
    for position, node in enumerate(graph.nodes):
        for value in dict.fromkeys(read_values(node)):
            need(value, f"node {node.name}")
            readers.setdefault(value, []).append(position)
        add(node.name, "a node")
        producers[node.name] = position
    inputs = {entry.value: entry for entry in graph.inputs}
    with_loss = graph.kind in (graph_pb2.GRAPH_KIND_TRAIN, graph_pb2.GRAPH_KIND_EVALUATE)
    for output in graph.outputs:
        if output.value or with_loss:
            need(output.value, "the output")
        if with_loss:
            readers.setdefault(output.value, []).append(len(graph.nodes))
    for update in graph.buffer_updates:
        need_tensor(update.tensor, "a buffer update")
        if update.value not in producers:
            raise ModelError(
                f"In the {name} graph, the new value of {update.tensor} is not made by a node", got=repr(update.value)
            )
    for tensor in graph.mutated_tensors:
        need_tensor(tensor, "the list of mutated tensors")
    for value in graph.mutated_inputs:
        if value not in inputs:
            raise ModelError(f"The {name} graph mutates an input that it does not have", got=repr(value))
    return GraphIndex(
        graph=graph,
        name=name,
        producers=producers,
        inputs=inputs,
        tensors={use.value: use.tensor for use in graph.tensors},
        readers={value: tuple(dict.fromkeys(positions)) for value, positions in readers.items()},
        mutated=frozenset(graph.mutated_tensors) | {update.tensor for update in graph.buffer_updates},
    )


def _check_size(graph: graph_pb2.Graph, name: str) -> None:
    count = len(graph.nodes)
    if not 1 <= count <= MAXIMUM_NODES:
        raise LimitExceeded(
            f"The {name} graph has a number of nodes that no run can have",
            expected=f"1 to {MAXIMUM_NODES}",
            got=str(count),
        )
    cuts = list(graph.allowed_cuts)
    if any(not 0 < cut < count for cut in cuts) or any(a >= b for a, b in itertools.pairwise(cuts)):
        raise ModelError(
            f"The allowed cuts of the {name} graph are wrong",
            expected=f"ascending positions between 1 and {count - 1}",
            got=str(cuts[:20]),
        )
