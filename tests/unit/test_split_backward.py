"""Backwards in two parts, input gradients first: what one in a single piece gives, and little kept for the second."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_driver import Chain, assert_equal, eager
from graph_models import GPT, Block, Case, Dropping, cases, squared_loss, token_loss
from live_memory import Live
from torch import nn
from torch.nn.utils import parametrizations

from gradwire.graph import export_model
from gradwire_protocol.errors import InternalError
from gradwire_protocol.v1 import graph_pb2
from gradwire_stage.split_backward import WeightGradients, run_input_part

Gradients = dict[str, torch.Tensor | None]
KINDS = [*cases(), "dropping"]


def case_of(kind: str) -> Case:
    if kind == "dropping":
        torch.manual_seed(0)
        return Case(Dropping().double(), squared_loss, cases()["counting"].batch)
    return cases()[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes(kind: str) -> None:
    case = case_of(kind)
    torch.manual_seed(1)
    batch = case.batch(5)
    exported = export_model(case.model, case.loss, batch)
    allowed = list(exported.proto.train.allowed_cuts)
    for cuts in ([], [allowed[len(allowed) // 2]], [allowed[0], allowed[-1]]):
        whole = Chain(exported, cuts, seed=3).train(batch, micro_batches=3)
        for recompute in (False, True):
            split = Chain(exported, cuts, seed=3, recompute=recompute, split=range(3)).train(batch, micro_batches=3)
            assert split.loss == whole.loss
            assert_equal(split, whole, tolerance=1e-12)
        # Only some of the micro-batches: their weights come later than the others'.
        mixed = Chain(exported, cuts, seed=3, split=(0, 2)).train(batch, micro_batches=3)
        assert_equal(mixed, whole, tolerance=1e-12)


@pytest.mark.parametrize("kind", ["gpt", "residual", "encoder"])
def test_nothing_changes_under_autocast(kind: str) -> None:
    case = case_of(kind)
    model = case.model.float()
    batch = tuple(item.float() if item.is_floating_point() else item for item in case.batch(5))
    exported = export_model(model, case.loss, batch, precision=torch.bfloat16)
    cuts = [exported.proto.train.allowed_cuts[5]]
    whole, split = (
        Chain(exported, cuts, precision=torch.bfloat16, split=split).train(batch, micro_batches=2)
        for split in ((), range(2))
    )
    assert_equal(split, whole, tolerance=1e-6)
    assert {gradient.dtype for gradient in split.gradients.values()} == {torch.float32}


class Uses(nn.Module):
    """A weight, a bias and an input of 3 rows of 4 vectors, used in the way that a function says."""

    def __init__(self, use: Callable[..., torch.Tensor], weight: tuple[int, ...], *, trained: tuple[str, ...]) -> None:
        super().__init__()
        self.use = use
        self.weight, self.bias = nn.Parameter(torch.randn(weight).double()), nn.Parameter(torch.randn(5).double())
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trained)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(x, self.weight, self.bias)


BOTH = ("weight", "bias")
WEIGHT = ("weight",)
# What is computed, the shape of the weight, what is trained, and what is left to W: of biases nothing is.
USES: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, ...], tuple[str, ...], tuple[str, ...]]] = {
    "linear": (lambda x, w, b: F.linear(x, w, b), (5, 6), BOTH, WEIGHT),
    "linear, no bias": (lambda x, w, _: F.linear(x, w), (5, 6), WEIGHT, WEIGHT),
    "linear, two dimensions": (lambda x, w, b: F.linear(x[0], w, b), (5, 6), BOTH, WEIGHT),
    "linear, transposed input": (lambda x, w, b: F.linear(x.transpose(0, 1), w, b), (5, 6), BOTH, WEIGHT),
    "linear, frozen weight": (lambda x, w, b: F.linear(x, w, b), (5, 6), ("bias",), ()),
    "linear, frozen bias": (lambda x, w, b: F.linear(x, w, b), (5, 6), WEIGHT, WEIGHT),
    "linear, all frozen": (lambda x, w, b: F.linear(x, w, b), (5, 6), (), ()),
    "addmm": (lambda x, w, b: torch.addmm(b, x[0], w, beta=0.5, alpha=-3), (6, 5), BOTH, WEIGHT),
    "mm": (lambda x, w, _: x[0].mm(w), (6, 5), WEIGHT, WEIGHT),
    "mm, on the left": (lambda x, w, _: w.mm(x[0].t()), (5, 6), WEIGHT, WEIGHT),
    "mm, on the left, transposed": (lambda x, w, _: w.t().mm(x[0]), (4, 5), WEIGHT, WEIGHT),
    "matmul": (lambda x, w, _: x @ w, (6, 5), WEIGHT, WEIGHT),
    "matmul, one dimension": (lambda x, w, _: x[0, 0] @ w, (6, 5), WEIGHT, WEIGHT),
    "bmm": (lambda x, w, _: x.bmm(w), (3, 6, 5), WEIGHT, WEIGHT),
    "bmm, on the left": (lambda x, w, _: w.bmm(x), (3, 5, 4), WEIGHT, WEIGHT),
    "bmm, repeated": (lambda x, w, _: x.bmm(w.expand(3, 6, 5)), (6, 5), WEIGHT, WEIGHT),
    "einsum": (lambda x, w, _: torch.einsum("btd,dh->bth", x, w), (6, 5), WEIGHT, WEIGHT),
    "tensordot": (lambda x, w, _: torch.tensordot(x, w, 1), (6, 5), WEIGHT, WEIGHT),
    "both factors": (lambda x, w, _: x @ w.mm(w), (6, 6), WEIGHT, WEIGHT),
    "low rank": (lambda x, w, _: x @ (w[:, :2].mm(w[:2])), (6, 6), WEIGHT, WEIGHT),
    "a slice": (lambda x, w, b: F.linear(x, w[2:7], b), (9, 6), BOTH, WEIGHT),
    "split": (lambda x, w, b: F.linear(x, w.chunk(2)[1], b) * F.linear(x, w.chunk(2)[0]), (10, 6), BOTH, WEIGHT),
    "unlike uses": (lambda x, w, _: x @ w[:, :5] + x.bmm(w[None].expand(3, 6, 6))[..., 1:], (6, 6), WEIGHT, WEIGHT),
    "a part read otherwise": (lambda x, w, _: x @ w.split([5, 5], 1)[1] + w[0, :5], (6, 10), WEIGHT, ()),
    "reshaped": (lambda x, w, _: x @ w.view(3, 2, 5).flatten(0, 1), (30,), WEIGHT, WEIGHT),
    "cast": (lambda x, w, _: (x.float() @ w.float()).double(), (6, 5), WEIGHT, WEIGHT),
    "scaled": (lambda x, w, _: x @ (w * 2), (6, 5), WEIGHT, ()),
    "twice": (lambda x, w, _: F.linear(F.linear(x, w), w), (6, 6), WEIGHT, WEIGHT),
    "three times, transposed": (lambda x, w, _: F.linear(F.linear(x, w).tanh() @ w, w), (5, 6), WEIGHT, WEIGHT),
    "chained by biases": (lambda x, w, b: F.linear(F.linear(x, w[:5], b), w[5:, :5], b), (10, 6), BOTH, WEIGHT),
    "also read otherwise": (lambda x, w, b: F.linear(x, w, b) + w.sum(), (5, 6), BOTH, ()),
    "also an embedding": (
        lambda x, w, _: F.linear(F.embedding(torch.tensor([1, 2, 1]), w)[:, None] + x, w),
        (5, 6),
        WEIGHT,
        (),
    ),
    "only a norm": (lambda x, w, _: F.layer_norm(x, (6,), w), (6,), WEIGHT, ()),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b), (5, 4, 3), BOTH, WEIGHT),
    "conv1d, no bias": (lambda x, w, _: F.conv1d(x, w, padding=1), (5, 4, 3), WEIGHT, WEIGHT),
    "conv1d, frozen weight": (lambda x, w, b: F.conv1d(x, w, b), (5, 4, 3), ("bias",), ()),
    "conv1d, twice": (lambda x, w, _: F.conv1d(F.conv1d(x, w), w), (4, 4, 2), WEIGHT, WEIGHT),
    "conv2d, groups": (lambda x, w, b: F.conv2d(x[:, :, None], w, b[:4], groups=2), (4, 2, 1, 3), BOTH, WEIGHT),
    "conv2d, strides": (lambda x, w, b: F.conv2d(x[:, None], w, b, 2, 1, 2), (5, 1, 2, 2), BOTH, WEIGHT),
    "conv_transpose1d": (lambda x, w, b: F.conv_transpose1d(x, w, b), (4, 5, 2), BOTH, WEIGHT),
}  # fmt: skip


def gradients_of(model: nn.Module, *others: torch.Tensor) -> Gradients:
    named = {**dict(model.named_parameters()), **{f"input {number}": item for number, item in enumerate(others)}}
    return {name: None if (gradient := item.grad) is None else gradient.clone() for name, item in named.items()}


def outputs_of(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Two roots, of which the second takes part of the first."""
    y = model(x)
    return [root for root in (y.tanh(), y.sin().sum()) if root.requires_grad]


