"""What is known of random operators is what torch does: whether a call draws, and what eager mode draws with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradwire.graph import export_model
from gradwire.graph.randomness import base_name, can_stand_for, draws
from gradwire_protocol.operators import ALLOWED_OPERATORS

X = torch.rand(2, 3, 4, 4)
P = torch.rand(3, 4)


def recurrent(kind: type[nn.RNNBase], layers: int, dropout: float) -> Callable[[torch.Tensor], Any]:
    module = kind(4, 4, layers, dropout=dropout)
    return lambda x: module(x[0])[0]


# Each with the random operator of the graph that it becomes; none where nothing is drawn.
CALLS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "dropout": (lambda x: F.dropout(x, 0.3), "dropout"),
    "dropout by name": (lambda x: torch.dropout(x, p=0.3, train=True), "dropout"),
    "dropout in place": (lambda x: F.dropout(x * 1, 0.3, inplace=True), "dropout_"),
    "dropout of nothing": (lambda x: F.dropout(x, 0.0), ""),
    "dropout of all": (lambda x: F.dropout(x, 1.0), ""),
    "dropout in evaluation": (lambda x: F.dropout(x, 0.3, training=False), ""),
    "dropout1d": (lambda x: F.dropout1d(x[0], 0.3), "feature_dropout"),
    "dropout2d": (lambda x: F.dropout2d(x, 0.3), "feature_dropout"),
    "dropout2d in place": (lambda x: F.dropout2d(x * 1, 0.3, inplace=True), "feature_dropout_"),
    "dropout3d": (lambda x: F.dropout3d(x, 0.3), "feature_dropout"),
    "alpha_dropout": (lambda x: F.alpha_dropout(x, 0.3, True), "alpha_dropout"),
    "alpha_dropout in place": (lambda x: F.alpha_dropout(x * 1, 0.3, True, True), "alpha_dropout_"),
    "alpha_dropout of nothing": (lambda x: F.alpha_dropout(x, 0.0, True), ""),
    "feature_alpha_dropout": (lambda x: F.feature_alpha_dropout(x, 0.3, True), "feature_alpha_dropout"),
    "feature_alpha_dropout of all": (lambda x: F.feature_alpha_dropout(x, 1.0, True), ""),
    "native_dropout": (lambda x: torch.native_dropout(x, 0.3, True)[0], "native_dropout"),
    "native_dropout of nothing": (lambda x: torch.native_dropout(x, 0.0, True)[0], "native_dropout"),
    "native_dropout in evaluation": (lambda x: torch.native_dropout(x, 0.3, False)[0], ""),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3), "scaled_dot_product_attention"),
    "attention without dropout": (lambda x: F.scaled_dot_product_attention(x, x, x), ""),
    "rrelu": (lambda x: F.rrelu(x - 0.5, training=True), "rrelu"),
    "rrelu in place": (lambda x: F.rrelu(x - 0.5, training=True, inplace=True), "rrelu_"),
    "rrelu in evaluation": (lambda x: F.rrelu(x), ""),
    "lstm": (recurrent(nn.LSTM, 3, 0.3), "lstm"),
    "lstm without dropout": (recurrent(nn.LSTM, 3, 0.0), ""),
    "lstm of one layer": (recurrent(nn.LSTM, 1, 0.0), ""),
    "gru": (recurrent(nn.GRU, 2, 0.3), "gru"),
    "rnn": (recurrent(nn.RNN, 2, 0.3), "rnn_tanh"),
    "gumbel_softmax": (lambda x: F.gumbel_softmax(x), "exponential_"),
    "rand": (lambda x: x + torch.rand(4, dtype=x.dtype), "rand"),
    "rand_like": (torch.rand_like, "rand_like"),
    "randn": (lambda x: x + torch.randn(4, dtype=x.dtype), "randn"),
    "randn_like": (torch.randn_like, "randn_like"),
    "randint": (lambda x: x + torch.randint(5, (4,)), "randint"),
    "randint between": (lambda x: x + torch.randint(1, 5, (4,)), "randint"),
    "randint_like": (lambda x: torch.randint_like(x, 5), "randint_like"),
    "randperm": (lambda x: x + torch.randperm(4), "randperm"),
    "bernoulli": (torch.bernoulli, "bernoulli"),
    "bernoulli of one chance": (lambda x: torch.bernoulli(x, 0.3), "bernoulli"),
    "bernoulli_": (lambda x: (x * 1).bernoulli_(0.3), "bernoulli_"),
    "bernoulli_ of chances": (lambda x: torch.zeros_like(x).bernoulli_(x), "bernoulli_"),
    "normal": (lambda x: torch.normal(x, x), "normal"),
    "normal around": (lambda x: torch.normal(x, 1.0), "normal"),
    "normal_": (lambda x: torch.zeros_like(x).normal_(), "normal_"),
    "uniform_": (lambda x: torch.zeros_like(x).uniform_(), "uniform_"),
    "multinomial": (lambda x: x[0, 0, 0, 0] + torch.multinomial(x[0, 0], 2), "multinomial"),
    "poisson": (torch.poisson, "poisson"),
    "a product": (lambda x: x * 2, ""),
}


class Watched(TorchDispatchMode):
    """Compares what is said of each operator with what it does to the generator."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Any] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = torch.get_rng_state()
        result = function(*args, **(kwargs or {}))
        drew = not torch.equal(before, torch.get_rng_state())
        assert (draws(function, args, kwargs or {}) > 0) == drew, function
        self.drawn += [function] * drew
        return result


