"""Rebuilds the nodes of a segment as generated Python code (torch.fx), from the allow-list and admitted operators.

The code takes a scope, tensors and incoming values, and returns the values asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from gradwire_protocol.errors import ModelError
from gradwire_protocol.group_operators import GROUP_OPERATORS
from gradwire_protocol.randomness import node_number
from gradwire_protocol.torch_tensors import TORCH_TYPES
from gradwire_protocol.v1 import graph_pb2 as pb
from gradwire_stage import regions
from gradwire_stage.group import operators as group_operators
from gradwire_stage.operators import keeps_keyword, resolve
from gradwire_stage.regions import Region

_LAYOUTS: dict[int, torch.layout] = {pb.TENSOR_LAYOUT_STRIDED: torch.strided}
_MEMORY_FORMATS: dict[int, torch.memory_format] = {
    pb.MEMORY_FORMAT_CONTIGUOUS: torch.contiguous_format,
    pb.MEMORY_FORMAT_PRESERVE: torch.preserve_format,
    pb.MEMORY_FORMAT_CHANNELS_LAST: torch.channels_last,
    pb.MEMORY_FORMAT_CHANNELS_LAST_3D: torch.channels_last_3d,
}
_TABLES: dict[str, Mapping[int, Any]] = {
    "data_type": TORCH_TYPES,
    "layout": _LAYOUTS,
    "memory_format": _MEMORY_FORMATS,
}
MAXIMUM_NESTING = 8


class Rebuilt:
    """A segment's code. `call(scope, *tensors, *incoming)` returns the values of `outputs`, in order."""

    def __init__(
        self,
        nodes: Sequence[pb.Node],
        tensors: Mapping[str, Sequence[str]],
        incoming: Sequence[str],
        outputs: Sequence[str],
        device: torch.device,
        custom: Mapping[str, Callable[..., Any]],
        shards: int = 1,
    ) -> None:
        """`tensors` gives, for each tensor in order, the value names that stand for it.

        custom: the operators besides those of the allow-list that are admitted, by target. shards: servers that run
        this segment together; several have the group operators, too.
        """
        self.regions: list[Region] = [Region()]
        self.nodes: dict[str, pb.Node] = {}  # by name in the code
        self._device = device
        self._custom = custom
        self._shards = shards
        self._graph = fx.Graph()
        self._values: dict[str, fx.Node] = {}
        scope = self._graph.placeholder("scope")
        for number, values in enumerate(tensors.values()):
            placeholder = self._graph.placeholder(f"tensor_{number}")
            for value in values:
                self._define(value, placeholder)
        for number, value in enumerate(incoming):
            self._define(value, self._graph.placeholder(f"incoming_{number}"))
        region = 0
        for node in nodes:
            region = self._enter(scope, region, Region.of(node))
            if node.random:
                self._graph.call_function(regions.seed, (scope, node_number(node.name)))
            self._call(node, scope)
        self._enter(scope, region, Region())
        self._graph.output(tuple(self._read(value, "its outputs") for value in outputs))
        self._module = fx.GraphModule(nn.Module(), self._graph)
        self.call: Callable[..., tuple[Any, ...]] = self._module.forward

    def _enter(self, scope: fx.Node, current: int, region: Region) -> int:
        if region not in self.regions:
            self.regions.append(region)
        number = self.regions.index(region)
        if number != current:
            self._graph.call_function(regions.enter, (scope, number))
        return number

    def _call(self, node: pb.Node, scope: fx.Node) -> None:
        arguments = tuple(self._argument(item, node.name) for item in node.arguments)
        if node.target in GROUP_OPERATORS:
            group_operators.check_size(self._shards, node.target)
            function, arguments = group_operators.OPERATORS[node.target], (scope, node.name, *arguments)
        else:
            function = self._custom.get(node.target) or resolve(node.target)
        keywords = {
            item.name: self._argument(item.value, node.name)
            for item in node.keyword_arguments
            if keeps_keyword(node.target, item.name)
        }
        call = self._graph.create_node("call_function", function, arguments, keywords, name=f"{node.name}_")
        self.nodes[call.name] = node
        self._define(node.name, call)

    def _define(self, value: str, node: fx.Node) -> None:
        if value in self._values:
            raise _malformed(f"value '{value}' is made twice")
        self._values[value] = node

    def _read(self, value: str, reader: str) -> fx.Node:
        node = self._values.get(value)
        if node is None:
            raise _malformed(f"value '{value}', read by {reader}, is neither made nor incoming")
        return node

    def _argument(self, argument: pb.Argument, reader: str, depth: int = 0) -> Any:
        kind = argument.WhichOneof("kind")
        if kind == "value":
            return self._read(argument.value, reader)
        if kind == "list" and depth < MAXIMUM_NESTING:
            return [self._argument(item, reader, depth + 1) for item in argument.list.items]
        if kind == "none":
            return None
        if kind in ("boolean", "integer", "real", "text"):
            return getattr(argument, kind)
        if kind == "complex":
            return complex(argument.complex.real, argument.complex.imaginary)
        if kind == "device_kind":
            return self._device
        table = _TABLES.get(kind or "", {})
        number = getattr(argument, kind) if kind and table else 0
        if number not in table:
            raise _malformed(f"an argument of '{reader}' is of kind '{kind}', number {number}")
        return table[number]


def value_names(uses: Iterable[pb.TensorUse]) -> dict[str, list[str]]:
    """Group the value names of tensor uses by tensor, in order of first use: tied names share one tensor."""
    names: dict[str, list[str]] = {}
    for use in uses:
        names.setdefault(use.tensor, []).append(use.value)
    return names


def _malformed(what: str) -> ModelError:
    return ModelError("A segment is malformed", expected="a graph as export_model writes it", got=what[:300])
