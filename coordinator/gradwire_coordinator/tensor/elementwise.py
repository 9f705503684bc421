"""Rules of operators that work element by element, with broadcasting, and of dropout."""

from __future__ import annotations

from gradwire_coordinator.graph_index import read_values
from gradwire_coordinator.tensor.calls import (
    boolean_of,
    integer_of,
    of_integer,
    of_integers,
    real_of,
    rename_values,
    written_values,
)
from gradwire_coordinator.tensor.known_values import Place
from gradwire_coordinator.tensor.parts import Part
from gradwire_coordinator.tensor.rewriter import NotKeptError, Rewriter, Rule
from gradwire_protocol.group_operators import DROPOUT
from gradwire_protocol.operators import ALLOWED_OPERATORS
from gradwire_protocol.v1 import graph_pb2

# Without a trailing "_", which marks an in-place variant.
_TABLE = """
    add sub mul div true_divide floor_divide rsub subtract multiply divide remainder fmod pow float_power maximum
    minimum fmax fmin atan2 hypot logaddexp logaddexp2 xlogy copysign heaviside lerp addcmul addcdiv eq ne ge gt le
    lt greater less greater_equal less_equal not_equal isnan isinf isfinite isclose logical_and logical_or
    logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not bitwise_left_shift bitwise_right_shift
    __and__ __iand__ __or__ __ior__ __xor__ __ixor__ __lshift__ __rshift__ abs absolute neg negative positive sign
    sgn signbit exp exp2 expm1 log log2 log10 log1p logit special_expit sqrt rsqrt square reciprocal sin sinc cos
    tan asin acos atan sinh cosh tanh asinh acosh atanh arctan2 arctan erf erfc erfinv lgamma digamma floor ceil
    round trunc frac clamp clamp_min clamp_max clip nan_to_num deg2rad rad2deg real imag complex polar angle conj
    conj_physical _conj resolve_conj resolve_neg relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid
    log_sigmoid hardtanh hardsigmoid hardswish hardshrink softshrink softplus threshold masked_fill where alias
    detach contiguous clone copy lift_fresh lift_fresh_copy to type_as _to_copy zeros_like ones_like full_like
    empty_like zero fill
"""
_NAMES = frozenset(_TABLE.split())
# The same names with other meanings: pairs of reductions, or a condition alone.
_OTHERS = frozenset({"aten.where.default", "aten.to.other"})


def _is_elementwise(target: str) -> bool:
    name = target.split(".")[1]
    return target not in _OTHERS and (name in _NAMES or name.removesuffix("_") in _NAMES)


def elementwise(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """Keep the split of the operands, which must be the same, counted from the last dimension."""
    operands = list(dict.fromkeys(value for value in read_values(node) if rewriter.is_tensor(value)))
    splits = {
        (part.dim - len(rewriter.sizes(value)), part.sections)
        for value in operands
        if (part := rewriter.part_of(value)) is not None
    }
    if len(splits) != 1:
        raise NotKeptError
    ((from_end, sections),) = splits
    if any(rewriter.part_of(value) is None for value in written_values(node)):
        raise NotKeptError
    names = {value: _fitting(rewriter, value, from_end, sections) for value in operands}
    rename_values(node, names)
    return rewriter.keep(node, Part(len(node.output.shape) + from_end, sections))


def _fitting(rewriter: Rewriter, value: str, from_end: int, sections: tuple[int, ...]) -> str:
    """Return what stands for an operand beside parts: its own part, or all of it where it is broadcast."""
    if rewriter.part_of(value) is not None:
        return value
    sizes = rewriter.sizes(value)
    dim = len(sizes) + from_end
    if dim < 0 or sizes[dim] == 1:
        return rewriter.copied(value)
    return rewriter.part(value, Part(dim, sections))


def dropout(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """Draw for the whole value, and take the own part, so that all layouts draw the same."""
    value = node.arguments[0].value
    part = rewriter.part_of(value)
    if part is None:
        raise NotKeptError
    if real_of(node, 1, "p", 0.5) != 0.0 and boolean_of(node, 2, "train", default=True):
        if len(node.arguments) != 3 or node.keyword_arguments:
            raise NotKeptError
        node.target = DROPOUT
        node.arguments.extend([of_integer(part.dim), of_integers(part.sections)])
    return rewriter.keep(node, part)


def softmax(rewriter: Rewriter, node: graph_pb2.Node) -> Place:
    """Keep a split along another dimension than the operator's."""
    value = node.arguments[0].value
    part, dim = rewriter.part_of(value), integer_of(node, 1, "dim", -1)
    if part is None or dim is None or dim % len(rewriter.sizes(value)) == part.dim:
        raise NotKeptError
    return rewriter.keep(node, part)


RULES: dict[str, Rule] = {
    **{target: elementwise for target in ALLOWED_OPERATORS if target.startswith("aten.") and _is_elementwise(target)},
    "aten.dropout.default": dropout,
    **dict.fromkeys(
        (
            *("aten.softmax.int", "aten.log_softmax.int", "aten._softmax.default", "aten._log_softmax.default"),
            *(
                "aten.special_softmax.default",
                "aten.cumsum.default",
                "aten.cumprod.default",
                "aten.logcumsumexp.default",
            ),
        ),
        softmax,
    ),
}