class All(nn.Module):
    """Makes all calls, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        return torch.stack([function(x).mean() for function, _ in CALLS.values()])


@pytest.mark.parametrize("name", CALLS)
def test_what_eager_mode_draws(name: str) -> None:
    function, operator = CALLS[name]
    with Watched() as eager, torch.no_grad():
        function(X.clone())
    assert bool(eager.drawn) == bool(operator)
    assert all(can_stand_for(drawn, f"aten.{operator}.default") for drawn in eager.drawn)


def test_what_the_graph_draws() -> None:
    with Watched() as eager, torch.no_grad():
        for function, _ in CALLS.values():
            function(X.clone())
    exported = export_model(All(), lambda output, target: output.sum(), (X, X), check=False)
    wanted = [operator for _, operator in CALLS.values() if operator]
    assert [node.target.split(".")[1] for node in exported.proto.train.nodes if node.random] == wanted
    assert [draw.target.split(".")[1] for draw in exported.draws] == wanted
    assert sum(draw.calls for draw in exported.draws) == len(eager.drawn)
    assert {draw.calls for draw in exported.draws} == {1, 2}  # of an LSTM of three layers
    assert all("test_graph_randomness.py" in draw.place for draw in exported.draws)


def test_every_random_operator_that_a_graph_may_use_is_tried() -> None:
    tagged = set()
    for target in ALLOWED_OPERATORS:
        namespace, name, overload = (*target.split("."), "")[:3]
        packet = getattr(torch.ops.aten, name, None) if namespace == "aten" else None
        function = getattr(packet, overload, None)
        if function is not None and torch.Tag.nondeterministic_seeded in function.tags:
            tagged.add(base_name(function))
    tried = {operator for _, operator in CALLS.values()}
    assert tagged - tried == {"rnn_relu", "feature_alpha_dropout_", "rrelu_with_noise"}


def test_operators_that_stand_for_others_are_told_apart() -> None:
    assert can_stand_for(torch.ops.aten.bernoulli_.float, "aten.dropout.default")
    assert not can_stand_for(torch.ops.aten.rand_like.default, "aten.dropout.default")
    assert not can_stand_for(torch.ops.aten.bernoulli_.float, "aten.rand_like.default")
    attention = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert can_stand_for(attention, "aten.scaled_dot_product_attention.default")
    assert not can_stand_for(attention, "aten.dropout.default")
