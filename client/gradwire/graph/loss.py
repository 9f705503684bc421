"""Rewrites a final mean-reduced cross entropy as (sum, weight).

A mean of means is wrong where micro-batches count differently (`ignore_index`, class weights): the sum and the
weight of each micro-batch add up to the mean over the whole batch. Other losses stay means over rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from gradwire.graph.operations import Operation, read_names
from gradwire_protocol.v1 import graph_pb2 as pb
from gradwire_protocol.v1 import tensors_pb2

_CROSS_ENTROPY = "aten.cross_entropy_loss.default"
_LOSSES = (_CROSS_ENTROPY, "aten.nll_loss.default", "aten.nll_loss_nd.default")
# Operators that a scalar passes through unchanged, but for its dtype or device.
_TRANSPARENT = (
    *("aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.to.other", "aten._to_copy.default"),
    *("aten.alias.default", "aten.clone.default", "aten.contiguous.default"),
)
_MEAN, _SUM = 1, 2
_INTEGERS = (
    *(tensors_pb2.DATA_TYPE_INT64, tensors_pb2.DATA_TYPE_INT32, tensors_pb2.DATA_TYPE_INT16),
    *(tensors_pb2.DATA_TYPE_INT8, tensors_pb2.DATA_TYPE_UINT8),
)


class Weighted(NamedTuple):
    """The operations with the loss as a sum, and the value of its weight."""

    operations: list[Operation]
    weight: str


def as_sum_and_weight(operations: Sequence[Operation], loss: str, specs: Mapping[str, pb.ValueSpec]) -> Weighted | None:
    """Rewrite the loss; None if it does not end in a mean cross entropy over class indices."""
    found = _final_loss(operations, loss)
    if found is None:
        return None
    index, node = found
    target, class_weights = node.arguments[1].value, _argument(node, 2, "weight")
    smoothing = _argument(node, 5, "label_smoothing") if node.target == _CROSS_ENTROPY else None
    smoothed = smoothing is not None and smoothing.real != 0
    if specs[target].data_type not in _INTEGERS or (smoothed and class_weights is not None):
        return None
    ignored = _argument(node, 4, "ignore_index")
    summed = pb.Node()
    summed.CopyFrom(node)
    _set_reduction(summed)
    rewritten = list(operations)
    rewritten[index] = replace(operations[index], node=summed)
    weight = _weight(node, target, class_weights, ignored or pb.Argument(integer=-100), specs)
    return Weighted(rewritten + weight, weight[-1].name)


def _final_loss(operations: Sequence[Operation], loss: str) -> tuple[int, pb.Node] | None:
    """Find the cross entropy that gives `loss` and nothing else."""
    position = {operation.name: index for index, operation in enumerate(operations)}
    readers = Counter(name for operation in operations for name in operation.reads)
    name, allowed_readers = loss, 0
    while name in position and readers[name] == allowed_readers:
        operation = operations[position[name]]
        node = operation.node
        if node.target in _LOSSES:
            reduction = _argument(node, 3, "reduction")
            is_mean = reduction is None or reduction.integer == _MEAN
            return (position[name], node) if is_mean and not node.no_grad else None
        if node.target not in _TRANSPARENT:
            return None
        name, allowed_readers = operation.reads[0], 1
    return None


def _argument(node: pb.Node, position: int, name: str) -> pb.Argument | None:
    """An argument by position or name; None if it is not given, or given as None."""
    named = {item.name: item.value for item in node.keyword_arguments}
    argument = node.arguments[position] if position < len(node.arguments) else named.get(name)
    return None if argument is None or argument.WhichOneof("kind") == "none" else argument


def _set_reduction(node: pb.Node) -> None:
    for item in node.keyword_arguments:
        if item.name == "reduction":
            item.value.integer = _SUM
            return
    if len(node.arguments) > 3:
        node.arguments[3].integer = _SUM
    else:
        node.keyword_arguments.add(name="reduction", value=pb.Argument(integer=_SUM))


def _weight(
    loss: pb.Node,
    target: str,
    class_weights: pb.Argument | None,
    ignored: pb.Argument,
    specs: Mapping[str, pb.ValueSpec],
) -> list[Operation]:
    """Operations for the weight of the mean: the targets that count, or the sum of their class weights."""
    targets = pb.Argument(value=target)
    shape = specs[target].shape
    scalar = pb.ValueSpec(kind=pb.VALUE_KIND_TENSOR, data_type=tensors_pb2.DATA_TYPE_FLOAT64)

    def like_target(data_type: tensors_pb2.DataType) -> pb.ValueSpec:
        return pb.ValueSpec(kind=pb.VALUE_KIND_TENSOR, data_type=data_type, shape=shape)

    made: list[Operation] = []

    def call(name: str, operator: str, output: pb.ValueSpec, *arguments: pb.Argument) -> pb.Argument:
        node = pb.Node(
            name=f"{loss.name}.{name}",
            target=operator,
            arguments=arguments,
            module_path=loss.module_path,
            source=loss.source,
            no_grad=True,
            output=output,
        )
        made.append(Operation(node, tuple(dict.fromkeys(read_names(node))), (), (), in_model=False))
        return pb.Argument(value=node.name)

    boolean = like_target(tensors_pb2.DATA_TYPE_BOOL)
    counted = call("counted", "aten.ne.Scalar", boolean, targets, ignored)
    if class_weights is not None:
        indices = like_target(specs[target].data_type)
        weights = like_target(specs[class_weights.value].data_type)
        # Ignored targets, which may lie outside the classes, look up class 0 and then count nothing.
        classes = call("classes", "aten.mul.Tensor", indices, targets, counted)
        index = pb.Argument(list=pb.ArgumentList(items=[classes]))
        each = call("class_weights", "aten.index.Tensor", weights, class_weights, index)
        counted = call("weights", "aten.mul.Tensor", weights, each, counted)
    call("weight", "aten.sum.default", scalar, counted)
    double = pb.Argument(data_type=tensors_pb2.DATA_TYPE_FLOAT64)
    made[-1].node.keyword_arguments.add(name="dtype", value=double)
    return made