def backwards(model: nn.Module, inputs: list[torch.Tensor]) -> Gradients:
    for x in inputs:
        roots = outputs_of(model, x)
        if roots:
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    return gradients_of(model, *inputs)


def split_backwards(model: nn.Module, inputs: list[torch.Tensor]) -> tuple[Gradients, Gradients]:
    """All input gradients, then all weight gradients; return the gradients after either."""
    waiting: list[WeightGradients] = []
    for x in inputs:
        roots = outputs_of(model, x)
        if roots:
            waiting.append(run_input_part(roots, [torch.ones_like(root) for root in roots]))
    first = gradients_of(model, *inputs)
    for weights in waiting:
        weights.accumulate()
    return first, gradients_of(model, *inputs)


def assert_same(got: Gradients, expected: Gradients) -> None:
    for name, gradient in expected.items():
        found = got[name]
        if gradient is None or found is None:
            assert found is gradient is None, name
        else:
            # Not to the bit where products are added up otherwise.
            torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)
            assert found.stride() == gradient.stride(), name


@pytest.mark.parametrize("with_input_gradient", [True, False])
@pytest.mark.parametrize("kind", USES)
def test_uses_of_a_parameter(kind: str, with_input_gradient: bool) -> None:
    use, shape, trained, left = USES[kind]
    torch.manual_seed(0)
    inputs = [torch.randn(3, 4, 6).double().requires_grad_(with_input_gradient) for _ in range(3)]
    twins = [item.detach().clone().requires_grad_(with_input_gradient) for item in inputs]
    model = Uses(use, shape, trained=trained)
    first, got = split_backwards(copy.deepcopy(model), inputs)
    assert_same(got, backwards(model, twins))
    assert [name for name in trained if first[name] is None] == list(left)
    if with_input_gradient:
        assert all(torch.equal(first[name], got[name]) for name in got if name.startswith("input"))  # type: ignore[arg-type]


