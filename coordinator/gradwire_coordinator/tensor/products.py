"""Rules of products, attention, embeddings and cross entropy: where tensor parallelism gains, and where sums are made.

By outputs ("column"): whole inputs times a part of the weight give a part of the outputs. By inputs ("row"): a part of
the inputs times a part of the weight give a share of all outputs, which are added up (Shoeybi et al., 2019).
"""

from __future__ import annotations

from gradwire_coordinator.tensor.calls import (
    argument,
    boolean_of,
    integer_of,
    of_value,
    real_of,
    set_argument,
    value_of,
)
from gradwire_coordinator.tensor.known_values import Place
from gradwire_coordinator.tensor.parts import Part
from gradwire_coordinator.tensor.rewriter import NotKeptError, Rewriter, Rule
from gradwire_protocol.group_operators import ATTENTION, CROSS_ENTROPY, EMBEDDING
from gradwire_protocol.v1 import graph_pb2, tensors_pb2

_INTEGERS = (
    *(tensors_pb2.DATA_TYPE_INT64, tensors_pb2.DATA_TYPE_INT32, tensors_pb2.DATA_TYPE_INT16),
    *(tensors_pb2.DATA_TYPE_INT8, tensors_pb2.DATA_TYPE_UINT8),
)


def linear(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """x @ weight.t() + bias; the weight is (outputs, inputs)."""
    return _product(rewriter, node, x=0, weight=1, bias=2, outputs=0)


def addmm(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """Bias + x @ weight; the weight is (inputs, outputs)."""
    if any(real_of(node, 9, name, 1.0) != 1.0 for name in ("alpha", "beta")):
        raise NotKeptError
    return _product(rewriter, node, x=1, weight=2, bias=0, outputs=1)


def _product(rewriter: Rewriter, node: graph_pb2.Node, *, x: int, weight: int, bias: int, outputs: int) -> Place:
    """x, weight, bias: positions of the operands. outputs: the dimension of the weight."""
    source, factor, added = (
        value_of(node, at, name) for at, name in ((x, "input"), (weight, "weight"), (bias, "bias"))
    )
    last = len(rewriter.sizes(source)) - 1
    given = rewriter.part_of(source)
    if given is not None and given.dim == last:
        rewriter.suggest(factor, given.at(1 - outputs))
    split = rewriter.part_of(factor)
    if len(rewriter.sizes(factor)) != 2:
        raise NotKeptError
    if split is None:
        if given is None or given.dim == last:
            raise NotKeptError
        # Of other rows each server has its own: a share of the weight's gradient.
        _set(node, weight, factor, rewriter.copied(factor))
        if added:
            if len(rewriter.sizes(added)) != 1:
                raise NotKeptError
            _set(node, bias, added, rewriter.copied(added))
        return rewriter.keep(node, given)
    if split.dim == outputs:
        made = Part(last, split.sections)
        _set(node, x, source, rewriter.copied(rewriter.whole(source)))
        if added:
            of_bias = len(rewriter.sizes(added))
            if not of_bias or rewriter.sizes(added)[-1] != split.size:
                raise NotKeptError
            _set(node, bias, added, rewriter.part(added, Part(of_bias - 1, split.sections)))
        return rewriter.keep(node, made)
    if given != Part(last, split.sections):
        source_part = rewriter.part(rewriter.whole(source), Part(last, split.sections))
        _set(node, x, source, source_part)
    if not added:
        return rewriter.summed(node)
    whole_bias = rewriter.whole(added)
    alone = rewriter.beside(
        node.name,
        "aten.linear.default" if node.target == "aten.linear.default" else "aten.mm.default",
        [node.arguments[x], node.arguments[weight]],
        node.output,
    )
    alone.flops.CopyFrom(node.flops)
    alone.bytes.CopyFrom(node.bytes)
    return rewriter.summed(alone, lambda total, name: _plus(rewriter, node, total, name, whole_bias))


def _plus(rewriter: Rewriter, node: graph_pb2.Node, total: str, name: str, bias: str) -> graph_pb2.Node:
    """Add the bias to a sum, in the sum's type: a product casts its bias where autocast rules."""
    data_type = node.output.data_type
    if rewriter.spec(bias).data_type != data_type:
        output = graph_pb2.ValueSpec()
        output.CopyFrom(rewriter.spec(bias))
        output.data_type = data_type
        bias = rewriter.make(
            f"{name}.bias", "aten.to.dtype", [of_value(bias), graph_pb2.Argument(data_type=data_type)], output, None
        )
    return rewriter.beside(name, "aten.add.Tensor", [of_value(total), of_value(bias)], node.output)


def _set(node: graph_pb2.Node, position: int, before: str, after: str) -> None:
    """Put another value in the place of an operand, wherever it is given."""
    if before == after:
        return
    if position < len(node.arguments):
        node.arguments[position].value = after
        return
    for item in node.keyword_arguments:
        if item.value.value == before:
            item.value.value = after


def matmul(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """matmul, mm, bmm: of matrices, or batches of them."""
    left, right = value_of(node, 0, "self"), value_of(node, 1, "other")
    left_count, right_count = len(rewriter.sizes(left)), len(rewriter.sizes(right))
    if left_count < 2 or right_count < 2:
        raise NotKeptError
    given = rewriter.part_of(left)
    if given is not None and given.dim == left_count - 1:
        rewriter.suggest(right, Part(right_count - 2, given.sections))
    first, second = _from_end(given, left_count), _from_end(rewriter.part_of(right), right_count)
    count = len(node.output.shape)
    if first is not None and second is not None:
        if first.dim == -1 and second == Part(-2, first.sections):
            return rewriter.summed(node)
        if first == second and first.dim < -2:
            return rewriter.keep(node, first.at(count + first.dim))
        raise NotKeptError
    if second is not None and second.dim == -1:
        _set(node, 0, left, rewriter.copied(left))
        return rewriter.keep(node, second.at(count - 1))
    if second is not None and second.dim == -2 and left_count >= 2:
        made = rewriter.part(left, Part(left_count - 1, second.sections))
        _set(node, 0, left, made)
        return rewriter.summed(node)
    if first is not None and first.dim == -2:
        _set(node, 1, right, rewriter.copied(right))
        return rewriter.keep(node, first.at(count - 2))
    own, position, value, other = (first, 1, right, right_count) if first is not None else (second, 0, left, left_count)
    if own is None or own.dim >= -2:
        raise NotKeptError
    dim = other + own.dim
    if dim < 0 or rewriter.sizes(value)[dim] == 1:
        made = rewriter.copied(value)
    else:
        made = rewriter.part(value, own.at(dim))
    _set(node, position, value, made)
    return rewriter.keep(node, own.at(count + own.dim))


def _from_end(part: Part | None, count: int) -> Part | None:
    return None if part is None else part.at(part.dim - count)


def attention(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """Each server has some heads. With dropout it draws for all of them."""
    names = ("query", "key", "value")
    values = [value_of(node, position, name) for position, name in enumerate(names)]
    counts = {len(rewriter.sizes(value)) for value in values}
    if counts != {4}:
        raise NotKeptError
    found = {part.sections for value in values if (part := rewriter.part_of(value)) is not None}
    if any((part := rewriter.part_of(value)) is not None and part.dim != 1 for value in values):
        raise NotKeptError
    grouped = boolean_of(node, 7, "enable_gqa", default=False)
    query = rewriter.part_of(values[0]) or Part(1, (rewriter.sizes(values[0])[1],))
    if not found or any(len(sections) != 1 for sections in found):
        raise NotKeptError
    for position, (value, name) in enumerate(zip(values, names, strict=True)):
        heads = rewriter.sizes(value)[1]
        if heads % rewriter.shards or (heads != query.size and not (grouped and position)):
            raise NotKeptError
        set_argument(node, position, name, of_value(rewriter.part(value, Part(1, (heads,)), optional=True)))
    mask = value_of(node, 3, "attn_mask")
    if mask:
        set_argument(node, 3, "attn_mask", of_value(_mask(rewriter, mask, query)))
    if real_of(node, 4, "dropout_p", 0.0) != 0.0:
        node.target = ATTENTION
    return rewriter.keep(node, query)


def _mask(rewriter: Rewriter, mask: str, query: Part) -> str:
    sizes = rewriter.sizes(mask)
    dim = len(sizes) - 3
    part = rewriter.part_of(mask)
    if part is not None:
        if part != query.at(dim):
            raise NotKeptError
        return mask
    if dim < 0 or sizes[dim] == 1:
        return rewriter.copied(mask)
    return rewriter.part(mask, query.at(dim), optional=True)


def embedding(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """By rows of the table: a share of each row that is looked up. By its columns: a part of it."""
    table, indices = value_of(node, 0, "weight"), value_of(node, 1, "indices")
    part = rewriter.part_of(table)
    if part is None or rewriter.part_of(indices) is not None:
        raise NotKeptError
    if part.dim == 1:
        return rewriter.keep(node, Part(len(node.output.shape) - 1, part.sections))
    scaled = boolean_of(node, 3, "scale_grad_by_freq", default=False)
    if scaled or boolean_of(node, 4, "sparse", default=False) or len(part.sections) != 1:
        raise NotKeptError
    padding = integer_of(node, 2, "padding_idx", -1)
    if padding is None:
        raise NotKeptError
    made = rewriter.beside(
        node.name, EMBEDDING, [of_value(table), of_value(indices), graph_pb2.Argument(integer=padding)], node.output
    )
    made.bytes.CopyFrom(node.bytes)
    return rewriter.summed(made)


def cross_entropy(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """Of scores of which each server has a part of the classes."""
    scores, target = value_of(node, 0, "self"), value_of(node, 1, "target")
    part = rewriter.part_of(scores)
    classes = 1 if len(rewriter.sizes(scores)) > 1 else 0
    if (
        part is None
        or part.dim != classes
        or len(part.sections) != 1
        or rewriter.spec(target).data_type not in _INTEGERS
        or rewriter.part_of(target) is not None
    ):
        raise NotKeptError
    weights = argument(node, 2, "weight")
    if weights is not None and rewriter.part_of(weights.value) is not None:
        raise NotKeptError
    node.target = CROSS_ENTROPY
    return rewriter.keep(node, None)


RULES: dict[str, Rule] = {
    "aten.linear.default": linear,
    "aten.addmm.default": addmm,
    **dict.fromkeys(
        ("aten.matmul.default", "aten.mm.default", "aten.bmm.default", "aten.linalg_matmul.default"), matmul
    ),
    "aten.scaled_dot_product_attention.default": attention,
    "aten.embedding.default": embedding,
    "aten.cross_entropy_loss.default": cross_entropy,
}
