"""Dimensions besides the rows that differ from batch to batch, by the names that the user gives them.

Export says which sizes a graph takes: bounds, multiples, relations between names, and single sizes that it excludes.
Batches are checked against them here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.export import Dim, ExportedProgram

from gradwire_protocol.errors import BatchError, ModelError

# For each input, by key or position: dimension → name, or torch.export.Dim(name, min=…, max=…).
Dynamic = Mapping[str, Mapping[int, Any] | None] | Sequence[Mapping[int, Any] | None]
ROWS = "rows"
_FORM = (
    'for a dict example dynamic={"input_ids": {1: "length"}}, for a tuple one entry for each of its elements: '
    'dynamic=({1: "length"}, None)'
)


@dataclass(frozen=True)
class Size:
    """Which sizes a named dimension may have: offset + step × a whole number that all sizes of `root` share."""

    name: str
    root: str
    step: int
    offset: int
    lower: int
    upper: int | None
    excluded: frozenset[int] = frozenset()

    def __str__(self) -> str:
        bounds = f"{self.lower} or more" if self.upper is None else f"{self.lower} to {self.upper}"
        text = f"{self.name}: {bounds}"
        if self.step > 1:
            text += f", {f'{self.offset} plus ' if self.offset else ''}a multiple of {self.step}"
        return text + (f", not {', '.join(map(str, sorted(self.excluded)))}" if self.excluded else "")

    def takes(self, size: int) -> bool:
        """Whether a batch may have this size."""
        within = self.lower <= size and (self.upper is None or size <= self.upper)
        return within and size not in self.excluded and (size - self.offset) % self.step == 0


@dataclass(frozen=True)
class Measured:
    """The size of one dynamic dimension of a batch's input."""

    label: str
    dimension: int
    name: str
    size: int

    def __str__(self) -> str:
        return f"{self.label}, dimension {self.dimension} ('{self.name}'): {self.size}"


def read_dims(dynamic: Dynamic | None, labels: Sequence[str], by_name: bool) -> tuple[dict[str, dict[int, str]], Any]:
    """Return for each of the `labels` of a batch's elements its named dimensions, and the Dim of each name."""
    if dynamic is None:
        return {}, {}
    if isinstance(dynamic, Mapping) != by_name:
        raise _wrong_form(dynamic)
    entries = dict(dynamic) if isinstance(dynamic, Mapping) else dict(zip(labels, dynamic, strict=False))
    unknown = [str(key) for key in entries if key not in labels]
    if unknown or (not isinstance(dynamic, Mapping) and len(dynamic) != len(labels)):
        raise ModelError(
            "dynamic does not fit the example",
            expected=f"entries for {', '.join(labels)}",
            got=", ".join(unknown) or f"{len(dynamic)} entries",
            remedy=_FORM,
        )
    named: dict[str, dict[int, str]] = {}
    dims: dict[str, Any] = {}
    for label, entry in entries.items():
        if entry is not None and not isinstance(entry, Mapping):
            raise _wrong_form(entry)
        for dimension, given in (entry or {}).items():
            dim = _dim(given)
            if not isinstance(dimension, int) or (dim.__name__ in dims and dims[dim.__name__] != _bounds(dim)):
                raise _wrong_form(entry)
            dims[dim.__name__] = _bounds(dim)
            named.setdefault(label, {})[dimension] = dim.__name__
    return named, {name: Dim(name, min=bounds[0], max=bounds[1]) for name, bounds in dims.items()}


def check_dimension(label: str, tensor: torch.Tensor, dimension: int, name: str, batched: bool) -> None:
    """ModelError unless this dimension of an example's tensor can be dynamic."""
    if not int(batched) <= dimension < tensor.dim():
        raise ModelError(
            f"Dimension {dimension} of {label} cannot be dynamic ('{name}')",
            expected=f"a dimension from {int(batched)} to {tensor.dim() - 1}"
            + ("; dimension 0 is the batch, whose size may differ anyway" if batched else ""),
            got=str(dimension),
        )
    if tensor.shape[dimension] < 2:
        raise ModelError(
            f"The example has size {tensor.shape[dimension]} in dimension {dimension} of {label} ('{name}')",
            expected="2 or more: export builds sizes of 0 and 1 into the graph",
            got=str(tensor.shape[dimension]),
            remedy="give a larger example; batches may still be smaller",
        )


def take_sizes(program: ExportedProgram, measured: Iterable[tuple[str, Any, int]]) -> dict[str, Size]:
    """Return which sizes a program takes, from (name, symbolic size, the example's size) of each dimension.

    Its assertions on them are taken out: batches are checked instead.
    ModelError where the program assumes more of them than bounds, multiples and single excluded sizes.
    """
    excluded = _take_excluded(program)
    sizes: dict[str, Size] = {}
    for name, size, example in measured:
        expression = size.node.expr if isinstance(size, torch.SymInt) else None
        if expression is None or len(expression.free_symbols) != 1:
            raise _not_general(name, f"it is always {example} in the graph")
        (root,) = expression.free_symbols
        step, offset = expression.coeff(root), expression.subs(root, 0)
        if expression != step * root + offset or not (step.is_Integer and offset.is_Integer and step > 0):
            raise _not_general(name, f"it must be {expression}")
        bounds = program.range_constraints.get(root)
        lower = int(step * max(int(bounds.lower), 0) + offset) if bounds is not None else 1
        upper = int(step * bounds.upper + offset) if bounds is not None and _is_finite(bounds.upper) else None
        without = frozenset(int(step * value + offset) for value in excluded.get(root, ()))
        sizes[name] = Size(name, str(root), int(step), int(offset), max(lower, 1), upper, without)
    return sizes


