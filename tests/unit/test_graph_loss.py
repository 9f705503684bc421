"""Losses as sums and weights: what a mean over micro-batches of unequal weight must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_driver import Chain, assert_equal, eager
from torch import nn

from gradwire.graph import export_model
from gradwire_protocol.v1 import graph_pb2 as pb

CLASSES = torch.tensor([1.0, 2.0, 0.5]).double()
MEAN, SUM = pb.LOSS_FORM_MEAN_OVER_ROWS, pb.LOSS_FORM_SUM_AND_WEIGHT


@pytest.mark.parametrize(
    ("loss", "form", "ignored"),
    [
        (lambda o, t: F.cross_entropy(o, t), SUM, -100),
        (lambda o, t: F.cross_entropy(o, t, ignore_index=1), SUM, 1),
        (lambda o, t: F.cross_entropy(o, t, weight=CLASSES), SUM, -100),
        (lambda o, t: F.cross_entropy(o, t, weight=CLASSES, ignore_index=2), SUM, 2),
        (lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1), SUM, -100),
        (lambda o, t: F.nll_loss(F.log_softmax(o, 1), t, weight=CLASSES), SUM, -100),
        (lambda o, t: F.cross_entropy(o, t).to(torch.float64).clone(), SUM, -100),
        (nn.CrossEntropyLoss(weight=CLASSES), SUM, -100),
        (lambda o, t: F.cross_entropy(o, t, weight=CLASSES, label_smoothing=0.1), MEAN, 2),
        (lambda o, t: F.cross_entropy(o, F.one_hot(t.clamp(min=0), 3).double()), MEAN, 2),
        (lambda o, t: F.cross_entropy(o, t) + 0.01 * o.square().mean(), MEAN, 2),
        (lambda o, t: F.cross_entropy(o, t, reduction="sum") / 7, MEAN, 2),
        (lambda o, t: F.mse_loss(o[:, 0], t.double()), MEAN, 2),
    ],
)
def test_mean_cross_entropy_becomes_sum_and_weight(loss: Any, form: pb.LossForm, ignored: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    batch = (torch.randn(7, 6).double(), torch.tensor([0, ignored, 1, ignored, ignored, 0, 1]))
    exported = export_model(model, loss, batch)
    assert exported.proto.loss_form == form
    for graph in (exported.proto.train, exported.proto.evaluate):
        assert len(graph.outputs) == (2 if form == SUM else 1)
    chain = Chain(exported, [exported.proto.train.allowed_cuts[0]])
    if form == SUM:  # equal to the whole batch, although micro-batches count unequally, one of them nothing
        for micro_batches in (1, 3, 7):
            chain = Chain(exported, [exported.proto.train.allowed_cuts[0]])
            assert_equal(chain.train(batch, micro_batches), eager(model, loss, batch))
    else:
        assert_equal(chain.train(batch, 3), eager(model, loss, batch, 3))
    expected = eager(model, loss, batch).loss
    assert chain.evaluate(batch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weight", [lambda t: t.numel(), lambda t: (t > 0).sum(), lambda t: 4.0])
def test_a_loss_of_sum_and_weight_is_taken_as_it_is(weight: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 1).double()
    x, y = torch.randn(5, 6).double(), torch.rand(5, 1).double() + 0.1

    def loss(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return ((output - target) ** 2).sum(), weight(target)

    exported = export_model(model, loss, (x, y))
    assert exported.proto.loss_form == SUM
    outcome = Chain(exported, [1]).train((x, y), micro_batches=2)
    total = sum(float(weight(part)) for part in torch.tensor_split(y, 2))
    expected = eager(model, lambda output, target: ((output - target) ** 2).sum() / total, (x, y))
    assert_equal(outcome, expected)


def test_the_loss_may_come_from_an_earlier_stage() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.Tanh()).double()
    x, y = torch.randn(4, 6).double(), torch.tensor([0, 1, 2, 0])

    def loss(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (output * target[:, None]).square().sum(), (target + 1).double().sum()

    exported = export_model(model, loss, (x, y))
    names = [node.name for node in exported.proto.train.nodes]
    made = names.index(exported.proto.train.outputs[0].value)
    assert made + 1 in exported.proto.train.allowed_cuts
    expected = eager(model, lambda output, target: loss(output, target)[0] / loss(output, target)[1], (x, y))
    for cut in exported.proto.train.allowed_cuts:
        assert_equal(Chain(exported, [cut]).train((x, y)), expected)