def test_parameters_of_several_segments_and_normalised_weights() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), parametrizations.weight_norm(nn.Linear(6, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = torch.tanh(self.last(self.first(x)))
            return x

    torch.manual_seed(0)
    model = Normalised().double()
    batch = (torch.randn(5, 6).double(), torch.randn(5, 6).double())
    exported = export_model(model, squared_loss, batch)
    expected = eager(model, squared_loss, batch, micro_batches=2)
    for cut in exported.proto.train.allowed_cuts:
        whole, split = (Chain(exported, [cut], split=split).train(batch, micro_batches=2) for split in ((), range(2)))
        assert_equal(split, whole, tolerance=1e-12)
        assert_equal(split, expected)


def test_incoming_values_get_their_gradients_first() -> None:
    """Where a segment begins with the operator that it splits, or only passes a value on, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6)).double()
    batch = (torch.randn(5, 6).double(), torch.randn(5, 6).double())
    exported = export_model(model, squared_loss, batch)
    chain = Chain(exported, [exported.cut_before("1")])
    _, segment = chain.segments[graph_pb2.GRAPH_KIND_TRAIN]
    store = chain.stores[1]
    made, gradients = {}, {}
    for way in ("whole", "split"):
        values: dict[str, Any] = {item.value: torch.ones(5, 6).double() for item in segment.incoming}
        for item in segment.incoming:
            values[item.value].requires_grad_(not item.from_batch)
        segment_pass = chain.built(segment).forward(values, step=1, micro_batch=0, record=True)
        if way == "whole":
            made[way] = segment_pass.backward({}, {}, 5.0)
        else:
            made[way] = segment_pass.backward_input({}, {}, 5.0)
            assert {name for name, parameter in store.items() if parameter.grad is None} == {
                name for name in store if name.endswith("weight")
            }
            segment_pass.backward_weight()
        gradients[way] = {name: parameter.grad for name, parameter in store.items()}
        for parameter in store.values():
            parameter.grad = None
    assert len(gradients["whole"]) == 3
    assert_same(gradients["split"], gradients["whole"])
    assert len(made["whole"]) == 1
    assert_same(made["split"], made["whole"])


def test_each_parameter_is_named_when_its_gradient_is_whole() -> None:
    """Once, also where it is used twice; those that the first part has finished are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False)).double()
    model.append(model[1])
    weights = run_input_part([model(torch.randn(3, 8).double()).square().sum()], [torch.tensor(1.0).double()])
    left = {
        name for name, parameter in model.named_parameters() if any(parameter is each for each in weights.parameters)
    }
    assert left == {"1.weight", "3.weight"}
    assert len(weights.parameters) == 2
    found: list[tuple[nn.Parameter, torch.Tensor]] = []
    weights.accumulate(lambda parameter: found.append((parameter, parameter.grad.clone())))
    assert len(found) == 2
    for parameter, gradient in found:
        assert torch.equal(parameter.grad, gradient)
    assert {id(parameter) for parameter, _ in found} == {id(model[1].weight), id(model[3].weight)}


