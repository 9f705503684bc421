"""Splits a backward pass in two: first the gradients of inputs, later those of weights, which nobody waits for.

"Zero Bubble Pipeline Parallelism" (Qi et al., 2023) calls the parts B and W; here they are I and W. Works on what
autograd recorded, when the backward begins: forwards, and backwards that are not split, are as without it. Leaves what
goes into a backward, and where its gradients go, to segment.py.

The engine runs I itself, told to stop where a product or convolution reaches a parameter. A hook keeps what arrives
there; W makes the gradient from it by the operators that the engine would have used, and lets the engine add it up. So
a split gives the same bits, as long as the W of the micro-batches come in the order of their backwards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gradwire_protocol.errors import InternalError

# A node of autograd's graph. What it saved has no declared types.
Node = Any
# From the gradient of a node's output to the gradients of some of its operands.
Formula = Callable[[torch.Tensor], Sequence[torch.Tensor]]

_LEAF = "AccumulateGrad"

# What may lie between an operand and its parameter: views and casts, whose gradients cost little. Anything else counts
# as a computation of the model, and its gradient is made in I.
_VIEWS = frozenset(
    f"{name}Backward0"
    for name in (
        *("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Expand", "ToCopy", "Clone"),
        *("Slice", "Split", "SplitWithSizes", "Select", "Narrow", "Unbind"),
    )
) | frozenset(f"SqueezeBackward{number}" for number in range(5))


class _Rule(NamedTuple):
    """A kind of node whose operands may be parameters."""

    # Positions of the factors, and of what is added to their product.
    factors: tuple[int, ...]
    bias: int | None
    # Takes from a node, before it runs, what the gradients of the operands at these positions are made from.
    formula: Callable[[Node, Sequence[int]], Formula]


@dataclass(frozen=True, slots=True)
class _Operand:
    """An operand of a node that is a view of a parameter."""

    position: int
    leaf: Node  # adds up the parameter's gradient
    # Where the operand's gradient goes, and whether transposed: the transposition that `linear` makes is left out, so
    # that the gradients of all uses of a parameter can be added up before they go there.
    target: tuple[Node, int]
    transposed: bool


@dataclass(frozen=True, slots=True)
class _Deferred:
    """What W does for one node."""

    operands: Sequence[_Operand]
    formula: Formula
    gradient: torch.Tensor  # of the node's output


class WeightGradients:
    """What the first part of a backward left for W. `accumulate` may be called once."""

    def __init__(self) -> None:
        self._queue: list[_Deferred] = []  # in the order in which the engine came by

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that `accumulate` will add to."""
        return list(dict.fromkeys(operand.leaf.variable for item in self._queue for operand in item.operands))

    def accumulate(self, added: Callable[[nn.Parameter], None] = lambda parameter: None) -> None:
        """Add to the gradients of the parameters; frees what was kept for each as soon as it is used.

        added: called for each parameter when all of this was added to its gradient.
        """
        groups = _groups(self._queue)
        self._queue = []
        while groups:
            group = groups.popleft()
            parameters = dict.fromkeys(operand.leaf.variable for item in group for operand in item.operands)
            with torch.no_grad():
                sums = _sums(group)
                if not _add_at_leaves(sums):
                    torch.autograd.backward([GradientEdge(*target) for target in sums], list(sums.values()))
            for parameter in parameters:
                added(parameter)

    def expect(self, node: Node, operands: Sequence[_Operand], formula: Formula) -> None:
        """Keep the gradient of a node's output when the engine comes by."""

        def keep(gradients: tuple[torch.Tensor | None, ...]) -> None:
            (gradient,) = gradients
            if gradient is not None:
                self._queue.append(_Deferred(operands, formula, gradient))

        node.register_prehook(keep)


