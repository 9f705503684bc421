"""How a graph uses a parameter that is to be split: as a factor of which product, by which of its dimensions.

Leaves to others: which parameters are to be split (`tensor_plan.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gradwire_coordinator.graph_index import GraphIndex, read_values
from gradwire_coordinator.tensor.calls import integer_of, integers_of, value_of
from gradwire_coordinator.tensor.parts import Part, UnevenError, is_static, reshaped, sizes_of
from gradwire_protocol.v1 import graph_pb2

# Position of the weight, of the bias (−1: none), and of the input; whether the weight is (outputs, inputs).
_PRODUCTS = {
    "aten.linear.default": (1, 2, 0, True),
    "aten.addmm.default": (2, 0, 1, False),
    "aten.mm.default": (1, -1, 0, False),
    "aten.matmul.default": (1, -1, 0, False),
}
_TRANSPOSES = frozenset({"aten.t.default", "aten.mT.default", "aten.transpose.int", "aten.permute.default"})
_CASTS = frozenset({"aten.to.dtype", "aten._to_copy.default", "aten.alias.default", "aten.detach.default"})
_EMBEDDING = "aten.embedding.default"
# What values pass through between a product and where its outputs are cut up.
_MOST_STEPS = 16


@dataclass(frozen=True)
class Use:
    """One product, or a look-up (`is_embedding`), that a tensor is the weight of."""

    node: graph_pb2.Node
    tensor: str
    # Dimension of the tensor that runs over outputs; the other one runs over inputs, or over an embedding's rows.
    outputs: int
    is_embedding: bool
    # The value that it is multiplied by, and the tensor that is added to the product; empty: none.
    source: str
    bias: str


def uses_of(index: GraphIndex) -> Iterator[Use]:
    """Yield the products and look-ups of a graph whose weight is a matrix of the model, in order."""
    # Value -> the tensor that it is a view of, and whether transposed.
    views: dict[str, tuple[str, bool]] = {value: (tensor, False) for value, tensor in index.tensors.items()}
    for node in index.graph.nodes:
        if node.target in _TRANSPOSES | _CASTS and (source := value_of(node, 0, "self")) in views:
            tensor, transposed = views[source]
            if len(node.output.shape) == 2:
                views[node.name] = (tensor, transposed ^ (node.target in _TRANSPOSES))
            continue
        if node.target == _EMBEDDING and (table := value_of(node, 0, "weight")) in views:
            yield Use(node, views[table][0], 1, True, value_of(node, 1, "indices"), "")
            continue
        if node.target not in _PRODUCTS:
            continue
        weight_at, bias_at, source_at, outputs_first = _PRODUCTS[node.target]
        weight = value_of(node, weight_at, "weight")
        if weight not in views:
            continue
        tensor, transposed = views[weight]
        bias = value_of(node, bias_at, "bias") if bias_at >= 0 else ""
        yield Use(
            node=node,
            tensor=tensor,
            outputs=0 if outputs_first != transposed else 1,
            is_embedding=False,
            source=value_of(node, source_at, "input"),
            bias=index.tensors.get(bias, ""),
        )


def output_sections(index: GraphIndex, use: Use, shards: int) -> tuple[int, ...]:
    """Return of which sections a product's outputs consist: what they are cut up into, or one.

    They may pass through views and operators with one operand before that.
    """
    size = use.node.output.shape[-1].fixed
    part = Part(len(use.node.output.shape) - 1, (size,))
    nodes = index.graph.nodes
    waiting = [(use.node.name, part)]
    for _ in range(_MOST_STEPS):
        if not waiting:
            break
        value, part = waiting.pop(0)
        readers = [nodes[position] for position in index.readers.get(value, ()) if position < len(nodes)]
        found = [_cut_up(node, part) for node in readers] + [_sliced(readers, part)]
        for cut in found:
            if len(cut) > 1 and all(piece % shards == 0 for piece in cut):
                return tuple(cut)
        waiting += [(node.name, made) for node in readers if (made := _followed(node, value, part)) is not None]
    # Where the first of several dimensions counts what is fused: (…, 3, heads, size).
    return _counted(index, use, size, shards) or (size,)


def _cut_up(node: graph_pb2.Node, part: Part) -> list[int]:
    """Return the pieces into which a node cuts the last dimension; empty: it does not."""
    name = node.target.split(".")[1].removeprefix("unsafe_") if node.target.startswith("aten.") else ""
    if name == "glu" and integer_of(node, 1, "dim", -1) in (-1, part.dim):
        return [part.size // 2] * 2
    if name not in ("split", "split_with_sizes", "chunk"):
        return []
    dim = integer_of(node, 2, "dim", 0)
    given = integers_of(node, 1, "split_size_or_sections")
    if given is None or dim not in (-1, part.dim):
        return []
    if name == "split_with_sizes" or node.target == "aten.split.sizes":
        return given
    step = given[0] if name == "split" else -(-part.size // given[0])
    return [min(step, part.size - first) for first in range(0, part.size, step)]


def _sliced(readers: Sequence[graph_pb2.Node], part: Part) -> list[int]:
    """Return the pieces between the ends of slices along the last dimension."""
    ends = {0, part.size}
    for node in readers:
        if node.target == "aten.slice.Tensor" and integer_of(node, 1, "dim", 0) in (-1, part.dim):
            given = [integer_of(node, 2, "start", 0), integer_of(node, 3, "end", part.size)]
            ends |= {min(max(at + part.size if at < 0 else at, 0), part.size) for at in given if at is not None}
    return [end - first for first, end in itertools.pairwise(sorted(ends))]


def _followed(node: graph_pb2.Node, value: str, part: Part) -> Part | None:
    """Return where the dimension is in what a node makes of a value alone; None: it does not go on that simply."""
    tensors = [read for read in dict.fromkeys(read_values(node)) if read == value]
    if node.output.kind != graph_pb2.VALUE_KIND_TENSOR or len(tensors) != 1:
        return None
    sizes = sizes_of(node.output)
    if sizes and is_static(sizes[-1]) and sizes[-1] == part.size:
        return Part(len(sizes) - 1, part.sections)
    return None


def _counted(index: GraphIndex, use: Use, size: int, shards: int) -> tuple[int, ...]:
    before = sizes_of(use.node.output)
    nodes = index.graph.nodes
    for position in index.readers.get(use.node.name, ()):
        if position >= len(nodes) or nodes[position].target not in ("aten.view.default", "aten.reshape.default"):
            continue
        after = sizes_of(nodes[position].output)
        first = len(before) - 1
        if len(after) <= first + 1 or not is_static(after[first]) or after[first] < 2:
            continue
        count = after[first]
        try:
            whole = reshaped(Part(first, (size,)), before, after, shards)
        except UnevenError:
            whole = None
        if whole is None and size % count == 0 and (size // count) % shards == 0:
            sections = (size // count,) * count
            try:
                fused = reshaped(Part(first, sections), before, after, shards)
            except UnevenError:
                fused = None
            if fused is not None:
                return sections
        elif whole is not None and _is_unbound(index, nodes[position], first):
            return (size // count,) * count
    return ()


def _is_unbound(index: GraphIndex, view: graph_pb2.Node, dim: int) -> bool:
    """Whether a dimension of a view is taken apart item by item: then it counts what is fused, and not heads."""
    nodes = index.graph.nodes
    waiting = [(view, dim)]
    for _ in range(_MOST_STEPS):
        if not waiting:
            break
        made, at = waiting.pop(0)
        count = len(made.output.shape)
        for position in index.readers.get(made.name, ()):
            if position >= len(nodes):
                continue
            node = nodes[position]
            if node.target in ("aten.unbind.int", "aten.select.int"):
                if (integer_of(node, 1, "dim", 0) or 0) % count == at:
                    return True
            elif node.target == "aten.permute.default" and (order := integers_of(node, 1, "dims")) is not None:
                waiting.append((node, [item % count for item in order].index(at)))
            elif node.target == "aten.transpose.int":
                first, second = ((integer_of(node, place, "dim", 0) or 0) % count for place in (1, 2))
                waiting.append((node, {first: second, second: first}.get(at, at)))
    return False
