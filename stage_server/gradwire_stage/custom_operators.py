"""Custom operators: imports the modules that whoever starts this server names, and admits what they define.

A message never names a module. Leaves torch's own operators to `operators.py`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import structlog
import torch
from torch._ops import OpOverload

from gradwire_protocol.errors import SettingsError
from gradwire_protocol.operators import (
    MAXIMUM_CUSTOM_OPERATORS,
    MAXIMUM_SCHEMA_BYTES,
    MAXIMUM_TARGET_BYTES,
    is_custom,
)
from gradwire_protocol.v1 import graph_pb2 as pb

_log = structlog.get_logger(__name__)


def load_operators(modules: Sequence[str]) -> dict[str, OpOverload]:
    """Import modules and return the operators that came with them, by target. SettingsError.

    A module is given as [DIRECTORY/]NAME; NAME may end in .py. The directory is searched last, so that nothing in it
    stands in for what is installed. Operators that write to their arguments are left out: a micro-batch would see what
    another one wrote.
    """
    before = _known()
    for module in modules:
        _import(module)
    admitted: dict[str, OpOverload] = {}
    for name in sorted(_known() - before):
        operator = _overload(name)
        if operator is None or not is_custom(str(operator)):
            continue
        schema = operator._schema
        if any(item.alias_info is not None for item in (*schema.arguments, *schema.returns)):
            _log.warning("operator not admitted: it writes to its arguments, or returns them", operator=str(operator))
        elif len(str(operator).encode()) > MAXIMUM_TARGET_BYTES or len(str(schema).encode()) > MAXIMUM_SCHEMA_BYTES:
            _log.warning("operator not admitted: its name or schema is too long", operator=str(operator))
        else:
            admitted[str(operator)] = operator
    if modules and not 1 <= len(admitted) <= MAXIMUM_CUSTOM_OPERATORS:
        raise SettingsError(
            "The modules of --operators define no operators that can be admitted, or too many",
            expected=f"1 to {MAXIMUM_CUSTOM_OPERATORS}, in namespaces of their own",
            got=f"{len(admitted)} from {', '.join(modules)}",
            remedy="name modules that define operators when they are imported, as torch.library.custom_op does",
        )
    if admitted:
        _log.info("custom operators admitted", operators=list(admitted))
    return admitted


def described(operators: Mapping[str, OpOverload]) -> Iterable[pb.CustomOperator]:
    """Yield what the coordinator is told of the operators."""
    for target, operator in operators.items():
        yield pb.CustomOperator(target=target, schema=str(operator._schema))


def _known() -> set[str]:
    return set(torch._C._dispatch_get_all_op_names())


def _overload(qualified: str) -> OpOverload | None:
    """Find "namespace::name.overload"; None where only an implementation is there, without a schema."""
    namespace, _, rest = qualified.partition("::")
    name, _, overload = rest.partition(".")
    found = getattr(getattr(getattr(torch.ops, namespace), name, None), overload or "default", None)
    return found if isinstance(found, OpOverload) else None


def _import(item: str) -> None:
    path = Path(item)
    by_path = item.endswith(".py") or path.name != item
    name = path.name.removesuffix(".py") if by_path else item
    directory = path.parent.absolute()
    if not all(part.isidentifier() for part in name.split(".")):
        raise SettingsError("Not a module for --operators", expected="[DIRECTORY/]MODULE", got=repr(item))
    if by_path and str(directory) not in sys.path:
        sys.path.append(str(directory))
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise SettingsError(
            f"The module '{name}' of --operators cannot be imported",
            expected="a module of this Python environment, or the path of one",
            got=f"{type(error).__name__}: {error}",
            remedy="give its path (./my_operators.py), or install it where the stage server runs",
        ) from error
    file = getattr(module, "__file__", None)
    if by_path and file is not None and not Path(file).absolute().is_relative_to(directory):
        raise SettingsError(
            f"Another module '{name}' is in the way of the one of --operators",
            expected=f"a module in {directory}",
            got=str(file),
            remedy="give the module another name",
        )