def run_input_part(roots: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> WeightGradients:
    """Run a backward as torch.autograd.backward does, but leave weights' gradients to what is returned.

    Those are the gradients of parameters that only products and convolutions use. A parameter that something else uses
    as well, such as the weight of an embedding that is also the head's, gets its whole gradient now.
    """
    weights = WeightGradients()
    leaves, candidates = _search(get_gradient_edge(root).node for root in roots)
    stops = list(leaves)
    for node, operands in candidates:
        deferred = [operand for operand in operands if operand.leaf not in leaves]
        if deferred:
            formula = _RULES[_kind(node)].formula(node, [operand.position for operand in deferred])
            weights.expect(node, deferred, formula)
            stops.append(node)
    torch.autograd.backward(roots, gradients, inputs=[GradientEdge(node, 0) for node in stops])
    return weights


def _search(roots: Iterable[Node]) -> tuple[set[Node], list[tuple[Node, list[_Operand]]]]:
    """Go through the graph; return its leaves, and the nodes with operands that are views of parameters.

    The ways through such operands are not followed: the leaves are those that are reached otherwise.
    """
    leaves: set[Node] = set()
    candidates: list[tuple[Node, list[_Operand]]] = []
    seen: set[Node] = set()
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        kind = _kind(node)
        if kind == _LEAF:
            leaves.add(node)
            continue
        following = [each for each, _ in node.next_functions]
        if kind in _RULES and (operands := _operands(node, _RULES[kind])):
            candidates.append((node, operands))
            for operand in operands:
                following[operand.position] = None
        waiting += [each for each in following if each is not None]
    return leaves, candidates


def _kind(node: Node) -> str:
    return type(node).__name__


def _operands(node: Node, rule: _Rule) -> list[_Operand]:
    """Return the operands that are views of parameters; a bias only beside a factor that is one, and before it.

    For the sum over a gradient's rows brings it into the cache row by row, and the product reads it across the rows.
    """
    found = [operand for position in rule.factors if (operand := _operand(node, position)) is not None]
    if found and rule.bias is not None and (bias := _operand(node, rule.bias)) is not None:
        found.insert(0, bias)
    return found


def _operand(node: Node, position: int) -> _Operand | None:
    target, output = node.next_functions[position]
    if target is None:
        return None
    transposed = _kind(target) == "TBackward0"
    if transposed:
        ((target, output),) = target.next_functions
    leaf = target
    while _kind(leaf) in _VIEWS:
        ((leaf, _),) = leaf.next_functions
    # An incoming value is a leaf, too: its gradient is what I is for.
    if _kind(leaf) != _LEAF or not isinstance(leaf.variable, nn.Parameter):
        return None
    return _Operand(position, leaf, (target, output), transposed)


def _groups(queue: Iterable[_Deferred]) -> deque[deque[_Deferred]]:
    """Put together what concerns the same parameters: a parameter's gradient grows once by the sum of all its uses."""
    group_of: dict[Node, list[int]] = {}
    items = list(queue)
    for number, item in enumerate(items):
        joined = [number]
        for group in {id(group): group for o in item.operands if (group := group_of.get(o.leaf))}.values():
            joined += group
        for member in joined:
            group_of.update((operand.leaf, joined) for operand in items[member].operands)
    distinct = {id(group): sorted(group) for group in group_of.values()}
    return deque(deque(items[number] for number in group) for group in sorted(distinct.values()))


def _sums(group: deque[_Deferred]) -> dict[tuple[Node, int], torch.Tensor]:
    """Make the gradients of operands, and add up those with the same target in the order of the backward."""
    sums: dict[tuple[Node, int], torch.Tensor] = {}
    while group:
        item = group.popleft()
        for operand, made in zip(item.operands, item.formula(item.gradient), strict=True):
            part = made.t() if operand.transposed else made
            sums[operand.target] = sums[operand.target] + part if operand.target in sums else part
    return sums


def _add_at_leaves(sums: Mapping[tuple[Node, int], torch.Tensor]) -> bool:
    """Do what the engine would, where it would only add: its calls take 2 % of a backward. False: nothing was done."""
    if not all(
        _kind(target) == _LEAF
        and (target.variable.grad is not None or gradient.stride() == target.variable.stride())
        and gradient.dtype == target.variable.dtype
        for (target, _), gradient in sums.items()
    ):
        return False
    for (target, _), gradient in sums.items():
        parameter = target.variable
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.add_(gradient)
    return True


def _detached(saved: torch.Tensor | None) -> torch.Tensor:
    """Return a saved value without what it was computed from, which would stay alive with it."""
    if saved is None:
        raise InternalError("Autograd did not keep what the gradient of a weight is made from")
    return saved.detach()


def _product(left: str, left_position: int) -> Callable[[Node, Sequence[int]], Formula]:
    """Return the formulas of [bias +] left @ right, as torch derives them; `left` is the saved one's name."""

    def formula(node: Node, positions: Sequence[int]) -> Formula:
        alpha, beta = getattr(node, "_saved_alpha", 1), getattr(node, "_saved_beta", 1)
        steps: list[Callable[[torch.Tensor], torch.Tensor]] = []
        for position in positions:
            if position == left_position:
                steps.append(partial(_of_left, _detached(node._saved_mat2), _by_columns(node, left), alpha))
            elif position == left_position + 1:
                saved = _detached(getattr(node, f"_saved_{left}"))
                steps.append(partial(_of_right, saved, _by_columns(node, "mat2"), alpha))
            else:
                target, output = node.next_functions[position]
                steps.append(partial(_of_bias, target._input_metadata[output].shape, beta))
        return lambda gradient: [step(gradient) for step in steps]

    return formula


def _by_columns(node: Node, name: str) -> bool:
    """Whether a saved matrix lies column by column, as a transposed weight does."""
    # A node of batches of matrices saves neither.
    sizes: Sequence[int] = getattr(node, f"_saved_{name}_sym_sizes", ())
    strides: Sequence[int] = getattr(node, f"_saved_{name}_sym_strides", ())
    return len(sizes) == 2 and strides[0] == 1 and strides[1] == sizes[0]


def _of_left(right: torch.Tensor, by_columns: bool, alpha: Any, gradient: torch.Tensor) -> torch.Tensor:
    made = (right.conj() @ gradient.t()).t() if by_columns else gradient @ right.mT.conj()
    return made if alpha == 1 else made * alpha.conjugate()


def _of_right(left: torch.Tensor, by_columns: bool, alpha: Any, gradient: torch.Tensor) -> torch.Tensor:
    made = (gradient.t() @ left.conj()).t() if by_columns else left.mT.conj() @ gradient
    return made if alpha == 1 else made * alpha.conjugate()


def _of_bias(shape: torch.Size, beta: Any, gradient: torch.Tensor) -> torch.Tensor:
    made = gradient if beta == 1 else gradient * beta.conjugate()
    # Never the gradient itself, which is others' too.
    return made.sum_to_size(shape) if made.shape != shape else made.clone()


def _convolution(node: Node, positions: Sequence[int]) -> Formula:
    """The gradients of weight and bias, made by one call as torch makes them."""
    source, weight = _detached(node._saved_input), _detached(node._saved_weight)
    settings = (
        *(node._saved_bias_sym_sizes_opt, node._saved_stride, node._saved_padding, node._saved_dilation),
        *(node._saved_transposed, node._saved_output_padding, node._saved_groups),
    )
    wanted = [position in positions for position in range(3)]

    def formula(gradient: torch.Tensor) -> Sequence[torch.Tensor]:
        made = torch.ops.aten.convolution_backward.default(gradient, source, weight, *settings, wanted)
        return [made[position] for position in positions]

    return formula


# By autograd's names. Positions are those of the operands that can have a gradient.
_RULES: Mapping[str, _Rule] = {
    "AddmmBackward0": _Rule(factors=(1, 2), bias=0, formula=_product("mat1", 1)),
    "MmBackward0": _Rule(factors=(0, 1), bias=None, formula=_product("self", 0)),
    "BmmBackward0": _Rule(factors=(0, 1), bias=None, formula=_product("self", 0)),
    "ConvolutionBackward0": _Rule(factors=(0, 1), bias=2, formula=_convolution),
}