def check_sizes(sizes: Mapping[str, Size], measured: Sequence[Measured]) -> None:
    """BatchError if the named dimensions of a batch do not agree with each other, or the graph does not take them."""
    by_name: dict[str, Measured] = {}
    by_root: dict[str, Measured] = {}
    for item in measured:
        other = by_name.setdefault(item.name, item)
        if other.size != item.size:
            raise _disagree(item, other, f"equal sizes, since both are '{item.name}'")
        size = sizes[item.name]
        if not size.takes(item.size):
            raise BatchError(
                f"{item.label} has a size in dimension {item.dimension} that the model does not take",
                expected=str(size),
                got=str(item.size),
                remedy="pad or cut the batch",
            )
        other = by_root.setdefault(size.root, item)
        if _root_value(sizes[other.name], other.size) != _root_value(size, item.size):
            raise _disagree(item, other, "sizes as in the example: the model ties them to each other")


def smallest(sizes: Mapping[str, Size]) -> dict[str, int]:
    """The smallest size of each name, such that the names fit together."""
    lowest: dict[str, int] = {}
    for size in sizes.values():
        value = math.ceil((size.lower - size.offset) / size.step)
        lowest[size.root] = max(lowest.get(size.root, value), value)
    return {name: size.offset + size.step * lowest[size.root] for name, size in sizes.items()}


def with_size(sizes: Mapping[str, Size], example: Mapping[str, int], name: str, value: int) -> dict[str, int]:
    """The example's sizes, but this value for one name, and what fits it for names tied to it."""
    root = _root_value(sizes[name], value)
    tied = {key: size.offset + size.step * root for key, size in sizes.items() if size.root == sizes[name].root}
    return {**example, **tied}


def found_right(sizes: Mapping[str, Size], before: Mapping[str, Size], after: Mapping[str, Size]) -> dict[str, Size]:
    """Sizes without the excluded ones that a comparison, from `before` to `after`, found right in another graph."""
    right = {name: before[name].excluded - after[name].excluded for name in sizes}
    return {name: replace(size, excluded=size.excluded - right[name]) for name, size in sizes.items()}


def _root_value(size: Size, value: int) -> int:
    return (value - size.offset) // size.step


def _take_excluded(program: ExportedProgram) -> dict[sympy.Symbol, set[int]]:
    """Take out the graph's assertions on sizes, and return the values that they exclude."""
    found: dict[sympy.Symbol, set[int]] = {}
    for node in list(program.graph.nodes):
        if node.target is not torch.ops.aten._assert_scalar.default:
            continue
        value = node.args[0].meta.get("val") if isinstance(node.args[0], torch.fx.Node) else None
        condition = value.node.expr if isinstance(value, torch.SymBool) else None
        symbols = program.range_constraints.keys() & (condition.free_symbols if condition is not None else set())
        if not symbols or any(str(symbol).startswith("u") for symbol in symbols):
            continue  # a size that depends on data: checked by the operators that read it
        symbol = next(iter(symbols))
        sides = sympy.solve(condition.lhs - condition.rhs, symbol) if isinstance(condition, sympy.Ne) else []
        if len(symbols) != 1 or len(sides) != 1 or not sides[0].is_Integer:
            raise _not_general(", ".join(map(str, symbols)), f"the model assumes {condition}")
        found.setdefault(symbol, set()).add(int(sides[0]))
        program.graph.erase_node(node)
    program.graph_module.recompile()
    return found


def _is_finite(value: Any) -> bool:
    return bool(getattr(value, "is_Integer", False)) or (isinstance(value, int) and value < 2**62)


def _dim(given: Any) -> Any:
    if isinstance(given, str) and given.isidentifier() and given != ROWS and not given.startswith("_"):
        return Dim(given, min=1)
    if isinstance(given, Dim) and hasattr(given, "min") and given.__name__ != ROWS:
        return given
    raise ModelError(
        "The name of a dynamic dimension is not valid",
        expected=f"an identifier other than '{ROWS}', such as 'length', or torch.export.Dim('length', min=2, max=512)",
        got=repr(given),
    )


def _bounds(dim: Any) -> tuple[int, int | None]:
    return max(int(dim.min), 1), int(dim.max) if _is_finite(dim.max) else None


def _wrong_form(got: Any) -> ModelError:
    return ModelError("dynamic is not understood", expected=_FORM, got=repr(got)[:200])


def _not_general(name: str, what: str) -> ModelError:
    return ModelError(
        f"The dimension '{name}' cannot differ from batch to batch",
        expected="a forward pass for any size of it",
        got=what,
        remedy="do not compare it with numbers or convert it to one; or leave it out of `dynamic`, and pad batches",
    )


def _disagree(item: Measured, other: Measured, expected: str) -> BatchError:
    return BatchError(
        f"The sizes of {other.label} and {item.label} do not fit together", expected=expected, got=f"{other}; {item}"
    )
