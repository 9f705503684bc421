"""What export would lose silently, or cannot hold, is refused by name, place and remedy (T1)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_models import squared_loss
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradwire.graph import export_model
from gradwire_protocol.errors import ModelError


class Doubled(torch.autograd.Function):
    """Forward and backward do not agree: what export would keep is not what the user trains."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 7


class Inner(nn.Module):
    """A submodule that does something to a tensor."""

    def __init__(self, function: Callable[[Inner, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(6, 6)
        self.kept = torch.ones(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


class Outer(nn.Module):
    def __init__(self, function: Callable[[Inner, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.body = nn.ModuleList([Inner(function)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body[0](self.first(x))


def custom_function(module: Inner, x: torch.Tensor) -> torch.Tensor:
    return Doubled.apply(x)


def tensor_hook(module: Inner, x: torch.Tensor) -> torch.Tensor:
    x.register_hook(lambda gradient: gradient * 2)
    return module.linear(x)


def inference_region(module: Inner, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        scale = module.linear(x)
    return x * scale.clone()


def reentrant(module: Inner, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(module.linear, x, use_reentrant=True)


def branch_on_data(module: Inner, x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:
        x = x * 2
    return x


def fixed_rows(module: Inner, x: torch.Tensor) -> torch.Tensor:
    return x * float(x.shape[0])


def unknown_operator(module: Inner, x: torch.Tensor) -> torch.Tensor:
    return x + x.round().unique().sum()


def writes_parameter(module: Inner, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        module.linear.weight.mul_(2)
    return module.linear(x)


def sparse_gradient(module: Inner, x: torch.Tensor) -> torch.Tensor:
    return F.embedding(x.argmax(1), module.linear.weight, sparse=True) + x


def strange_dtype(module: Inner, x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn).to(x.dtype)


@pytest.mark.parametrize(
    ("function", "what", "line", "remedy"),
    [
        (custom_function, "autograd.Function 'Doubled'", "return Doubled.apply(x)", "differentiable operators"),
        (tensor_hook, "hook on a tensor's gradient", "x.register_hook(", "remove Tensor.register_hook"),
        (inference_region, "inference_mode", "with torch.inference_mode():", "torch.no_grad()"),
        (reentrant, "reentrant checkpoint", "use_reentrant=True", "use_reentrant=False"),
        (branch_on_data, "depends on the data", "if x.sum() > 0:", "torch.where"),
        (fixed_rows, "some numbers of rows only", "float(x.shape[0])", "x.shape[0]"),
        (unknown_operator, "aten._unique2.default is not allowed", "self.function(self, x)", "other torch operators"),
        (writes_parameter, "writes to parameter 'body.0.linear.weight'", "self.function(self, x)", "buffer"),
        (sparse_gradient, "sparse gradients", "self.function(self, x)", "sparse=False"),
        (strange_dtype, "float8_e4m3fn", "self.function(self, x)", "other torch operators"),
    ],
)
def test_refusals_name_operator_module_line_and_remedy(
    function: Callable[[Inner, torch.Tensor], torch.Tensor], what: str, line: str, remedy: str
) -> None:
    model = Outer(function)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ModelError) as caught:
        export_model(model, squared_loss, (torch.randn(3, 6), torch.randn(3, 6)))
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    message = str(caught.value)
    assert what in message
    assert "module 'body.0" in message
    assert "test_graph_refusals.py:" in message
    assert line in message
    assert remedy in caught.value.remedy


def test_the_patches_are_gone_afterwards() -> None:
    with pytest.raises(ModelError):
        export_model(Outer(custom_function), squared_loss, (torch.randn(3, 6), torch.randn(3, 6)))
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda gradient: gradient * 3)
    Doubled.apply(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [21.0, 21.0]
    with torch.inference_mode():
        assert x.data.tolist() == [1.0, 1.0]


def test_state_in_plain_attributes_is_refused_if_it_is_read() -> None:
    def counts(module: Inner, x: torch.Tensor) -> torch.Tensor:
        module.kept = module.kept + 1
        return x * module.kept

    with pytest.raises(ModelError, match=r"changes 'body\.0\.kept'.*register_buffer\('kept'"):
        export_model(Outer(counts), squared_loss, (torch.randn(3, 6), torch.randn(3, 6)))

    def keeps(module: Inner, x: torch.Tensor) -> torch.Tensor:
        module.kept = x * 2
        return module.linear(module.kept)

    model = Outer(keeps)
    export_model(model, squared_loss, (torch.randn(3, 6), torch.randn(3, 6)))
    assert model.body[0].kept.tolist() == [1.0] * 6


def test_backward_hooks_on_modules_and_parameters_are_refused() -> None:
    model = Outer(lambda module, x: module.linear(x))
    handle = model.body[0].register_full_backward_hook(lambda *_: None)
    with pytest.raises(ModelError, match=r"backward hook on Inner.*module 'body\.0'"):
        export_model(model, squared_loss, (torch.randn(3, 6), torch.randn(3, 6)))
    handle.remove()
    model.first.weight.register_hook(lambda gradient: gradient)
    with pytest.raises(ModelError, match=r"hook on parameter 'first\.weight'"):
        export_model(model, squared_loss, (torch.randn(3, 6), torch.randn(3, 6)))


def test_comparison_with_the_model_catches_what_nothing_else_does() -> None:
    def one_row_differs(module: Inner, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] == 1 else x

    def draws(module: Inner, x: torch.Tensor) -> torch.Tensor:
        return x * random.random()

    for function in (one_row_differs, draws):
        with pytest.raises(ModelError, match="The loss of the exported graph differs"):
            export_model(Outer(function), squared_loss, (torch.randn(3, 6), torch.randn(3, 6)))
    export_model(Outer(one_row_differs), squared_loss, (torch.randn(3, 6), torch.randn(3, 6)), check=False)


def test_a_lost_gradient_is_caught_by_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradwire.graph.capture.refuse_silent_losses", lambda modules: torch.enable_grad())
    with pytest.raises(ModelError, match=r"gradient of 'first\.(weight|bias)' of the exported graph differs"):
        export_model(Outer(custom_function), squared_loss, (torch.randn(3, 6), torch.randn(3, 6)))


def test_a_model_that_fails_outside_of_export_says_so() -> None:
    def breaks(module: Inner, x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(5)

    with pytest.raises(
        ModelError, match=r"torch\.export cannot capture the model, at module 'body\.0'.*torch\.ones\(5\)"
    ):
        export_model(Outer(breaks), squared_loss, (torch.randn(3, 6), torch.randn(3, 6)))


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda output, target: (output - target) ** 2, r"shape \(3, 6\)"),
        (lambda output, target: ((output - target) ** 2).mean(0), r"shape \(6,\)"),
        (lambda output, target: (output > target).all(), r"torch\.bool"),
        (lambda output, target: (1, 2, 3), "int, int, int"),
    ],
)
def test_a_loss_that_is_not_a_scalar(loss: Any, got: str) -> None:
    with pytest.raises(ModelError, match=got) as caught:
        export_model(nn.Linear(6, 6), loss, (torch.randn(3, 6), torch.randn(3, 6)))
    assert "not a scalar" in caught.value.message
    assert "loss.mean()" in caught.value.remedy
