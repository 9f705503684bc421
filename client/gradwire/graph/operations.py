"""The parts of a flat graph: operations, names of values, literals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from gradwire.graph.randomness import Draw
from gradwire.graph.source import Location
from gradwire_protocol.torch_tensors import DATA_TYPES
from gradwire_protocol.v1 import graph_pb2 as pb

GETITEM = "python.getitem"
_LAYOUTS = {torch.strided: pb.TENSOR_LAYOUT_STRIDED}
_MEMORY_FORMATS = {
    torch.contiguous_format: pb.MEMORY_FORMAT_CONTIGUOUS,
    torch.preserve_format: pb.MEMORY_FORMAT_PRESERVE,
    torch.channels_last: pb.MEMORY_FORMAT_CHANNELS_LAST,
    torch.channels_last_3d: pb.MEMORY_FORMAT_CHANNELS_LAST_3D,
}
# What a traced node stands for in the flat list: the name of a value, a literal, or outputs of an inlined region.
Reference = Any


@dataclass(frozen=True)
class Name:
    """The name of a value of the flat list."""

    text: str


@dataclass(frozen=True)
class Operation:
    """A node, with what the order of the list depends on."""

    node: pb.Node
    reads: tuple[str, ...]
    writes: tuple[str, ...]  # values among those read that the operator writes to
    aliases: tuple[str, ...]  # values among those read whose memory the output may share
    in_model: bool  # made by the model, not by its loss
    draws: int = 0  # of random numbers, in eager mode

    @property
    def name(self) -> str:
        return self.node.name


@dataclass(frozen=True)
class Region:
    """The contexts around a part of the graph."""

    no_grad: bool = False
    autocast: tuple[pb.Autocast, ...] = ()


@dataclass
class Flat:
    """A flat graph: operations, tensors found inside regions, and references of the program's outputs."""

    operations: list[Operation] = field(default_factory=list)
    attributes: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: list[Reference] = field(default_factory=list)


# In the order of the tests: bool is an int.
_ENCODERS: tuple[tuple[type | tuple[type, ...], Callable[[Any], pb.Argument]], ...] = (
    (Name, lambda value: pb.Argument(value=value.text)),
    (type(None), lambda _: pb.Argument(none=pb.Nothing())),
    (bool, lambda value: pb.Argument(boolean=value)),
    (int, lambda value: pb.Argument(integer=value)),
    (float, lambda value: pb.Argument(real=value)),
    (complex, lambda value: pb.Argument(complex=pb.ComplexNumber(real=value.real, imaginary=value.imag))),
    (str, lambda value: pb.Argument(text=value)),
    (torch.dtype, lambda value: pb.Argument(data_type=DATA_TYPES[value])),
    (torch.device, lambda value: pb.Argument(device_kind=value.type)),
    (torch.memory_format, lambda value: pb.Argument(memory_format=_MEMORY_FORMATS[value])),
    (torch.layout, lambda value: pb.Argument(layout=_LAYOUTS[value])),
)


def literal(value: Any) -> pb.Argument | None:
    """Write a name or a literal; None if a graph cannot hold it."""
    if isinstance(value, torch.dtype | torch.layout) and value not in (DATA_TYPES | _LAYOUTS):
        return None
    for types, encode in _ENCODERS:
        if isinstance(value, types):
            return encode(value)
    return None


def read_names(node: pb.Node) -> Iterator[str]:
    """Yield the names of the values that a node reads, repeats included."""
    for argument in (*node.arguments, *(item.value for item in node.keyword_arguments)):
        yield from argument_names(argument)


def argument_names(argument: pb.Argument) -> Iterator[str]:
    """Yield the names of the values in an argument."""
    kind = argument.WhichOneof("kind")
    if kind == "value":
        yield argument.value
    elif kind == "list":
        for item in argument.list.items:
            yield from argument_names(item)


def draws_of(operations: Iterable[Operation]) -> tuple[Draw, ...]:
    """The random nodes in order."""
    return tuple(
        Draw(item.name, item.node.target, str(Location(item.node.module_path, item.node.source)), item.draws)
        for item in operations
        if item.draws
    )
