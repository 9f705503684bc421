"""Symbolic sizes of a traced graph as affine functions of the rows of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch

from gradwire_protocol.errors import ModelError
from gradwire_protocol.torch_tensors import DATA_TYPES
from gradwire_protocol.v1 import graph_pb2 as pb
from gradwire_protocol.v1 import tensors_pb2

# Small numbers of rows at which sizes and costs are evaluated; the last tells whether they are affine.
LOW, HIGH, PROBE = 2, 4, 7


def affine(low: int, high: int) -> pb.AffineSize:
    """The affine function with these values at LOW and HIGH rows."""
    per_row = (high - low) // (HIGH - LOW)
    return pb.AffineSize(fixed=low - LOW * per_row, per_row=per_row)


class Sizes:
    """Evaluates sizes that hold the symbol of the batch's rows, and symbols of sizes that depend on data."""

    def __init__(
        self, rows: torch.SymInt | int, example_rows: int, dynamic: Iterable[tuple[torch.SymInt | int, int]] = ()
    ) -> None:
        """`dynamic` gives the other sizes that differ from batch to batch, and the example's: they count as fixed."""
        self._symbol = rows.node.expr if isinstance(rows, torch.SymInt) else None
        self._example_rows = max(example_rows, LOW)
        self._data_dependent: dict[sympy.Symbol, sympy.Expr | int] = {}
        self._cache: dict[tuple[sympy.Expr, int], int] = {}
        for size, example in dynamic:
            if isinstance(size, torch.SymInt):
                (symbol,) = size.node.expr.free_symbols
                self._data_dependent[symbol] = sympy.solve(size.node.expr - example, symbol)[0]

    def learn(self, value: Any, inputs: Sequence[Any]) -> None:
        """Estimate the sizes that first appear in `value`: at most the elements of the smallest mask or index."""
        shapes = [size for tensor in _tensors(value) for size in tensor.shape]
        scalars = [value] if isinstance(value, torch.SymInt) else []
        for size in (*shapes, *scalars):
            if not isinstance(size, torch.SymInt):
                continue
            for symbol in size.node.expr.free_symbols - {self._symbol} - self._data_dependent.keys():
                tensors = _tensors(inputs)
                masks = [tensor for tensor in tensors if tensor.dtype == torch.bool] or tensors
                estimates = [_expression(mask.numel()) for mask in masks] if shapes else []
                self._data_dependent[symbol] = min(estimates, key=self._example, default=1)

    def at(self, size: Any, rows: int) -> int:
        """The size for a number of rows."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        return self._evaluate(size.node.expr, rows)

    def affine(self, size: Any) -> pb.AffineSize:
        """The size as an affine function; where it is not affine, its value at the example's rows."""
        if not isinstance(size, torch.SymInt):
            return pb.AffineSize(fixed=int(size))
        expression = size.node.expr
        low, high, probe = (self._evaluate(expression, rows) for rows in (LOW, HIGH, PROBE))
        result = affine(low, high)
        if result.fixed + LOW * result.per_row != low or result.fixed + PROBE * result.per_row != probe:
            return pb.AffineSize(fixed=self._evaluate(expression, self._example_rows))
        return result

    def spec(self, value: Any, where: str) -> pb.ValueSpec:
        """Describe a traced value. ModelError for dtypes that cannot travel."""
        if isinstance(value, torch.Tensor):
            data_type = DATA_TYPES.get(value.dtype)
            if data_type is None:
                raise ModelError(
                    f"A tensor of {value.dtype} cannot travel between stages, at {where}",
                    expected=", ".join(str(dtype) for dtype in DATA_TYPES),
                    got=str(value.dtype),
                    remedy="convert it to one of these dtypes",
                )
            shape = [self.affine(size) for size in value.shape]
            return pb.ValueSpec(kind=pb.VALUE_KIND_TENSOR, data_type=data_type, shape=shape)
        if isinstance(value, bool | torch.SymBool):
            return pb.ValueSpec(kind=pb.VALUE_KIND_BOOLEAN)
        if isinstance(value, int | torch.SymInt):
            return pb.ValueSpec(kind=pb.VALUE_KIND_INTEGER)
        if isinstance(value, float | torch.SymFloat):
            return pb.ValueSpec(kind=pb.VALUE_KIND_REAL)
        return pb.ValueSpec(kind=pb.VALUE_KIND_NONE if value is None else pb.VALUE_KIND_TUPLE)

    def _evaluate(self, expression: sympy.Expr, rows: int) -> int:
        key = (expression, rows)
        if key not in self._cache:
            values: dict[Any, Any] = {
                symbol: self._evaluate(estimate, rows) if isinstance(estimate, sympy.Expr) else estimate
                for symbol, estimate in self._data_dependent.items()
                if symbol in expression.free_symbols
            }
            if self._symbol is not None:
                values[self._symbol] = rows
            self._cache[key] = int(expression.xreplace({k: sympy.sympify(v) for k, v in values.items()}))
        return self._cache[key]

    def _example(self, expression: sympy.Expr | int) -> int:
        return self._evaluate(expression, self._example_rows) if isinstance(expression, sympy.Expr) else expression


def fixed_spec(tensor: torch.Tensor) -> pb.ValueSpec:
    """Describe a tensor of fixed shape."""
    shape = [pb.AffineSize(fixed=size) for size in tensor.shape]
    return pb.ValueSpec(kind=pb.VALUE_KIND_TENSOR, data_type=DATA_TYPES[tensor.dtype], shape=shape)


def item_bytes(data_type: tensors_pb2.DataType) -> int:
    """Bytes of one element."""
    return _ITEM_BYTES[data_type]


_ITEM_BYTES = {number: dtype.itemsize for dtype, number in DATA_TYPES.items()}


def _expression(size: Any) -> sympy.Expr | int:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