def test_what_is_kept_for_the_weights() -> None:
    torch.manual_seed(0)
    rows, time, width = 4, 8, 16
    model = Block(width, 2)
    x = torch.randn(rows, time, width, requires_grad=True)
    root_gradient = torch.ones(rows, time, width)
    with Live(ignored=[*model.parameters(), x, root_gradient]) as live:
        y = model(x)
        recorded = live.bytes()
        weights = run_input_part([y], [root_gradient])
        del y
        made = sum(item.grad.nbytes for item in [x, *model.parameters()] if item.grad is not None)
        # Inputs of qkv, proj and up, each as wide as the model, and of down; gradients of the outputs of qkv, proj and
        # up. That of down is the root's.
        assert live.bytes() - made == (1 + 1 + 1 + 4 + 3 + 1 + 4) * x.nbytes
        assert live.bytes() - made < recorded
        weights.accumulate()
        assert live.bytes() == sum(item.nbytes for item in [x, *model.parameters()])


def test_nothing_is_kept_by_passes_that_are_given_up() -> None:
    """A run may end between the two parts: no cycle through autograd's graph may hold what was queued."""
    torch.manual_seed(0)
    model = GPT(layers=1)
    exported = export_model(model, token_loss, (torch.randint(0, 11, (3, 6)), torch.randint(0, 11, (3, 6))))
    chain = Chain(exported, [])
    (segment,) = chain.segments[graph_pb2.GRAPH_KIND_TRAIN]
    values = exported.flatten_batch(
        (torch.randint(0, 11, (3, 6)), torch.randint(0, 11, (3, 6))), graph_pb2.GRAPH_KIND_TRAIN
    ).values
    parameters = list(chain.stores[0].values())
    with Live(ignored=[*parameters, *(value for value in values.values() if isinstance(value, torch.Tensor))]) as live:
        made = chain.built(segment).forward(values, step=1, micro_batch=0, record=True)
        made.backward_input({}, {}, 1.0)
        for parameter in parameters:
            parameter.grad = None
        assert live.bytes() > 0
        del made
        assert live.bytes() == 0


def test_parts_in_the_wrong_order_are_refused() -> None:
    batch = (torch.randn(3, 6), torch.randn(3, 6))
    exported = export_model(nn.Linear(6, 6), squared_loss, batch)
    chain = Chain(exported, [])
    (segment,) = chain.segments[graph_pb2.GRAPH_KIND_TRAIN]
    values = exported.flatten_batch(batch, graph_pb2.GRAPH_KIND_TRAIN).values
    made = chain.built(segment).forward(values, step=1, micro_batch=0, record=True, keep=False)
    with pytest.raises(InternalError, match="before its forward pass was run again"):
        made.backward_input({}, {}, 1.0)
    made = chain.built(segment).forward(values, step=1, micro_batch=0, record=True)
    with pytest.raises(InternalError, match="before its input gradients"):
        made.backward_weight()
    made.backward_input({}, {}, 1.0)
    made.backward_weight()
    with pytest.raises(InternalError, match="or twice"):
        made.backward_weight()


def test_a_value_that_was_written_to_is_named_as_in_a_whole_backward() -> None:
    weight = nn.Parameter(torch.randn(6, 6))
    x = torch.randn(3, 6)
    y = F.linear(x, weight)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run_input_part([y], [torch.ones_like(y)])
