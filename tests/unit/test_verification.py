from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradwire.graph import export_model
from gradwire.reference import reference_step
from gradwire.verification import Verification, differences


def test_differences_are_relative_to_each_tensor_and_sorted() -> None:
    references = {"a": torch.tensor([1.0, 100.0]), "b": torch.tensor([0.5]), "count": torch.tensor([3])}
    tensors = {"a": torch.tensor([2.0, 100.0]), "b": torch.tensor([0.25]), "count": torch.tensor([4])}
    found = differences(tensors, references, 1e-5)
    assert [(item.name, item.relative) for item in found] == [("b", pytest.approx(0.25 / 1.2, rel=0.01)), ("a", 0.01)]


def test_rounding_of_the_largest_value_is_no_difference() -> None:
    references = {"large": torch.ones(1, dtype=torch.float64), "noise": torch.full((1,), 1e-17, dtype=torch.float64)}
    tensors = {"large": torch.ones(1, dtype=torch.float64), "noise": torch.full((1,), -1e-17, dtype=torch.float64)}
    assert differences(tensors, references, 1e-10)[0].relative < 1e-10


def test_a_difference_of_a_small_tensor_is_not_lost() -> None:
    references = {"large": torch.ones(1, dtype=torch.float64), "small": torch.full((1,), 1e-4, dtype=torch.float64)}
    tensors = references | {"small": torch.full((1,), 1.001e-4, dtype=torch.float64)}
    assert differences(tensors, references, 1e-10)[0].relative == pytest.approx(1e-3)


def test_nan_comes_first() -> None:
    references = {"a": torch.ones(1), "b": torch.ones(1)}
    found = differences({"a": torch.zeros(1), "b": torch.full((1,), math.nan)}, references, 1e-5)
    assert found[0].name == "b"
    assert not verification(gradients=found).equal


def test_updates_by_rounding_alone_are_left_out() -> None:
    weights = {"w": torch.tensor([1.0, 1.0], dtype=torch.float64)}
    updated = {"w": torch.tensor([1.0, 1.5], dtype=torch.float64)}
    gradients = {"w": torch.tensor([1.0, 1e-17], dtype=torch.float64)}
    assert differences(updated, weights, 1e-10, gradients)[0].relative == 0.0
    gradients["w"][1] = 1e-3
    assert differences(updated, weights, 1e-10, gradients)[0].relative == 0.5


def verification(**changes: object) -> Verification:
    values = {
        "data_type": "float64",
        "tolerance": 1e-10,
        "loss": 1.0,
        "reference_loss": 1.0,
        "gradients": (),
        "weights": (),
        "weights_judged": True,
        "mismatched": (),
    }
    return Verification(**{**values, **changes})  # type: ignore[arg-type]


def test_the_verdict() -> None:
    assert verification().equal
    assert not verification(loss=1.001).equal
    assert not verification(mismatched=("w",)).equal
    assert not verification(loss=math.nan).equal
    assert "NOT EQUAL" in str(verification(mismatched=("w",)))


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.linear(x)
        return scores


@pytest.mark.parametrize("class_weights", [None, torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0], dtype=torch.float64)])
def test_masked_targets_count_as_in_the_whole_batch(class_weights: torch.Tensor | None) -> None:
    """Means of means would be wrong: the micro-batches have different numbers of targets that count."""
    torch.manual_seed(0)
    model = Scores().double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.tensor([0, -1, -1, -1, 2, 3, 4])
    loss = nn.CrossEntropyLoss(weight=class_weights, ignore_index=-1)
    exported = export_model(model, loss, (x, y))
    expected_loss = loss(model(x), y)
    expected = torch.autograd.grad(expected_loss, list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    got, gradients = reference_step(model, optimizer, loss, exported, (x, y), micro_batches=3, max_grad_norm=None)
    assert got == pytest.approx(expected_loss.item(), rel=1e-12)
    for gradient, reference in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


def test_other_means_are_weighted_by_rows() -> None:
    torch.manual_seed(0)
    model = Scores().double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    exported = export_model(model, F.mse_loss, (x, y))
    expected = torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, gradients = reference_step(model, optimizer, F.mse_loss, exported, (x, y), micro_batches=3, max_grad_norm=None)
    for gradient, reference in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)
