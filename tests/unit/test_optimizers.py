from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from gradwire.optimizers import SUPPORTED, OptimizerReader
from gradwire_protocol.errors import OptimizerError
from gradwire_protocol.v1 import run_pb2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(3, 3)


def read(optimizer: torch.optim.Optimizer, model: nn.Module, *, without: str = "unused") -> OptimizerReader:
    return OptimizerReader(
        optimizer, model, {name: tensor for name, tensor in model.named_parameters() if without not in name}
    )


def settings(group: run_pb2.OptimizerGroup) -> dict[str, Any]:
    found = {}
    for item in group.settings:
        kind = str(item.value.WhichOneof("kind"))
        found[item.name] = None if kind == "none" else getattr(item.value, kind)
    return found


def test_groups_name_tensors_by_identity_and_leave_unused_ones_out() -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.second.weight, model.unused.weight], "weight_decay": 0.5},
            {"params": [model.first.bias, model.second.bias, model.unused.bias]},
        ],
        lr=0.25,
    )
    message = read(optimizer, model).describe()
    assert message.name == "AdamW"
    assert [list(group.parameters) for group in message.groups] == [["first.weight"], ["first.bias", "second.bias"]]
    assert [settings(group)["weight_decay"] for group in message.groups] == [0.5, 0.01]
    first = settings(message.groups[0])
    assert first["lr"] == 0.25
    assert [item.real for item in first["betas"].items] == [0.9, 0.999]
    assert first["amsgrad"] is False
    assert first["foreach"] is None
    # In AdamW's defaults, but no argument of it.
    assert "decoupled_weight_decay" not in first


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_supported_class_can_be_read(name: str) -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    model = nn.ParameterList([parameter])
    kind = getattr(torch.optim, name)
    assert read(kind([parameter]), model).describe().name == name


def test_hyperparameters_are_those_of_the_moment() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(1.0), momentum=0.9)
    reader = read(optimizer, model)
    assert settings(reader.hyperparameters().groups[0])["lr"] == 1.0
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    assert settings(reader.hyperparameters().groups[0])["lr"] == 0.5
    assert not reader.hyperparameters().groups[0].parameters


def test_what_schedulers_add_to_groups_does_not_travel() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    assert "initial_lr" in optimizer.param_groups[0]
    assert not {"initial_lr", "max_lr", "max_momentum"} & settings(read(optimizer, model).describe().groups[0]).keys()


def test_schedulers_do_not_warn_after_a_dispatched_step() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    read(optimizer, model).mark_dispatched()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


def test_the_reader_does_not_keep_the_optimizer_alive_and_knows_its_last_settings() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    reader = read(optimizer, model)
    optimizer.param_groups[0]["lr"] = 0.125
    reader.hyperparameters()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert settings(reader.hyperparameters().groups[0])["lr"] == 0.125
    reader.mark_dispatched()


def test_a_foreign_parameter_is_refused() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(OptimizerError, match="not the model's"):
        read(torch.optim.SGD([*model.parameters(), other.weight], lr=1.0), model)


def test_state_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(OptimizerError, match="has state already"):
        read(optimizer, model)


class AdamW(torch.optim.AdamW):
    """Somebody's own, under torch's name."""


@pytest.mark.parametrize("kind", [AdamW, torch.optim.LBFGS, torch.optim.SparseAdam])
def test_other_classes_are_refused(kind: Any) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(OptimizerError, match="cannot run on stage servers"):
        read(kind(model.parameters()), model)


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(OptimizerError, match="not a torch optimizer"):
        read("AdamW", nn.Linear(2, 2))  # type: ignore[arg-type]


def test_differentiable_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(OptimizerError, match="differentiable"):
        read(torch.optim.SGD(model.parameters(), differentiable=True), model)


def test_a_group_that_is_added_later_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([model.weight])
    reader = read(optimizer, model)
    optimizer.add_param_group({"params": [model.bias]})
    with pytest.raises(OptimizerError, match="groups changed"):
        reader.hyperparameters()


def test_a_setting_that_cannot_travel_is_named() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.param_groups[0]["momentum"] = object()
    with pytest.raises(OptimizerError, match="group 0, momentum"):
        read(optimizer, model)
