"""Layers that say how they are split: the same graph as nn.Linear, and rules for their weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from graph_models import squared_loss
from torch import nn

import gradwire
from gradwire.graph import export_model
from gradwire.parallel_linear import ColumnParallelLinear, RowParallelLinear, module_rules
from gradwire.plan import Plan
from gradwire.run_request import RunRequest, make_request
from gradwire_protocol.errors import PlanError


class Feed(nn.Module):
    def __init__(self, first: type[nn.Linear], second: type[nn.Linear]) -> None:
        super().__init__()
        self.first = first(6, 8)
        self.second = second(8, 6, bias=False)
        self.head = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.second(torch.relu(self.first(x)))
        result: torch.Tensor = self.head(x + hidden)
        return result


def request(model: nn.Module, plan: Plan, optimizer: Any = torch.optim.AdamW) -> RunRequest:
    batch = torch.randn(4, 6)
    return make_request(
        model,
        optimizer(model.parameters()),
        loss=squared_loss,
        example=(batch, batch),
        plan=plan,
        seed=0,
        max_grad_norm=None,
        precision=None,
        description="",
    )


def sent(plan: Plan, **arguments: Any) -> list[tuple[str, str]]:
    message = request(Feed(ColumnParallelLinear, RowParallelLinear), plan, **arguments).message
    return [(rule.pattern, rule.split) for rule in message.plan.tensor_plan]


OWN = [("first.weight", "column"), ("second.weight", "row")]


def test_they_are_linear_layers_in_one_process() -> None:
    torch.manual_seed(0)
    plain = Feed(nn.Linear, nn.Linear)
    parallel = Feed(gradwire.ColumnParallelLinear, gradwire.RowParallelLinear)
    parallel.load_state_dict(plain.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(plain(x), parallel(x))
    assert torch.equal(plain(x), copy.deepcopy(parallel)(x))


def test_they_export_as_linear_layers() -> None:
    x = torch.randn(4, 6)
    plain, parallel = (
        export_model(Feed(first, second), squared_loss, (x, x)).proto
        for first, second in ((nn.Linear, nn.Linear), (ColumnParallelLinear, RowParallelLinear))
    )
    assert parallel == plain


def test_their_rules_come_before_the_plans() -> None:
    assert sent(Plan(tensor=2)) == [*OWN, ("*", "auto")]
    assert sent(Plan(tensor=2, tensor_plan={"head.weight": "whole"})) == [*OWN, ("head.weight", "whole")]
    assert sent(Plan()) == []


def test_a_plan_without_them_is_sent_as_it_is() -> None:
    model = Feed(nn.Linear, nn.Linear)
    assert not request(model, Plan(tensor=2)).message.plan.tensor_plan
    with pytest.raises(PlanError, match="matches no parameter"):
        request(model, Plan(tensor=2, tensor_plan={"third.weight": "row"}))


def test_an_optimizer_that_needs_whole_weights_is_refused() -> None:
    with pytest.raises(PlanError, match=r"Adafactor needs the whole of a parameter, and first\.weight is split"):
        sent(Plan(tensor=2), optimizer=torch.optim.Adafactor)


def test_rules_name_each_layer_once_wherever_it_is() -> None:
    shared = RowParallelLinear(2, 2)
    model = nn.ModuleDict({"a[0]": ColumnParallelLinear(2, 2), "b": shared, "c": shared, "d": nn.Linear(2, 2)})
    loss = nn.Sequential(ColumnParallelLinear(2, 2))
    assert module_rules(model, loss) == [
        ("a[[]0].weight", "column"),
        ("b.weight", "row"),
        ("loss.0.weight", "column"),
    ]
    assert module_rules(ColumnParallelLinear(2, 2), squared_loss) == [("weight", "column")]
