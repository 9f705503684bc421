"""Estimates the work of operators: floating-point operations, and bytes read and written, affine in the rows.

Counts the forward pass only; what the numbers mean in seconds is left to the planner.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from gradwire.graph.sizes import HIGH, LOW, Sizes, affine
from gradwire_protocol.v1 import graph_pb2 as pb

# Operators worth counting; torch counts nothing for elementwise ones.
_COUNTED = frozenset(
    f"aten.{name}"
    for name in (
        *("linear.default", "bilinear.default", "matmul.default", "mm.default", "bmm.default", "addmm.default"),
        *("addmm_.default", "addbmm.default", "baddbmm.default", "baddbmm_.default", "einsum.default"),
        *("tensordot.default", "inner.default", "linalg_matmul.default", "chain_matmul.default"),
        *("linalg_multi_dot.default", "mv.default", "addmv.default", "outer.default"),
        *("conv1d.default", "conv1d.padding", "conv2d.default", "conv2d.padding", "conv3d.default", "conv3d.padding"),
        *("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input", "convolution.default"),
        *("_convolution.default", "conv_tbc.default"),
    )
)
_ATTENTION = "aten.scaled_dot_product_attention.default"
_RECURRENT = frozenset(f"aten.{name}.input" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"))
# Views in name that usually move their elements.
_COPYING = frozenset(
    {"aten.contiguous.default", "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.to.other"}
)


class Costs:
    """Costs of traced nodes, at the numbers of rows that `sizes` evaluates at."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._counted: dict[str, int] = {}

    def of(self, node: fx.Node, target: str) -> tuple[pb.AffineSize, pb.AffineSize]:
        """Return floating-point operations and bytes of one call."""
        moved = affine(*(self._bytes(node, target, rows) for rows in (LOW, HIGH)))
        if target in _RECURRENT:
            flops = affine(*(self._recurrent_flops(node, rows) for rows in (LOW, HIGH)))
        elif target == _ATTENTION:
            flops = affine(*(self._attention_flops(node, rows) for rows in (LOW, HIGH)))
        elif target in _COUNTED:
            flops = affine(*(self._flops(node, rows) for rows in (LOW, HIGH)))
        else:
            flops = pb.AffineSize()
        return flops, moved

    def _bytes(self, node: fx.Node, target: str, rows: int) -> int:
        if not isinstance(node.target, torch._ops.OpOverload) or (_is_view(node.target) and target not in _COPYING):
            return 0
        values = [_traced(item) for item in (node, *node.all_input_nodes)]
        return sum(self._elements(tensor, rows) * tensor.itemsize for tensor in _tensors(values))

    def _attention_flops(self, node: fx.Node, rows: int) -> int:
        """Both products, as torch counts them: masked and causal positions included."""
        query, key, value = _tensors([_traced(item) for item in node.args[:3] if isinstance(item, fx.Node)])
        scores = self._elements(query, rows) * self._sizes.at(key.shape[-2], rows)
        return 2 * scores + 2 * scores // self._sizes.at(query.shape[-1], rows) * self._sizes.at(value.shape[-1], rows)

    def _recurrent_flops(self, node: fx.Node, rows: int) -> int:
        """Two for each weight, row and time step; weights stand one dimension below their biases."""
        values = [_traced(item) for item in node.all_input_nodes]
        sequence, *others = _tensors(values)
        steps = self._elements(sequence, rows) // max(self._sizes.at(sequence.shape[-1], rows), 1)
        return 2 * steps * sum(self._elements(tensor, rows) for tensor in others if tensor.dim() == 2)

    def _flops(self, node: fx.Node, rows: int) -> int:
        """Count as torch's FlopCounterMode does, on tensors without data; equal calls are counted once."""

        def described(item: Any) -> Any:
            value = _traced(item) if isinstance(item, fx.Node) else item
            if isinstance(value, torch.Tensor):
                return [tuple(self._sizes.at(size, rows) for size in value.shape), value.dtype]
            return self._sizes.at(value, rows) if isinstance(value, torch.SymInt) else value

        arguments, keywords = tree_map(described, (node.args, node.kwargs))
        key = f"{node.target} {arguments} {keywords}"
        if key not in self._counted:
            with FakeTensorMode(), FlopCounterMode(display=False) as counter:

                def empty(item: Any) -> Any:
                    value = _traced(item) if isinstance(item, fx.Node) else item
                    if isinstance(value, torch.Tensor):
                        shape = [self._sizes.at(size, rows) for size in value.shape]
                        return torch.empty(shape, dtype=value.dtype, device=value.device)
                    return self._sizes.at(value, rows) if isinstance(value, torch.SymInt) else value

                node.target(*tree_map(empty, node.args), **tree_map(empty, node.kwargs))  # type: ignore[operator]
            self._counted[key] = counter.get_total_flops()
        return self._counted[key]

    def _elements(self, tensor: torch.Tensor, rows: int) -> int:
        return math.prod(self._sizes.at(size, rows) for size in tensor.shape)


def _is_view(target: torch._ops.OpOverload) -> bool:
    """Whether the operator returns its argument's memory and writes nothing."""
    returns, arguments = target._schema.returns, target._schema.arguments
    return any(item.alias_info is not None for item in returns) and not any(
        item.alias_info is not None and item.alias_info.is_write for item in arguments
    )


def _traced(node: fx.Node) -> Any:
    return node.meta.get("val")


def _tensors(values: list[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
