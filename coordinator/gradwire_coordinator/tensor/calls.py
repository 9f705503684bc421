"""A node's arguments by position or name, to read and to change. Leaves what they mean to the rules."""

from __future__ import annotations

from collections.abc import Sequence

from gradwire_protocol.v1 import graph_pb2


def argument(node: graph_pb2.Node, position: int, name: str) -> graph_pb2.Argument | None:
    """Return an argument, wherever it is given; None where it is left to its default, or is None."""
    found = None
    if position < len(node.arguments):
        found = node.arguments[position]
    else:
        for item in node.keyword_arguments:
            if item.name == name:
                found = item.value
    return None if found is None or found.WhichOneof("kind") == "none" else found


def value_of(node: graph_pb2.Node, position: int, name: str) -> str:
    """Return the value that an argument names; empty if it names none."""
    found = argument(node, position, name)
    return found.value if found is not None and found.WhichOneof("kind") == "value" else ""


def written_values(node: graph_pb2.Node) -> list[str]:
    """Return the values that a node writes to."""
    found = [node.arguments[position] for position in node.mutated_arguments]
    found += [item.value for item in node.keyword_arguments if item.name in node.mutated_keyword_arguments]
    return [argument.value for argument in found if argument.WhichOneof("kind") == "value"]


def integer_of(node: graph_pb2.Node, position: int, name: str, default: int) -> int | None:
    """Return a whole number; None if it is computed by the graph."""
    found = argument(node, position, name)
    if found is None:
        return default
    return found.integer if found.WhichOneof("kind") == "integer" else None


def boolean_of(node: graph_pb2.Node, position: int, name: str, *, default: bool) -> bool:
    """Return a truth value."""
    found = argument(node, position, name)
    return default if found is None else found.boolean


def real_of(node: graph_pb2.Node, position: int, name: str, default: float) -> float | None:
    """Return a number; None if it is computed by the graph."""
    found = argument(node, position, name)
    if found is None:
        return default
    kind = found.WhichOneof("kind")
    return float(getattr(found, kind)) if kind in ("real", "integer") else None


def integers_of(node: graph_pb2.Node, position: int, name: str) -> list[int] | None:
    """Return a list of whole numbers, or one as a list; None if it is not given, or not of plain numbers."""
    found = argument(node, position, name)
    if found is None:
        return None
    items = found.list.items if found.WhichOneof("kind") == "list" else [found]
    return [item.integer for item in items] if all(item.WhichOneof("kind") == "integer" for item in items) else None


def set_argument(node: graph_pb2.Node, position: int, name: str, made: graph_pb2.Argument) -> None:
    """Give an argument that is there another value, or add it by name."""
    if position < len(node.arguments):
        node.arguments[position].CopyFrom(made)
        return
    for item in node.keyword_arguments:
        if item.name == name:
            item.value.CopyFrom(made)
            return
    node.keyword_arguments.add(name=name, value=made)


def of_value(name: str) -> graph_pb2.Argument:
    """Return an argument that names a value."""
    return graph_pb2.Argument(value=name)


def of_integer(number: int) -> graph_pb2.Argument:
    """Return a whole number as an argument."""
    return graph_pb2.Argument(integer=number)


def of_integers(numbers: Sequence[int]) -> graph_pb2.Argument:
    """Return whole numbers as an argument."""
    return graph_pb2.Argument(list=graph_pb2.ArgumentList(items=[of_integer(number) for number in numbers]))


def renamed(argument: graph_pb2.Argument, names: dict[str, str]) -> None:
    """Put other values in the place of those that an argument names, at any depth."""
    kind = argument.WhichOneof("kind")
    if kind == "value":
        argument.value = names.get(argument.value, argument.value)
    elif kind == "list":
        for item in argument.list.items:
            renamed(item, names)


def rename_values(node: graph_pb2.Node, names: dict[str, str]) -> None:
    """Put other values in the place of those that a node reads."""
    for argument in node.arguments:
        renamed(argument, names)
    for item in node.keyword_arguments:
        renamed(item.value, names)
