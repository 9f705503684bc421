"""What is known of the values of a graph that is rewritten: which part servers have of each, its whole shape, its name.

Leaves making nodes to `rewriter.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gradwire_coordinator.graph_index import GraphIndex, read_values
from gradwire_coordinator.tensor.parts import Part, sizes_of
from gradwire_protocol.v1 import graph_pb2

# Of a value: the part that each server has; None: all of it. Of a tuple: of each item.
Place = Part | None | tuple[Part | None, ...]


class KnownValues:
    """The values of one graph, the given one's and those that are made for it."""

    def __init__(
        self,
        index: GraphIndex,
        tensors: Mapping[str, graph_pb2.TensorSpec],
        shards: int,
        part_of_tensor: Callable[[str], Part | None],
        suggest: Callable[[str, Part], None],
        learned: frozenset[str],
    ) -> None:
        """tensors: of the whole model. part_of_tensor: how one of them is split, asked for when a node reads it first.

        suggest: told, before that, of a tensor that a split value is multiplied by, the split that would go with it.
        learned: values that have a gradient, or may.
        """
        self.index = index
        self.shards = shards
        self._tensors = tensors
        self._part_of_tensor = part_of_tensor
        self._suggest = suggest
        self._learned = set(learned)
        self._places: dict[str, Place] = {}
        self._specs: dict[str, graph_pb2.ValueSpec] = {}
        self._names = set(index.producers) | set(index.inputs) | set(index.tensors)

    def place(self, value: str) -> Place:
        """Return what servers have of a value."""
        if value not in self._places:
            tensor = self.index.tensors.get(value)
            self._places[value] = None if tensor is None else self._part_of_tensor(tensor)
        return self._places[value]

    def part_of(self, value: str) -> Part | None:
        """Return the part that servers have of a tensor; None: all of it."""
        found = self.place(value) if value else None
        return found if isinstance(found, Part) else None

    def suggest(self, value: str, part: Part) -> None:
        """Say how a factor would be split best, if it is a tensor of the model that nobody has read yet."""
        tensor = self.index.tensors.get(value)
        if tensor is not None and value not in self._places:
            self._suggest(tensor, part)

    def sizes(self, value: str) -> list[int]:
        """Return the sizes of the whole value, for comparing (`parts.sizes_of`)."""
        return sizes_of(self.spec(value))

    def spec(self, value: str) -> graph_pb2.ValueSpec:
        """Return the shape and type of the whole value."""
        if value not in self._specs:
            tensor = self._tensors.get(self.index.tensors.get(value, ""))
            if tensor is None:
                return self.index.spec(value)
            self._specs[value] = graph_pb2.ValueSpec(
                kind=graph_pb2.VALUE_KIND_TENSOR,
                data_type=tensor.data_type,
                shape=[graph_pb2.AffineSize(fixed=size) for size in tensor.shape],
            )
        return self._specs[value]

    def is_tensor(self, value: str) -> bool:
        """Whether a value is a tensor."""
        return bool(value) and self.spec(value).kind == graph_pb2.VALUE_KIND_TENSOR

    def _is_split(self, value: str) -> bool:
        place = self.place(value)
        return isinstance(place, Part) or (isinstance(place, tuple) and any(item is not None for item in place))

    def _take(self, node: graph_pb2.Node, place: Place) -> None:
        """Take note of the value of a new node, whose output is that of the whole."""
        self._places[node.name] = place
        if node.name not in self.index.producers:
            whole = graph_pb2.ValueSpec()
            whole.CopyFrom(node.output)
            self._specs[node.name] = whole
        if any(value in self._learned for value in read_values(node)):
            self._learned.add(node.name)

    def _new_name(self, name: str) -> str:
        made, number = name, 1
        while made in self._names:
            number += 1
            made = f"{name}{number}"
        self._names.add(made)
        return made
