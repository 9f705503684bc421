"""Splits a backward pass in two: first the gradients of inputs, later those of weights, which nobody waits for.

"Zero Bubble Pipeline Parallelism" (Qi et al., 2023) calls the parts B and W; here they are I and W. Works on what
autograd recorded, when the backward begins: forwards, and backwards that are not split, are as without it. Leaves what
goes into a backward, and where its gradients go, to segment.py.

The engine runs I itself, told to stop where a product or convolution reaches a parameter. A hook keeps what arrives
there; W makes the gradient from it. A product is added to a gradient while it is made, which saves writing it and
reading it again, a fiftieth of a backward; so the last bits may be others than those of a backward in one piece. The
gradients of biases are made in I: what they sum up is in the cache then.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gradwire_protocol.errors import InternalError

# A node of autograd's graph. What it saved has no declared types.
Node = Any

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


class _Product(NamedTuple):
    """A gradient that is yet to be multiplied: scale * left @ right."""

    left: torch.Tensor
    right: torch.Tensor
    scale: Any

    def made(self) -> torch.Tensor:
        product = self.left @ self.right
        return product if self.scale == 1 else product * self.scale


# From the gradient of a node's output to the gradients of some of its operands.
Formula = Callable[[torch.Tensor], Sequence[_Product | torch.Tensor]]


class _Rule(NamedTuple):
    """A kind of node whose operands may be parameters."""

    factors: tuple[int, ...]  # their positions
    # Takes from a node, before it runs, what the gradients of these operands are made from.
    formula: Callable[[Node, Sequence[_Operand]], Formula]


class _Operand(NamedTuple):
    """An operand of a node that is a view of a parameter."""

    position: int
    leaf: Node  # adds up the parameter's gradient
    # Where the operand's gradient goes, and whether transposed: the transposition that `linear` makes is left out, so
    # that it goes to the parameter itself.
    target: tuple[Node, int]
    transposed: bool


class _Deferred(NamedTuple):
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
        queue, self._queue = deque(self._queue), []
        uses = Counter(operand.leaf.variable for item in queue for operand in item.operands)
        with torch.no_grad():
            while queue:
                operands, formula, gradient = queue.popleft()
                for operand, made in zip(operands, formula(gradient), strict=True):
                    _add(operand, made)
                    parameter = operand.leaf.variable
                    uses[parameter] -= 1
                    if not uses[parameter]:
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
            formula = _RULES[_kind(node)].formula(node, deferred)
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
    waiting = list(dict.fromkeys(roots))
    seen = set(waiting)
    # Every micro-batch's split comes by here: each node is asked for what follows it once.
    while waiting:
        node = waiting.pop()
        kind = _kind(node)
        if kind == _LEAF:
            leaves.add(node)
            continue
        following = node.next_functions
        rule = _RULES.get(kind)
        if rule is not None and (operands := _operands(following, rule)):
            candidates.append((node, operands))
            kept = {operand.position for operand in operands}
            following = [edge for position, edge in enumerate(following) if position not in kept]
        for each, _ in following:
            if each is not None and each not in seen:
                seen.add(each)
                waiting.append(each)
    return leaves, candidates


def _kind(node: Node) -> str:
    return type(node).__name__


def _operands(following: Sequence[tuple[Node, int]], rule: _Rule) -> list[_Operand]:
    """Return the factors that are views of parameters."""
    return [operand for position in rule.factors if (operand := _operand(position, *following[position])) is not None]


def _operand(position: int, target: Node, output: int) -> _Operand | None:
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


def _add(operand: _Operand, made: _Product | torch.Tensor) -> None:
    """Add to a gradient; by the engine where views lie between, whose calls take 2 % of a backward."""
    target, output = operand.target
    leaf = target is operand.leaf
    if isinstance(made, torch.Tensor) or not leaf or made.left.dim() > 2:
        gradient = made if isinstance(made, torch.Tensor) else made.made()
        torch.autograd.backward([GradientEdge(target, output)], [gradient])
        return
    parameter = target.variable
    kept = parameter.grad is not None
    if not kept:
        parameter.grad = torch.empty_like(parameter)
    parameter.grad.addmm_(made.left, made.right, beta=int(kept), alpha=made.scale)


def _detached(saved: torch.Tensor | None) -> torch.Tensor:
    """Return a saved value without what it was computed from, which would stay alive with it."""
    if saved is None:
        raise InternalError("Autograd did not keep what the gradient of a weight is made from")
    return saved.detach()


def _product(left: str, left_position: int) -> Callable[[Node, Sequence[_Operand]], Formula]:
    """Return the formulas of [bias +] left @ right; `left` is the saved one's name."""
    saved_left = f"_saved_{left}"

    def formula(node: Node, operands: Sequence[_Operand]) -> Formula:
        scale = getattr(node, "_saved_alpha", 1).conjugate()
        # Of each operand the other one, which is on the other side.
        others = [
            _detached(node._saved_mat2 if operand.position == left_position else getattr(node, saved_left))
            for operand in operands
        ]

        def products(gradient: torch.Tensor) -> Sequence[_Product]:
            made = []
            for operand, other in zip(operands, others, strict=True):
                on_the_left = operand.position == left_position
                if operand.transposed:
                    pair = (other.conj(), gradient.mT) if on_the_left else (gradient.mT, other.conj())
                else:
                    pair = (gradient, other.mH) if on_the_left else (other.mH, gradient)
                made.append(_Product(*pair, scale))
            return made

        return products

    return formula


def _convolution(node: Node, operands: Sequence[_Operand]) -> Formula:
    """The gradients of input and weight, made by one call as torch makes them."""
    source, weight = _detached(node._saved_input), _detached(node._saved_weight)
    settings = (
        *(node._saved_bias_sym_sizes_opt, node._saved_stride, node._saved_padding, node._saved_dilation),
        *(node._saved_transposed, node._saved_output_padding, node._saved_groups),
    )
    positions = {operand.position for operand in operands}
    wanted = [position in positions for position in range(2)] + [False]

    def formula(gradient: torch.Tensor) -> Sequence[torch.Tensor]:
        made = torch.ops.aten.convolution_backward.default(gradient, source, weight, *settings, wanted)
        return [made[operand.position] for operand in operands]

    return formula


# By autograd's names. Positions are those of the operands that can have a gradient.
_RULES: Mapping[str, _Rule] = {
    "AddmmBackward0": _Rule(factors=(1, 2), formula=_product("mat1", 1)),
    "MmBackward0": _Rule(factors=(0, 1), formula=_product("self", 0)),
    "BmmBackward0": _Rule(factors=(0, 1), formula=_product("self", 0)),
    "ConvolutionBackward0": _Rule(factors=(0, 1), formula=_convolution),
}
