"""Groups of a graph's nodes, each as a segment of its own: what is measured as one, and which of them are alike.

Leaves to others: where groups end (the coordinator says), and running them (`profiling_runs.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gradwire_protocol.errors import ModelError
from gradwire_protocol.v1 import graph_pb2, stage_pb2
from gradwire_stage.rebuild import MAXIMUM_NESTING


@dataclass(frozen=True)
class Group:
    """A group. In its segment everything is named by its place, so that groups that do the same have equal segments."""

    segment: stage_pb2.Segment
    # Of the tensors of the model that it uses, named as in the segment.
    tensors: tuple[graph_pb2.TensorSpec, ...]
    # Names in the graph of what it reads of groups before it and of the batch, and of what it makes for others.
    incoming: tuple[str, ...]
    outgoing: tuple[str, ...]
    # Of the values that it makes, those for others first, in their order.
    specs: tuple[graph_pb2.ValueSpec, ...]
    # The same for groups that cost the same.
    key: bytes


class Grouping:
    """A graph, indexed. ModelError if it is none."""

    def __init__(self, graph: graph_pb2.Graph, tensors: Mapping[str, graph_pb2.TensorSpec]) -> None:
        self._graph = graph
        self._specs = {item.value: item.spec for item in graph.inputs}
        self._tensor_of = {use.value: use.tensor for use in graph.tensors}
        self._tensors = tensors
        # Value -> position of the last node that reads it. The end of the graph reads what it gives.
        self._last_read: dict[str, int] = {}
        known = {*self._specs, *self._tensor_of}
        named = [*self._tensor_of.values(), *(update.tensor for update in graph.buffer_updates), *graph.mutated_tensors]
        if missing := [name for name in named if name not in tensors]:
            raise ModelError("The graph to measure uses tensors that are not described", got=repr(missing[0][:80]))
        for position, node in enumerate(graph.nodes):
            for value in read_values(node):
                if value not in known:
                    raise ModelError(
                        f"In the graph to measure, node {node.name[:80]} reads a value that nothing before it makes",
                        expected="an input, a tensor, or an earlier node",
                        got=repr(value[:80]),
                    )
                self._last_read[value] = position
            if node.name in known:
                raise ModelError("The graph to measure defines a value twice", got=repr(node.name[:80]))
            known.add(node.name)
            self._specs[node.name] = node.output
        read_at_end = [output.value for output in graph.outputs] + [update.value for update in graph.buffer_updates]
        self._last_read.update((value, len(graph.nodes)) for value in read_at_end)
        self._learned = learned_values(graph, tensors)

    def groups(self, ends: Sequence[int]) -> list[Group]:
        """Return the groups that end at these positions."""
        return [self._group(first, end) for first, end in zip([0, *ends], ends, strict=False)]

    def dead_after(self, end: int, values: Collection[str]) -> list[str]:
        """Return those of the values that no node from position `end` on reads."""
        return [value for value in values if self._last_read.get(value, -1) < end]

    def _group(self, first: int, end: int) -> Group:
        graph = self._graph
        nodes = graph.nodes[first:end]
        read = dict.fromkeys(value for node in nodes for value in read_values(node))
        own = {node.name for node in nodes}
        incoming = [value for value in read if value not in own and value not in self._tensor_of]
        uses = [value for value in read if value in self._tensor_of]
        outgoing = [node.name for node in nodes if self._last_read.get(node.name, -1) >= end]
        updates = [update for update in graph.buffer_updates if update.value in own]
        held = dict.fromkeys([self._tensor_of[value] for value in uses] + [update.tensor for update in updates])
        values = {value: f"i{number}" for number, value in enumerate(incoming)}
        values |= {value: f"u{number}" for number, value in enumerate(uses)}
        values |= {node.name: f"n{number}" for number, node in enumerate(nodes)}
        names = {tensor: f"t{number}" for number, tensor in enumerate(held)}
        segment = stage_pb2.Segment(
            graph=graph.kind,
            nodes=[_renamed(node, values) for node in nodes],
            tensors=[graph_pb2.TensorUse(value=values[value], tensor=names[self._tensor_of[value]]) for value in uses],
            incoming=[
                # Where a later group reads the value, too, gradients are added up, as they are in the whole graph.
                stage_pb2.IncomingValue(
                    value=values[value], gradient_from_stage=1 if self._last_read[value] >= end else None
                )
                for value in incoming
            ],
            outgoing=[stage_pb2.OutgoingValue(value=values[value], consumer_stages=[1]) for value in outgoing],
            buffer_updates=[
                graph_pb2.BufferUpdate(value=values[update.value], tensor=names[update.tensor]) for update in updates
            ],
            mutated_tensors=[names[tensor] for tensor in graph.mutated_tensors if tensor in names],
            mutated_inputs=[values[value] for value in graph.mutated_inputs if value in values],
        )
        tensors = tuple(_described(self._tensors[tensor], name) for tensor, name in names.items())
        inner = [node.name for node in nodes if node.name not in outgoing]
        specs = tuple(self._specs[name] for name in [*outgoing, *inner])
        wanted = bytes(value in self._learned for value in incoming)
        described = [segment, *tensors, *specs, *(self._specs[value] for value in incoming)]
        digest = hashlib.sha256(wanted)
        for message in described:
            part = message.SerializeToString(deterministic=True)
            digest.update(len(part).to_bytes(8, "little") + part)
        return Group(segment, tensors, tuple(incoming), tuple(outgoing), specs, digest.digest())


def learned_values(graph: graph_pb2.Graph, tensors: Mapping[str, graph_pb2.TensorSpec]) -> set[str]:
    """Return the values that a trained parameter has a part in, as far as a graph tells."""
    learned = {use.value for use in graph.tensors if tensors[use.tensor].requires_grad}
    for node in graph.nodes:
        if not node.no_grad and any(value in learned for value in read_values(node)):
            learned.add(node.name)
    return learned


def read_values(node: graph_pb2.Node) -> Iterator[str]:
    """Yield the names of the values that a node reads, as often as it does."""
    arguments = [*node.arguments, *(keyword.value for keyword in node.keyword_arguments)]
    for argument in arguments:
        yield from (item.value for item in _leaves(argument, 0) if item.WhichOneof("kind") == "value")


def _leaves(argument: graph_pb2.Argument, depth: int) -> Iterator[graph_pb2.Argument]:
    if argument.WhichOneof("kind") != "list":
        yield argument
    elif depth < MAXIMUM_NESTING:
        for item in argument.list.items:
            yield from _leaves(item, depth + 1)
    else:
        raise ModelError("The arguments of a node are nested too deep", expected=f"at most {MAXIMUM_NESTING} lists")


def _renamed(node: graph_pb2.Node, values: Mapping[str, str]) -> graph_pb2.Node:
    made = graph_pb2.Node()
    made.CopyFrom(node)
    made.name = values[node.name]
    # Other lines of the model that do the same.
    made.ClearField("module_path")
    made.ClearField("source")
    for argument in [*made.arguments, *(keyword.value for keyword in made.keyword_arguments)]:
        for item in _leaves(argument, 0):
            if item.WhichOneof("kind") == "value":
                item.value = values[item.value]
    return made


def _described(spec: graph_pb2.TensorSpec, name: str) -> graph_pb2.TensorSpec:
    return graph_pb2.TensorSpec(
        name=name, kind=spec.kind, requires_grad=spec.requires_grad, data_type=spec.data_type, shape=spec.shape
    )
