"""Turns an exported program into a flat list of operations: plain data, with regions inlined.

Leaves the order, dead code and cuts of the list to `normalise`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from gradwire.graph.costs import Costs
from gradwire.graph.custom_operators import check_custom_operator
from gradwire.graph.operations import (
    GETITEM,
    Flat,
    Name,
    Operation,
    Reference,
    Region,
    argument_names,
    literal,
    read_names,
)
from gradwire.graph.randomness import draws
from gradwire.graph.refusals import known_obstacle
from gradwire.graph.sizes import Sizes
from gradwire.graph.source import Location, is_in_model, location_of_node
from gradwire_protocol.errors import ModelError
from gradwire_protocol.operators import HIDDEN_MUTATIONS, PYTHON_FUNCTIONS, UNANNOTATED_ALIASES, is_allowed, is_custom
from gradwire_protocol.torch_tensors import DATA_TYPES
from gradwire_protocol.v1 import graph_pb2 as pb

_SYMBOLIC = ("sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_sum", "sym_sqrt")
_PYTHON_NAMES: dict[Any, str] = {
    **{getattr(operator, name): name for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow")},
    **{getattr(operator, name): name for name in ("neg", "eq", "ne", "ge", "gt", "le", "lt", "and_", "or_", "not_")},
    **{getattr(torch, name): name for name in _SYMBOLIC},
    **{getattr(math, name): name for name in ("trunc", "ceil", "floor")},
    round: "round",
}
_SIZE = "aten.sym_size.int"
_RESHAPING = ("aten.view.default", "aten.reshape.default")
_TRAINING_ARGUMENT = 5  # of the operators in HIDDEN_MUTATIONS


def flatten(
    program: torch.export.ExportedProgram,
    placeholders: Mapping[str, str],
    sizes: Sizes,
    costs: Costs,
    loss_source: str,
) -> Flat:
    """Flatten a program.

    `placeholders` gives the value name of each of its placeholders; `loss_source` stands in for the source line of
    operators that a plain loss function made, since export records lines of modules only.
    """
    flat = Flat()
    serialiser = _Serialiser(flat, sizes, costs, loss_source)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in placeholders:
            serialiser.references[node] = Name(placeholders[node.name])
    flat.outputs = serialiser.walk(program.graph_module, "", Region())
    return flat


class _Serialiser:
    def __init__(self, flat: Flat, sizes: Sizes, costs: Costs, loss_source: str) -> None:
        self.references: dict[fx.Node, Reference] = {}
        self._loss_source = loss_source
        self._flat = flat
        self._sizes = sizes
        self._costs = costs

    def walk(self, module: fx.GraphModule, prefix: str, region: Region) -> Reference:
        """Append the operations of a (sub)graph and return the reference, or references, of its output."""
        output: Reference = None
        for node in module.graph.nodes:
            if node.op == "output":
                given = node.args[0]
                several = isinstance(given, list | tuple)
                output = [self._reference(item) for item in given] if several else self._reference(given)
            elif node.op == "get_attr":
                self._attribute(node, module, prefix)
            elif node.op == "call_function":
                self._call(node, prefix, region)
            elif node.op != "placeholder" and node.target != "_guards_fn":
                raise _unsupported(node, str(node.target))
        return output

    def _attribute(self, node: fx.Node, module: fx.GraphModule, prefix: str) -> None:
        value = operator.attrgetter(str(node.target))(module)
        if isinstance(value, torch.Tensor):
            name = f"constant.{prefix}{node.name}"
            self._flat.attributes[name] = value
            self.references[node] = Name(name)
        else:
            self.references[node] = value

    def _call(self, node: fx.Node, prefix: str, region: Region) -> None:
        target = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            self._inline(node, target, prefix, region)
            return
        if target is operator.getitem and isinstance(self._reference(node.args[0]), list):
            self.references[node] = self._reference(node.args[0])[node.args[1]]
            return
        name = _target_name(node)
        if name.startswith(("aten._assert", "aten.sym_constrain")):
            return
        if is_custom(name):
            check_custom_operator(node, name)
        elif not is_allowed(name):
            raise _unsupported(node, name)
        if _asks_for_sparse_gradients(node):
            raise ModelError(
                f"{name} makes sparse gradients, at {location_of_node(node)}",
                expected="dense gradients",
                got="sparse=True",
                remedy="build the embedding with sparse=False",
            )
        operation = self._operation(node, name, prefix + node.name, region)
        self.references[node] = Name(operation.name)
        self._flat.operations.append(operation)

    def _inline(self, node: fx.Node, target: torch._ops.HigherOrderOperator, prefix: str, region: Region) -> None:
        kind = str(target.name())  # type: ignore[no-untyped-call]
        given = [self._reference(argument) for argument in node.args]
        if kind == "wrap_with_set_grad_enabled":
            enabled, inner, *operands = given
            region = replace(region, no_grad=not enabled)
        elif kind == "wrap_with_autocast":
            device, dtype, enabled, _cache, inner, *operands = given
            autocast = pb.Autocast(device_kind=device, enabled=enabled)
            if dtype is not None:
                autocast.data_type = DATA_TYPES[dtype]
            region = replace(region, autocast=(*region.autocast, autocast))
        elif kind == "tag_activation_checkpoint":
            inner, *operands = given
        else:
            raise _unsupported(node, kind)
        placeholders = [item for item in inner.graph.nodes if item.op == "placeholder"]
        self.references.update(zip(placeholders, operands, strict=True))
        self.references[node] = self.walk(inner, f"{prefix}{node.name}.", region)

    def _operation(self, node: fx.Node, target: str, name: str, region: Region) -> Operation:
        where = location_of_node(node)
        if not where.source and not is_in_model(node):
            where = replace(where, source=self._loss_source)
        value = node.meta.get("val")
        self._sizes.learn(value, [_value(argument) for argument in node.all_input_nodes])
        flops, moved = self._costs.of(node, target)
        arguments, keywords = self._with_local_sizes(node, target, name, where)
        drawn = draws(node.target, node.args, node.kwargs)
        result = pb.Node(
            name=name,
            target=target,
            arguments=[self._argument(item, node) for item in arguments],
            keyword_arguments=[pb.NamedArgument(name=k, value=self._argument(v, node)) for k, v in keywords.items()],
            module_path=where.module_path,
            source=where.source,
            no_grad=region.no_grad,
            autocast=region.autocast,
            random=drawn > 0,
            output=self._sizes.spec(value, str(where)),
            flops=flops,
            bytes=moved,
        )
        reads = tuple(dict.fromkeys(read_names(result)))
        writes, aliases = self._effects(node, target, result, reads)
        return Operation(result, reads, writes, aliases, is_in_model(node), drawn)

    def _with_local_sizes(
        self, node: fx.Node, target: str, name: str, where: Location
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Take sizes from the operator's own tensors, so that they need not travel between stages."""
        if target in _RESHAPING and isinstance(node.args[1], list | tuple):
            symbolic = [size for size in node.args[1] if isinstance(size, fx.Node)]
            if len(symbolic) == 1 and all(size is symbolic[0] or _positive(size) for size in node.args[1]):
                return [node.args[0], [-1 if size is symbolic[0] else size for size in node.args[1]]], node.kwargs
        taken: dict[str, Name] = {}

        def local(item: Any) -> Any:
            found = _own_size(item, node) if isinstance(item, fx.Node) else None
            if found is None:
                return item
            tensor, dimension = found
            read = self._reference(tensor)
            key = f"{name}.{read.text}.size{dimension}"
            if key not in taken:
                taken[key] = Name(key)
                arguments = [pb.Argument(value=read.text), pb.Argument(integer=dimension)]
                spec = pb.ValueSpec(kind=pb.VALUE_KIND_INTEGER)
                size = pb.Node(name=key, target=_SIZE, arguments=arguments, output=spec)
                size.module_path, size.source = where.module_path, where.source
                self._flat.operations.append(Operation(size, (read.text,), (), (), is_in_model(node)))
            return taken[key]

        if target == _SIZE:
            return node.args, node.kwargs
        return fx.node.map_aggregate((node.args, node.kwargs), local)

    def _effects(
        self, node: fx.Node, target: str, result: pb.Node, reads: tuple[str, ...]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Mark what the operator writes to; return the values written to and those that the output may alias."""
        if target == GETITEM or target in UNANNOTATED_ALIASES:
            return (), reads
        if not isinstance(node.target, torch._ops.OpOverload):
            return (), ()
        writes: list[pb.Argument] = []
        aliases: list[pb.Argument] = []
        named = {item.name: item.value for item in result.keyword_arguments}
        hidden = HIDDEN_MUTATIONS.get(target, ()) if _training(node) else ()
        for position, argument in enumerate(node.target._schema.arguments):
            info = argument.alias_info
            positional = position < len(result.arguments)
            if positional and (position in hidden or (info is not None and info.is_write)):
                result.mutated_arguments.append(position)
                writes.append(result.arguments[position])
            elif argument.name in named and info is not None and info.is_write:
                result.mutated_keyword_arguments.append(argument.name)
                writes.append(named[argument.name])
            if info is not None and (positional or argument.name in named):
                aliases.append(result.arguments[position] if positional else named[argument.name])
        return _names(writes), _names(aliases)

    def _argument(self, value: Any, node: fx.Node) -> pb.Argument:
        value = self._reference(value)
        if isinstance(value, list | tuple):
            return pb.Argument(list=pb.ArgumentList(items=[self._argument(item, node) for item in value]))
        argument = literal(value)
        if argument is None:
            shown = value if isinstance(value, torch.dtype | torch.layout) else f"of type {type(value).__name__}"
            raise _unsupported(node, f"{node.target} with an argument {shown}")
        return argument

    def _reference(self, value: Any) -> Reference:
        return self.references[value] if isinstance(value, fx.Node) else value


def _names(arguments: Sequence[pb.Argument]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for argument in arguments for name in argument_names(argument)))


def _target_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = f"python.{_PYTHON_NAMES.get(target, '')}"
    if name not in PYTHON_FUNCTIONS:
        raise _unsupported(node, getattr(target, "__name__", str(target)))
    return name


def _positive(size: Any) -> bool:
    return isinstance(size, int) and size > 0


def _own_size(item: fx.Node, reader: fx.Node) -> tuple[fx.Node, int] | None:
    """Find a dimension of a tensor that `reader` reads anyway, of the same symbolic size as `item`."""
    wanted = _value(item)
    if not isinstance(wanted, torch.SymInt):
        return None
    for tensor in reader.all_input_nodes:
        for dimension, size in enumerate(getattr(_value(tensor), "shape", ())):
            if isinstance(size, torch.SymInt) and size.node.expr == wanted.node.expr:
                return tensor, dimension
    return None


def _asks_for_sparse_gradients(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    arguments = schema.arguments if schema is not None else ()
    return any(argument.name == "sparse" and value for argument, value in zip(arguments, node.args, strict=False))


def _training(node: fx.Node) -> bool:
    return len(node.args) <= _TRAINING_ARGUMENT or node.args[_TRAINING_ARGUMENT] is True


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _unsupported(node: fx.Node, what: str) -> ModelError:
    known = known_obstacle(what)
    if known is not None:
        return ModelError(
            f"{known[0]} cannot be part of a graph, at {location_of_node(node)}",
            expected="operators of the allow-list (gradwire_protocol/operators.py)",
            got=what,
            remedy=known[1],
        )
    return ModelError(
        f"Operator {what} is not allowed in a graph, at {location_of_node(node)}",
        expected="operators of the allow-list (gradwire_protocol/operators.py)",
        got=what,
        remedy="write that line with other torch operators, or ask for the operator to be added to the list",
    )
